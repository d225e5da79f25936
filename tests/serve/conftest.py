"""One tiny model, served to all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

# `tiny_served` is imported late: without the extra `serve` it skips whoever imports it.


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    from tiny_served import served

    with served() as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Any) -> Iterator[Any]:
    from tiny_served import client_of

    with client_of(service) as client:
        yield client


@pytest.fixture(scope="module")
def address(service: Any) -> Iterator[str]:
    from tiny_served import running

    with running(service) as address:
        yield address


@pytest.fixture(scope="module")
def openai(address: str) -> Any:
    """The real client."""
    module = pytest.importorskip("openai", reason="needs the client `openai`")
    return module.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)

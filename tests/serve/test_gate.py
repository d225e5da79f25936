"""Who may come in."""

from typing import Any

import pytest
from tiny_served import NAME, client_of, served

KEY = "a-key"


@pytest.fixture(scope="module")
def kept() -> Any:
    with served(key=KEY) as service, client_of(service) as client:
        yield client


def test_a_key_is_needed(kept: Any) -> None:
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": KEY}, {"authorization": "Bearer é"}):
        headers = {k: v.encode("latin-1") for k, v in headers.items()}
        found = kept.get("/v1/models", headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
        assert kept.get("/metrics", headers=headers).status_code == 401
    assert kept.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert kept.get("/health").status_code == 200


def test_keys_are_compared_in_constant_time(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from zipper_lm.serve import gate

    seen = []
    monkeypatch.setattr(gate.secrets, "compare_digest", lambda a, b: seen.append((a, b)) or False)
    assert kept.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 401
    assert seen == [(KEY.encode(), KEY.encode())]


def test_pages_of_other_origins_are_not_served(client: Any) -> None:
    """Neither are their scripts let read anything (no CORS header), nor does a blind request reach a route."""
    found = client.get("/health", headers={"origin": "http://evil.example"})
    assert found.status_code == 403
    assert not any(name.startswith("access-control") for name in found.headers)
    assert client.get("/health", headers={"origin": "http://127.0.0.1"}).status_code == 200
    preflight = client.options("/v1/models", headers={"origin": "http://evil.example"})
    assert preflight.status_code == 403


def test_a_name_that_somebody_gave_this_address(client: Any) -> None:
    """DNS rebinding: a page elsewhere lets its own name point here."""
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/health", headers={"host": "localhost:8000"}).status_code == 200


@pytest.mark.parametrize("name", ["[", "[::1", "http://[", ""])
def test_names_that_are_none(client: Any, name: str) -> None:
    """What cannot be parsed was an error of the server's own, with a page of its log for each."""
    assert client.get("/health", headers={"host": name or "?"}).status_code == 403
    found = client.get("/health", headers={"origin": name})
    assert (found.status_code, found.json()["error"]["code"]) == (403, "other_origin")


def test_beyond_this_machine_any_name_is_good() -> None:
    with served(host="0.0.0.0", local=False, key=KEY) as service, client_of(service) as client:
        assert client.get("/health", headers={"host": "speech.example"}).status_code == 200


def test_nobody_is_served_while_it_loads_or_ends() -> None:
    from zipper_lm.serve.service import Service

    service = Service(NAME)
    with client_of(service) as client:
        assert client.get("/health").status_code == 503
        assert client.get("/health").json() == {"status": "loading"}
        found = client.get("/v1/models")
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert found.json()["error"]["type"] == "server_error"
    service.close()
    with served() as service, client_of(service) as client:
        assert client.get("/health").json() == {"status": "ok"}
        service.ending = True
        assert client.get("/health").json() == {"status": "ending"}
        assert client.get("/v1/models").status_code == 503


def test_an_engine_that_died() -> None:
    with served() as service, client_of(service) as client:
        service.engine._dead = RuntimeError("lost")
        assert client.get("/health").status_code == 503
        assert client.get("/health").json() == {"status": "failed"}
        assert client.get("/v1/models").status_code == 503
        service.engine._dead = None


def test_metrics(client: Any) -> None:
    client.get("/v1/models")
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert 'zipper_requests_total{route="/v1/models",status="200"}' in page.text
    assert "zipper_documents 0.0" in page.text

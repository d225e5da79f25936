"""The way to the Hugging Face Hub: folders by path or id, the commit that was read, and clear words when it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache

CONFIG_FILE = "config.json"
HUB_ARGUMENTS = ("cache_dir", "token", "local_files_only", "force_download")
"""What every loader here passes on to the Hub."""


@contextmanager
def reaching(what: str, source: str | Path, revision: str | None = None) -> Iterator[None]:
    """Turn whatever the block raises on loading `source` into a `ValueError` that says what to do.

    Args:
        what: what is loaded, such as ``"tower 'text'"``. source: Hub id or folder. revision: asked for, if any.

    Raises:
        ValueError: in place of any `Exception` of the block.
    """
    try:
        yield
    except Exception as error:  # transformers, huggingface-hub, safetensors and httpx each have their own kinds
        raise ValueError(f"{what} {str(source)!r}: {_reason(error, source, revision)}") from error


def _reason(error: BaseException, source: str | Path, revision: str | None) -> str:
    kinds = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in str(error):
        return "it has code of its own, which runs only with trust_remote_code"
    if Path(source).is_dir():
        return f"cannot be loaded from that folder: {first}"
    if Path(source).is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
        return "no such folder"
    if "RevisionNotFoundError" in kinds:
        return f"the Hub has no revision {revision!r} of it"
    if "GatedRepoError" in kinds:
        return (
            "its owner asks for consent first: accept the terms on its page and log in (hf auth login) or set HF_TOKEN"
        )
    if "RepositoryNotFoundError" in kinds:
        return "no such folder here, and no such id on the Hub (or a private one: log in with hf auth login)"
    if "OfflineModeIsEnabled" in kinds or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return "no such folder here, offline mode is on (HF_HUB_OFFLINE) and the cache does not have it"
    if kinds & {"ConnectError", "ConnectTimeout", "ConnectionError", "ReadTimeout", "LocalEntryNotFoundError"}:
        return "no such folder here, the Hub cannot be reached, and the cache does not have it"
    return f"cannot be loaded: {first}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def local_folder(source: str | Path, revision: str | None = None, **hub: Any) -> Path:
    """A checkpoint's folder on disk; a Hub id is fetched (or found in the cache) first.

    Raises:
        ValueError: if it is neither a folder nor reachable.
    """
    if Path(source).is_dir():
        return Path(source)
    known = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS}
    with reaching("model", source, revision):
        return Path(snapshot_download(str(source), revision=revision, **known))


def commit_of(source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """The commit at which a Hub id was read, off the cache; `None` for a local folder."""
    if Path(source).is_dir():
        return None
    path = try_to_load_from_cache(str(source), CONFIG_FILE, revision=revision or "main", cache_dir=cache_dir)
    return Path(path).parent.name if isinstance(path, str) else revision

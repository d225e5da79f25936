"""The way to the Hugging Face Hub: folders by path or id, the commit that was read, and clear words when it fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import REPOCARD_NAME
from transformers.utils import cached_file

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HUB_ARGUMENTS = ("cache_dir", "token", "local_files_only", "force_download")
"""What every loader here passes on to the Hub."""


def check_hub_arguments(names: Iterable[str]) -> None:
    """Raise `TypeError` for a name that is none of `HUB_ARGUMENTS`, as a function without it does."""
    if unknown := sorted(set(names) - set(HUB_ARGUMENTS)):
        raise TypeError(f"unexpected arguments {unknown}")


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
    at = f" at revision {revision!r}" if revision else ""
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
        return f"no such folder here, offline mode is on (HF_HUB_OFFLINE) and the cache does not have it{at}"
    if kinds & {"ConnectError", "ConnectTimeout", "ConnectionError", "ReadTimeout", "LocalEntryNotFoundError"}:
        return f"no such folder here, the Hub cannot be reached, and the cache does not have it{at}"
    return f"cannot be loaded: {first}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def local_folder(
    source: str | Path, revision: str | None = None, *, only: Sequence[str] | None = None, **hub: Any
) -> Path:
    """A checkpoint's folder on disk; a Hub id is fetched (or found in the cache) first.

    Args:
        source: folder or Hub id. revision: on the Hub.
        only: patterns of the files that are needed, where the others need not be fetched; `*` is also of folders.
        hub: see `HUB_ARGUMENTS`.

    Raises:
        ValueError: if it is neither a folder nor reachable.
    """
    if Path(source).is_dir():
        return Path(source)
    known = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS}
    known |= {} if only is None else {"allow_patterns": list(only)}
    with reaching("model", source, revision):
        return Path(snapshot_download(str(source), revision=revision, **known))


def commit_of(source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """The commit at which a Hub id was read, off the cache; `None` for a local folder."""
    if Path(source).is_dir():
        return None
    path = try_to_load_from_cache(str(source), CONFIG_FILE, revision=revision or "main", cache_dir=cache_dir)
    return Path(path).parent.name if isinstance(path, str) else revision


def license_of(source: str | Path, revision: str | None = None, **hub: Any) -> str | None:
    """The licence that the model card beside a model's weights states, as the Hub names it, such as ``"apache-2.0"``.

    Args:
        source: folder or Hub id. revision: on the Hub. hub: see `HUB_ARGUMENTS`.

    Returns:
        The licence; one that the Hub has no name for as ``"other (its name)"``, several with commas between. `None` if
        there is no card, it cannot be reached or read, or it does not say.
    """
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(str(source), REPOCARD_NAME, revision=revision, **quietly, **hub)
        data = ModelCard.load(file, ignore_metadata_errors=True).data if file else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        # What a card says is good to know, and no reason to stop.
        logger.warning("the licence of %s is not known, its model card cannot be read: %s", source, error)
        return None
    license, name = data.get("license"), data.get("license_name")
    if license in (None, "other") and isinstance(name, str) and name:
        return f"other ({name})"
    # A licence is a name or names: anything else is not even shown, as aliases may make it as large as they like.
    names: list[Any] = license if isinstance(license, list) else [license]
    return ", ".join(names) if all(isinstance(each, str) and each for each in names) else None

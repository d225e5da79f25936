"""The pre-trained model inside a codec: load it, and say in the codec's folder which one it was.

A model from the Hub is named by id, commit and the hash of its weights; one from a local folder is copied. So a saved
codec can be handed on, and a changed model is noticed before it writes other units than the tower knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from zipper_lm.backbones import weights_hash
from zipper_lm.hub import commit_of, reaching

MODEL_FOLDER = "model"
"""Where a codec's folder keeps the model, if it was a local one."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model a codec uses.

    Args:
        source: Hub id, or folder; ``"model"`` in a codec's folder is the folder of that name there.
        revision: commit on the Hub.
        weights_hash: SHA-256 of its tensors (`zipper_lm.backbones.weights_hash`).
    """

    source: str
    revision: str | None = None
    weights_hash: str | None = None


def open_model(owner: Any, at: ModelSource, **hub: Any) -> tuple[Any, ModelSource]:
    """Load a codec's model: float32, in evaluation mode, frozen. Pickled weights go through torch's restricted loader
    only, as transformers does by default.

    Args:
        owner: a class with transformers' `from_pretrained`. at: where it is. hub: `cache_dir`, `token`,
            `local_files_only`.

    Returns:
        The model, and where it is with its commit and hash filled in.

    Raises:
        ValueError: if it cannot be loaded, or has other weights than `at` says.
    """
    with reaching(f"codec model ({owner.__name__})", at.source, at.revision):
        model = owner.from_pretrained(at.source, revision=at.revision, dtype=torch.float32, **hub)
    model = model.eval().requires_grad_(False)
    found = weights_hash(model)
    if at.weights_hash not in (None, found):
        raise ValueError(
            f"codec model {at.source!r}: other weights than when the codec was saved, its units would differ "
            f"(sha256 {found[:12]}, was {str(at.weights_hash)[:12]})"
        )
    commit = commit_of(at.source, at.revision, hub.get("cache_dir"))
    return model, ModelSource(source=at.source, revision=commit, weights_hash=found)


def keep_model(model: PreTrainedModel, at: ModelSource, folder: Path) -> ModelSource:
    """Write what a codec's folder needs of its model: a local one is copied, one of the Hub stays there.

    Args:
        model, at: what `open_model` gave. folder: the codec's, being written.

    Returns:
        What `codec.json` shall say of it.
    """
    if not Path(at.source).is_dir():
        return at
    # The names of the class itself: one taken out of a larger model would get back the names it had there.
    model.save_pretrained(folder / MODEL_FOLDER, save_original_format=False)
    return ModelSource(source=MODEL_FOLDER, weights_hash=at.weights_hash)


def kept_model(fields: dict[str, Any], folder: str | Path) -> ModelSource:
    """Where the model of a saved codec is, from what its `codec.json` says.

    Raises:
        ValueError: if it does not say.
    """
    try:
        at = ModelSource(**fields)
    except TypeError as error:
        raise ValueError(f"{folder}: codec.json does not say which model it needs ({error})") from error
    if at.source == MODEL_FOLDER:
        return ModelSource(source=str(Path(folder) / MODEL_FOLDER), weights_hash=at.weights_hash)
    return at

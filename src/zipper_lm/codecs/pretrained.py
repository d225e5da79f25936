"""The pre-trained model inside a codec: load it, and say in the codec's folder which one it was.

A model from the Hub is named by id, commit and the hash of its weights; one from a local folder is copied. So a saved
codec can be handed on, and a changed model is noticed before it writes other units than the tower knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from zipper_lm.utils.hub import commit_of, reaching
from zipper_lm.utils.known_hashes import FilesSeen
from zipper_lm.utils.places import place_of
from zipper_lm.utils.sizes import check_size, weight_files
from zipper_lm.utils.tensors import lacking_tensors, weights_hash

MODEL_FOLDER = "model"
"""Where a codec's folder keeps the model, if it was a local one."""

UNUSED = "masked_spec_embed"
"""What speech encoders put in place of masked frames, in pre-training only: published checkpoints may lack it."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model a codec uses.

    Args:
        source: Hub id, or folder.
        revision: commit on the Hub.
        weights_hash: SHA-256 of its tensors (`zipper_lm.utils.tensors.weights_hash`).
        local: whether `open_model` found it in a folder.
        hub: for the Hub (`zipper_lm.utils.hub.HUB_ARGUMENTS`).
    """

    source: str
    revision: str | None = None
    weights_hash: str | None = None
    local: bool = False
    hub: Mapping[str, Any] = field(default_factory=dict, repr=False)


class RunsModel:
    """A codec with a model, which runs on the model's device; ids and values are on the CPU always."""

    model: Any

    def to(self, device: torch.device | str) -> Self:
        """Run on this device from now on."""
        self.model.to(device)
        for module in self.model.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor):  # which `to` does not know of: Mimi's codebooks, once they were used
                    setattr(module, name, value.to(device))
        return self


def open_model(owner: Any, at: ModelSource) -> tuple[Any, ModelSource]:
    """Load a codec's model: float32, in evaluation mode, frozen. Pickled weights go through torch's restricted loader
    only, as transformers does by default.

    Args:
        owner: a class with transformers' `from_pretrained` and `from_config`. at: where it is.

    Returns:
        The model, and where it is, as it is kept: a folder by its absolute path, or a Hub id with the commit; with the
        hash, and without what only this loading needed of `hub` (so that no token is handed on).

    Raises:
        ValueError: if it cannot be loaded, the checkpoint lacks some of its tensors, or they are others than `at` says.
    """
    with reaching(f"codec model ({owner.__name__})", at.source, at.revision):
        config = AutoConfig.from_pretrained(at.source, revision=at.revision, trust_remote_code=False, **at.hub)
        files = weight_files(at.source, revision=at.revision, **at.hub)
        seen = FilesSeen(files)
        check_size("its config.json", config, files, partial(owner.from_config, trust_remote_code=False))
        model, info = owner.from_pretrained(
            at.source,
            revision=at.revision,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,  # said outright: where it is not, transformers asks at the terminal
            **at.hub,
        )
    model = model.eval().requires_grad_(False)
    lacking = lacking_tensors(info)
    for name in [n for n in lacking if n.rpartition(".")[2] == UNUSED]:
        lacking.remove(name)
        model.get_parameter(name).zero_()  # drawn anew on each loading, it would give each another hash
    if lacking:
        raise ValueError(
            f"codec model {at.source!r}: the checkpoint lacks {len(lacking)} tensors of {type(model).__name__}, such "
            f"as {lacking[:3]}"
        )
    made = [transformers.__version__, type(model).__qualname__, model.config.to_json_string()]
    found = seen.hash(made, at.weights_hash, partial(weights_hash, model))
    if at.weights_hash not in (None, found):
        raise ValueError(
            f"codec model {at.source!r}: other weights than when the codec was saved, its units would differ "
            f"(sha256 {found[:12]}, was {str(at.weights_hash)[:12]})"
        )
    local = Path(at.source).is_dir()
    return model, replace(
        at,
        source=place_of(at.source) if local else at.source,
        revision=commit_of(at.source, at.revision, at.hub.get("cache_dir")),
        weights_hash=found,
        local=local,
        hub={name: value for name, value in at.hub.items() if name in ("cache_dir", "local_files_only")},
    )


def keep_model(model: PreTrainedModel, at: ModelSource, folder: Path) -> dict[str, Any]:
    """Write what a codec's folder needs of its model: a local one is copied, one of the Hub stays there.

    Args:
        model, at: what `open_model` gave. folder: the codec's, being written.

    Returns:
        What `codec.json` shall say of it.
    """
    if not at.local:
        return {"source": at.source, "revision": at.revision, "weights_hash": at.weights_hash}
    # The names of the class itself: one taken out of a larger model would get back the names it had there.
    model.save_pretrained(folder / MODEL_FOLDER, save_original_format=False)
    return {"source": MODEL_FOLDER, "revision": None, "weights_hash": at.weights_hash}


def kept_model(fields: dict[str, Any], folder: str | Path, **hub: Any) -> ModelSource:
    """Where the model of a saved codec is, from what its `codec.json` says; ``"model"`` is the folder of that name in
    the codec's own.

    Raises:
        ValueError: if it does not say.
    """
    try:
        at = ModelSource(**fields, hub=hub)
    except TypeError as error:
        raise ValueError(f"{folder}: codec.json does not say which model it needs ({error})") from error
    if at.source == MODEL_FOLDER:
        return replace(at, source=str(Path(folder) / MODEL_FOLDER))
    return at

"""What a tower can be made of: a decoder of transformers as it is loaded. Of everything else it is said what that is,
and how a decoder is got from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers.utils import cached_file

from zipper_lm.utils.json_files import read_mapping

ADAPTER_FILE = "adapter_config.json"


def check_decoder(what: str, given: Any) -> None:
    """Raise `ValueError` if an object is no decoder that can be a tower.

    Args:
        what: whose it is to be, for the message. given: a decoder, or anything else.
    """
    if (way := _way_on(given)) is not None:
        raise ValueError(f"{what}: a {type(given).__name__} is no tower: {way}")


def _way_on(given: Any) -> str | None:
    """How a tower is got from what is none; `None` for a decoder."""
    if hasattr(given, "merge_and_unload"):
        return "it has adapters (PEFT) around a model; call merge_and_unload() first and give what that returns"
    if hasattr(given, "_orig_mod"):
        return "it is compiled; give the model that was compiled, and compile after the fusion"
    if isinstance(given, (nn.DataParallel, DistributedDataParallel)) or type(given).__name__.startswith(
        ("FullyShardedDataParallel", "FSDP")
    ):
        return "it spreads a model over devices; give the model in it (.module), and spread the fused model"
    if isinstance(given, Mapping):
        return "tensors alone do not say what computes with them; load them into a model, or give the folder of one"
    if not isinstance(given, PreTrainedModel):
        if isinstance(getattr(given, "model", None), PreTrainedModel):
            return "give the model in it (.model), if that is a decoder"
        return (
            "it must be a decoder of transformers, as AutoModelForCausalLM.from_pretrained gives, its folder or Hub id"
        )
    if getattr(given, "_compiled_call_impl", None) is not None:
        return "it was compiled in place; load it anew, and compile after the fusion"
    if getattr(given, "_hf_peft_config_loaded", False):
        return "it has adapters (PEFT) in it; load it without them, or merge them: PeftModel.merge_and_unload()"
    if given.config.model_type.startswith("zipper"):
        return (
            "it is a fused model; fuse its decoders, or combine models whose zips were trained apart (zipper combine)"
        )
    causal, bare = (_classes(mapping, given) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING))
    if type(given) in causal:
        return None
    if type(given) in bare:
        return "it has no language-model head; load it by AutoModelForCausalLM, if its checkpoint has one"
    if given.config.is_encoder_decoder:
        return "it is an encoder with a decoder; a tower is a decoder alone"
    return None


def _classes(mapping: Any, model: PreTrainedModel) -> tuple[type, ...]:
    """The classes that a mapping of transformers has for a model's config."""
    found = mapping.get(type(model.config), ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def check_source(source: str | Path, **at: Any) -> None:
    """Raise `ValueError` if what is at a source is no model but adapters for one: transformers would fetch the base
    that their config names, from wherever that is.

    Args:
        source: folder or Hub id. at: `revision`, and what else `cached_file` takes.
    """
    file = cached_file(
        str(source),
        ADAPTER_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **at,
    )
    if file is None:
        return
    base = read_mapping(file).get("base_model_name_or_path")
    raise ValueError(
        f"{str(source)!r} holds adapters (PEFT) for {base!r}, which are no tower: load that model, "
        "PeftModel.from_pretrained(model, ADAPTERS).merge_and_unload(), save_pretrained, and give that folder"
    )

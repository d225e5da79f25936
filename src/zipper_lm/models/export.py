"""One tower alone, as a plain Hugging Face checkpoint: trained as it now is, adapters merged, its codec beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from zipper_lm.fusion.backbones import blank_backbone, lora_config
from zipper_lm.fusion.tower import embedding_of
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.utils.files import check_apart, new_folder

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer


def export_tower(model: Writer, name: str, save_directory: str | Path, *, overwrite: bool = False) -> None:
    """Write one tower as a folder that `AutoModelForCausalLM.from_pretrained` loads (or the class that its config
    names, for a family that is not in that map), whole or not at all.

    Zips and input projections are left behind: the logits are those of the tower's unimodal calls, bit for bit in the
    dtype that it has now; of adapters, within what merging them rounds.

    Args:
        model: towers and zips; or a single decoder, whose only name here is that of its base modality.
        name: of the tower.
        save_directory: the folder; the tower's codec (a tokenizer, for text) is written there too.
        overwrite: replace a folder that is there.

    Raises:
        ValueError: for an unknown tower; one that is quantized or has code of its own, which its source alone holds; if
            the folder is there, cannot be written, or is what the tower is loaded from.
    """
    backbones, specs = model.backbones(), model.config.tower_specs
    if name not in backbones:
        raise ValueError(f"unknown tower {name!r}; this model has {list(backbones)}")
    backbone, spec = backbones[name], specs[name]
    for other, at in specs.items():
        for place in (at.source, backbones[other].name_or_path):
            check_apart(save_directory, {f"tower {other!r}": place} if place else {})
    _check_whole(name, spec, backbone)
    codecs = model.processor.codecs if model.processor is not None else {}
    with new_folder(save_directory, overwrite) as folder:
        alone = merged(name, backbone, spec) if spec.train == "lora" else backbone
        # With a prefix transformers would write the names back as they were in the larger model.
        alone.save_pretrained(folder, save_original_format=spec.prefix is None)
        if name in codecs:
            codecs[name].save_pretrained(folder)


def _check_whole(name: str, spec: TowerSpec, backbone: PreTrainedModel) -> None:
    if spec.quantization is not None or getattr(backbone.config, "quantization_config", None) is not None:
        raise ValueError(
            f"tower {name!r} is quantized: what it was made from, {spec.source!r}, is the plain checkpoint"
        )
    if spec.trust_remote_code:
        raise ValueError(
            f"tower {name!r} has code of its own, which only {spec.source!r} holds: it cannot be exported without"
        )


def merged(name: str, backbone: PreTrainedModel, spec: TowerSpec) -> PreTrainedModel:
    """A copy of a backbone with its adapters merged into its weights (PEFT's `merge_and_unload`), in its dtype.

    Where an adapter is on the embedding or the head, and the backbone ties the two, the copy does no longer.

    Raises:
        ValueError: if the copy's logits are not the backbone's.
    """
    from peft.tuners.lora import LoraLayer, LoraModel
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config = type(backbone.config).from_dict(backbone.config.to_dict())
    if any(isinstance(end, LoraLayer) for end in (backbone.get_input_embeddings(), backbone.get_output_embeddings())):
        config.tie_word_embeddings = False
    copy = blank_backbone(config, spec, backbone.dtype)
    adapted: Any = LoraModel(copy, lora_config(spec.lora), "default")
    cast_adapter_dtype(copy, "default")
    copy.load_state_dict(backbone.state_dict())
    plain: PreTrainedModel = adapted.merge_and_unload(safe_merge=True).eval()
    plain.generation_config = backbone.generation_config
    _check_logits(name, backbone, plain)
    return plain


@torch.no_grad()
def _check_logits(name: str, backbone: PreTrainedModel, plain: PreTrainedModel) -> None:
    size = int(embedding_of(plain).shape[0])
    ids = torch.arange(16)[None] * 7919 % size
    training = backbone.training
    try:
        ours = backbone.eval()(input_ids=ids.to(backbone.device)).logits.float().cpu()
    finally:
        backbone.train(training)
    theirs = plain(input_ids=ids).logits.float()
    apart, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not apart <= torch.finfo(plain.dtype).eps ** 0.5 * largest:  # what rounding each merged matrix makes of logits
        raise ValueError(f"tower {name!r}: its adapters cannot be merged: logits would differ by {apart:.3g}")

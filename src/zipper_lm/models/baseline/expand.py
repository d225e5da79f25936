"""A pre-trained decoder gets the ids of further modalities: the beginning of a single decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from zipper_lm.codecs.codec import Codec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.fusion.backbones import came_from, dtype_in_training, load_backbone
from zipper_lm.fusion.causal import check_causal
from zipper_lm.fusion.decoders import check_decoder
from zipper_lm.fusion.fields import plain
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.models.baseline.config import SingleDecoderConfig
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.baseline.vocabulary import Modality
from zipper_lm.utils.arguments import refuse
from zipper_lm.utils.hub import HUB_ARGUMENTS
from zipper_lm.utils.tensors import dtype_name


def expand(
    base: str,
    source: str | Path | PreTrainedModel | TowerSpec,
    codecs: Mapping[str, Codec],
    *,
    train: str = "full",
    lora: Mapping[str, Any] | None = None,
    loss_weights: Mapping[str, float] | None = None,
    **hub: Any,
) -> SingleDecoder:
    """A pre-trained decoder with the ids of further modalities.

    Embeddings and head of new ids are drawn around the mean of the old ones, as transformers does it.

    Args:
        base: the modality that the backbone already has.
        source: the backbone: Hub id, path, loaded model or `TowerSpec`. It is loaded in float32: a small update is
            lost in half precision, and new ids are trained under LoRA, too. `TowerSpec.config` may say otherwise.
        codecs: of every modality, the base's too. Its order, the base first, is the order of the ids.
        train: ``"full"`` or ``"lora"`` (adapters, embeddings and head). lora: arguments of `peft.LoraConfig`.
        loss_weights: by modality.
        hub: `cache_dir`, `token`, `local_files_only` for the Hub.

    Raises:
        ValueError: without a codec for `base` or without a second modality, if the base's codec does not fit, or for a
            backbone with code of its own.
    """
    refuse("expand", {k: v for k, v in hub.items() if k not in HUB_ARGUMENTS}, {})
    if base not in codecs or len(codecs) < 2:
        raise ValueError(f"a single decoder needs codecs for {base!r} and one more modality, got {list(codecs)}")
    if train not in ("full", "lora"):
        raise ValueError(f"a single decoder is trained 'full' or by 'lora', got {train!r}: new ids must be learned")
    if not isinstance(source, (TowerSpec, str, Path)):
        check_decoder("single decoder", source)
    if isinstance(source, TowerSpec) and source.trust_remote_code:
        raise ValueError(f"{source.source}: a single decoder with code of its own cannot be rebuilt from its config")
    if isinstance(source, PreTrainedModel):
        spec, backbone = TowerSpec(source=source.name_or_path or ""), source
    else:
        spec = source if isinstance(source, TowerSpec) else TowerSpec(source=str(source))
        backbone = load_backbone(spec, dtype=dtype_in_training(spec), **hub)
    check_causal("single decoder", backbone)
    embedding: Any = backbone.get_input_embeddings()
    offset = int(embedding.weight.shape[0])
    if codecs[base].vocab_size > offset:
        raise ValueError(
            f"{base}: the codec has {codecs[base].vocab_size} ids, the backbone's vocabulary only {offset}"
        )
    first = codecs[base]
    modalities = [Modality(base, 0, first.vocab_size, first.bos_id, first.eos_id, first.pad_id)]
    for name, codec in codecs.items():
        if name != base:
            modalities.append(Modality(name, offset, codec.vocab_size, codec.bos_id, codec.eos_id, codec.pad_id))
            offset += codec.vocab_size
    spec = came_from(spec, backbone, **hub)
    backbone.resize_token_embeddings(offset)
    spec = replace(
        spec,
        architecture=type(backbone).__name__,
        backbone=plain({**backbone.config.to_dict(), "dtype": dtype_name(backbone.dtype)}),
        train=train,  # type: ignore[arg-type]
        lora=dict(lora) if lora is not None else None,
    )
    config = SingleDecoderConfig([asdict(m) for m in modalities], asdict(spec), loss_weights)
    model = SingleDecoder(config, backbone)
    model.processor = ZipperProcessor(codecs, model.specials)
    return model.eval()

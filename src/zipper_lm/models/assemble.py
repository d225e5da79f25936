"""Assemble: pre-trained decoders, by path, Hub id or as they are, become a fresh `ZipperModel` with its processor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from zipper_lm.codecs.audio import SAMPLING_RATE
from zipper_lm.codecs.codec import CODEC_FILE, Codec, load_codec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.fusion.backbones import came_from, check_same_backbone, dtype_in_training, load_backbone, recorded_dtype
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.decoders import check_decoder
from zipper_lm.fusion.fields import plain
from zipper_lm.fusion.interface import embedding_of
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.stream import measure_scales
from zipper_lm.fusion.tower import depth_of
from zipper_lm.fusion.tower_spec import TowerSpec, place_projections
from zipper_lm.fusion.zip_spec import ZipSpec, expand
from zipper_lm.utils.hub import HUB_ARGUMENTS, local_folder
from zipper_lm.utils.tensors import dtype_name

M = TypeVar("M", bound=ZippedTowers)
logger = logging.getLogger(__name__)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def assemble(
    cls: type[M],
    towers: Mapping[str, str | Path | PreTrainedModel | TowerSpec],
    *,
    codecs: Mapping[str, Codec | str | Path] | None = None,
    zips: ZipSpec | Sequence[ZipSpec] | None = None,
    train: Mapping[str, str] | None = None,
    loss_weights: Mapping[str, float] | None = None,
    handover_weight: float = 0.1,
    dtype: Any = None,
    **hub: Any,
) -> M:
    """Fuse pre-trained decoders into a fresh `ZipperModel`, with its processor beside it.

    Args:
        towers: by name: Hub id, path, a loaded model, or a `TowerSpec` for more settings. A loaded model is compared
            with what is where it came from; if that differs or is gone, the model has no source and is always stored.
        codecs: by name: a codec or its folder. Where none is given: the backbone's own `codec.json`, else its
            tokenizer, else the tower takes ids only.
        zips: which tower reads which, and how; `None` is all pairs, four layers evenly spaced.
        train: by name, ``"frozen"`` (default), ``"full"`` or ``"lora"``.
        loss_weights, handover_weight: see `ZipperConfig`.
        dtype: of the backbones; `None` takes that of `TowerSpec.config`, else the checkpoint's, and float32 for a tower
            that is trained in full: a small update is lost in half precision. New weights have torch's default dtype.
        hub: `cache_dir`, `token`, `local_files_only` for the Hub.

    Raises:
        ValueError: fewer than two towers, unusable names, zips that do not fit, or a codec larger than its tower.
    """
    if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
        raise ValueError(f"fuse: unknown arguments {unknown}")
    if len(towers) < 2:
        raise ValueError(f"fuse needs at least two towers, got {list(towers)}")
    for option, named in (("codecs", codecs), ("train", train), ("loss_weights", loss_weights)):
        if unknown := sorted(set(named or {}) - set(towers)):
            raise ValueError(f"fuse: {option} names {unknown}, but the towers are {list(towers)}")
    _check_names(list(towers))
    specs: dict[str, TowerSpec] = {}
    backbones: dict[str, PreTrainedModel] = {}
    found: dict[str, Codec] = {}
    lacking: dict[str, str] = {}
    for name, given in towers.items():
        if not isinstance(given, (TowerSpec, str, Path)):
            check_decoder(f"fuse: tower {name!r}", given)
        if isinstance(given, TowerSpec):
            spec = given
        else:
            spec = TowerSpec(source=(given.name_or_path or "") if isinstance(given, PreTrainedModel) else str(given))
        if train and name in train:
            spec = replace(spec, train=train[name])  # type: ignore[arg-type]
        if isinstance(given, PreTrainedModel):
            backbone = given
        else:
            own = dtype_in_training(spec) if dtype is None and spec.train == "full" else dtype
            backbone = load_backbone(spec, dtype=own, **hub)
            check_decoder(f"fuse: tower {name!r}", backbone)
        codec, why_none = codec_of(spec, (codecs or {}).get(name), **hub)
        if codec is not None:
            found[name] = codec
        else:
            lacking[name] = why_none
        if codec is not None and (codecs or {}).get(name) is not None:
            _check_units(name, spec, codec, **hub)
        specs[name] = _describe(name, spec, backbone, codec, **hub)
        if isinstance(given, PreTrainedModel) and not _is_there(name, specs[name], **hub):
            specs[name] = replace(specs[name], source="", revision=None, license=None)
        backbones[name] = backbone
    if len({id(b) for b in backbones.values()}) < len(backbones):
        raise ValueError(f"fuse: two of the towers {list(backbones)} are one and the same model; load it twice")
    model = connect(cls, specs, backbones, zips, loss_weights, handover_weight)
    model.processor = ZipperProcessor(found, model.specials, lacking)
    return model.eval()


def connect(
    cls: type[M],
    specs: Mapping[str, TowerSpec],
    backbones: Mapping[str, PreTrainedModel],
    zips: ZipSpec | Sequence[ZipSpec] | None,
    loss_weights: Mapping[str, float] | None,
    handover_weight: float = 0.1,
) -> M:
    """A model of backbones that are there and described, with fresh zips between them and no processor.

    Args:
        specs, backbones: by tower, of each as it is. zips, loss_weights, handover_weight: as of `assemble`.

    Raises:
        ValueError: for zips that do not fit.
    """
    depths = {n: depth_of(b, n, specs[n].layers) for n, b in backbones.items()}
    chosen = [zips] if isinstance(zips, ZipSpec) else list(zips) if zips is not None else [ZipSpec()]
    if strangers := [each for each in chosen if not isinstance(each, ZipSpec)]:
        raise ValueError(f"fuse: zips must be ZipSpecs, such as ZipSpec(layers=4), got {strangers[0]!r}")
    resolved = expand(chosen, depths)
    placed, resolved = measure_scales(place_projections(specs, resolved), resolved, backbones)
    config = ZipperConfig(
        towers=placed,
        zips=resolved,
        loss_weights=dict(loss_weights or {}),
        handover_weight=handover_weight,
    )
    return cls(config, dict(backbones))


def _check_names(names: Sequence[str]) -> None:
    folded: dict[str, str] = {}
    for name in names:
        if not name.isidentifier() or hasattr(nn.ModuleDict, name) or name in ("auto", "handover"):
            raise ValueError(f"tower name {name!r} cannot be used: it must be a plain word of its own")
        if (other := folded.setdefault(name.lower(), name)) != name:
            raise ValueError(f"tower names {other!r} and {name!r} clash: they differ in case only")


def codec_of(spec: TowerSpec, given: Codec | str | Path | None, **hub: Any) -> tuple[Codec | None, str]:
    """A tower's codec: the given one, the backbone's own `codec.json`, or its tokenizer. Without any, the tower takes
    ids.

    Returns:
        The codec, and ``""``; or `None`, and why there is none.

    Raises:
        ValueError: if a codec that is there, or was given, cannot be loaded.
    """
    from zipper_lm.codecs.text import TextCodec

    if isinstance(given, (str, Path)):
        return load_codec(given, **hub), ""
    if given is not None:
        return given, ""
    if not spec.source:
        return None, "the tower was given as a model, which brings no tokenizer"
    at = {"revision": spec.revision, **hub}
    if _has(spec.source, CODEC_FILE, **at):
        folder = local_folder(spec.source, **at)
        return load_codec(folder, trust_remote_code=spec.trust_remote_code, **hub), ""
    if not any(_has(spec.source, file, **at) for file in TOKENIZER_FILES):  # transformers would make one up
        return None, f"{spec.source} has neither {CODEC_FILE} nor a tokenizer ({', '.join(TOKENIZER_FILES)})"
    try:
        return TextCodec.from_pretrained(spec.source, trust_remote_code=spec.trust_remote_code, **at), ""
    except ValueError as error:
        logger.warning("tower %s takes ids only: %s", spec.source, error)
        return None, str(error)


def _check_units(name: str, spec: TowerSpec, given: Codec, **hub: Any) -> None:
    """Tell whether a codec of sound that is given for a tower writes the ids that the tower's own does, by trying both.

    Raises:
        ValueError: if it does not, and the tower is not trained in full: to it, such ids mean something else. Of one
            that is, it is a warning.
    """
    at = {"revision": spec.revision, **hub}
    if given.rate is None or not spec.source or not _has(spec.source, CODEC_FILE, **at):
        return
    own = load_codec(local_folder(spec.source, **at), trust_remote_code=spec.trust_remote_code, **hub)
    if own.rate is None:
        return
    sound = np.random.default_rng(0).normal(scale=0.1, size=SAMPLING_RATE).astype(np.float32)
    if given.encode([sound]) == own.encode([sound]):
        return
    told = (
        f"tower {name!r}: the codec that is given writes other ids than the one beside {spec.source}: units of another "
        "codebook, which mean something else to the tower"
    )
    if spec.train != "full":
        raise ValueError(f"{told}; leave it out, or train the tower in full")
    logger.warning("%s, until training has taught it", told)


def _has(source: str, file: str, **at: Any) -> bool:
    return bool(cached_file(source, file, _raise_exceptions_for_missing_entries=False, **at))


def _is_there(name: str, spec: TowerSpec, **hub: Any) -> bool:
    """Whether a given model can be had again from where it says it came: its weights may have been changed since."""
    if not spec.source:
        return False
    try:
        there = load_backbone(spec, dtype=recorded_dtype(spec), **(hub | {"local_files_only": True}))
        check_same_backbone(name, spec, there)
    except ValueError as error:
        logger.warning("tower %r was given as a model and is stored with the fusion: %s", name, error)
        return False
    return True


def _describe(name: str, spec: TowerSpec, backbone: PreTrainedModel, codec: Codec | None, **hub: Any) -> TowerSpec:
    """The spec with everything recorded that a later load needs."""
    config = backbone.config
    special: dict[str, Any] = {}
    for kind in ("bos", "eos", "pad"):
        value = getattr(codec, f"{kind}_id") if codec is not None else getattr(config, f"{kind}_token_id", None)
        if isinstance(value, (list, tuple)):
            value = value[0]
        special[kind] = value
    if special["eos"] is None:
        raise ValueError(f"tower {name!r}: neither its codec nor its config says which id ends a segment (eos)")
    bos, eos, pad = (int(special["eos"] if v is None else v) for v in special.values())
    size = int(embedding_of(backbone).shape[0])
    if codec is not None and codec.vocab_size > size:
        raise ValueError(f"tower {name!r}: the codec has {codec.vocab_size} ids, the backbone's vocabulary only {size}")
    return replace(
        came_from(spec, backbone, **hub),
        architecture=type(backbone).__name__,
        backbone=plain({**config.to_dict(), "dtype": dtype_name(backbone.dtype)}),
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )

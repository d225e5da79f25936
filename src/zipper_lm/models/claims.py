"""What a checkpoint's config claims, held against the header of its weights before memory is taken for it."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig

from zipper_lm.fusion.backbones import add_adapters, from_config
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.fusion.zips import ZipLayer
from zipper_lm.utils.weights import Shapes, TooMany, on_meta, stored_shapes

MOST = 20_000
"""Tensors of a frozen backbone whose adapters are looked at: more than any has."""

SPARE = 1 << 20
"""Numbers that may be asked for besides those that are stored: which tensors are at fault is told by name later."""


def check_checkpoint(config: ZipperConfig, file: Path) -> None:
    """Raise `ValueError`, naming the file, if a config asks for far more than the file of a checkpoint's own weights
    holds.

    Args:
        config: the checkpoint's. file: its `model.safetensors`; only its header is read.
    """
    stored = stored_shapes(file)
    for name, spec in config.tower_specs.items():
        if not spec.trust_remote_code:  # code of its own makes what it likes
            _check_tower(config, name, spec, _under(stored, f"towers.{name}.backbone."), f"{file}: tower {name!r}")
        asked = sum(group.get(name, "none") != "none" for group in config.projection_groups)
        there = sum(key.endswith(".up.weight") for key in _under(stored, f"input_projections.{name}"))
        if asked > there:
            raise ValueError(f"{file}: the config asks for {asked} input projections of {name!r}, it holds {there}")
    for zip_spec in config.zip_specs:
        pair = (zip_spec.reader, zip_spec.source)
        _check_zip(zip_spec, _under(stored, f"zips.{'.'.join(pair)}."), f"{file}: zip {'<-'.join(pair)}")


def check_whole(what: str, config: PreTrainedConfig, spec: TowerSpec, file: Path) -> None:
    """As `check_checkpoint`, of one backbone that is stored whole, its adapters too."""
    stored = stored_shapes(file)
    made = on_meta(what, lambda: from_config(config, spec), 2 * len(stored) + 64)
    if spec.train == "lora":
        on_meta(what, lambda: _adapted(made, spec), 2 * len(stored) + 64)
    _check_amount(what, sum(parameter.numel() for parameter in made.parameters()), stored)


def _under(stored: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in stored.items() if name.startswith(prefix)}


def _check_tower(config: ZipperConfig, name: str, spec: TowerSpec, stored: Shapes, what: str) -> None:
    """A trained tower is stored whole, one under LoRA by its adapters, a frozen one not at all."""
    if spec.train == "frozen":
        return
    try:
        made = on_meta(what, lambda: from_config(config.backbone_config(name), spec), 2 * len(stored) + MOST)
    except TooMany:
        raise
    except ValueError:
        if spec.train == "full":
            raise
        return  # a quantized one: it is not made from its config
    parameters = list(made.parameters())
    if spec.train == "lora":
        on_meta(what, lambda: _adapted(made, spec), 2 * len(stored) + MOST)
        parameters = [parameter for parameter in made.parameters() if parameter.requires_grad]
    _check_amount(what, sum(parameter.numel() for parameter in parameters), stored)


def _adapted(backbone: nn.Module, spec: TowerSpec) -> nn.Module:
    add_adapters(backbone, spec.lora)  # type: ignore[arg-type]
    return backbone


def _check_zip(spec: ZipSpec, stored: Shapes, what: str) -> None:
    if not isinstance(spec.layers, list) or not spec.layers:
        return  # a zip needs its layers named, and says so
    if missing := [n for n in ("0.norm.weight", "0.memory_projection.0.weight") if n not in stored]:
        raise ValueError(f"{what}: missing tensors {missing}")
    width, source_width = (math.prod(stored[n]) for n in ("0.norm.weight", "0.memory_projection.0.weight"))
    layer = on_meta(what, lambda: ZipLayer(spec, width, source_width), MOST)
    _check_amount(what, len(spec.layers) * sum(p.numel() for p in layer.parameters()), stored)


def _check_amount(what: str, asked: int, stored: Shapes) -> None:
    held = sum(math.prod(shape) for shape in stored.values())
    if asked > held + SPARE:
        raise ValueError(f"{what}: the config asks for {asked} numbers, the file holds {held}")

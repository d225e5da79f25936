"""Combine: models whose zips were trained apart, over the same frozen towers, become one, with no training.

What makes it possible: a frozen tower is the same in both, so zips that read it or that it reads through fit in either.
On documents of one model's own towers the combination computes what that model computes, bit for bit. A document may
also chain them (speech -> text -> image): each segment is computed with the towers it was trained with (`groups.py`).
"""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zipper_lm.codecs.codec import Codec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import check_order
from zipper_lm.models.zipper import ZipperModel

SAME = ("train", "layers", "bos_token_id", "eos_token_id", "pad_token_id", "config_hash", "weights_hash")
"""What must agree in a tower that several models share."""
NOWHERE = {"input_projection_layer": 0, "input_projection_scale": 1.0}
"""Of a tower without input projections."""


def combine(models: Sequence[ZipperModel]) -> ZipperModel:
    """One model with the towers and zips of all.

    The parts are taken over, not copied: the given models are not to be trained afterwards. Who speaks next was learned
    apart, with other choices, and does not carry over: ``schedule="auto"`` is refused until it is trained.

    Args:
        models: two or more. Each shares at least one tower with those before it; shared towers are frozen in all.

    Returns:
        A model in evaluation mode, with a processor if all have one.

    Raises:
        ValueError: for fewer than two models or none in common, a shared tower that was trained or differs in weights,
            special ids or codec, input projections of one tower at two places, or two zips for one pair.
    """
    if len(models) < 2:
        raise ValueError(f"combine: at least two models are needed, got {len(models)}")
    for number, model in enumerate(models, start=1):
        if not isinstance(model, ZipperModel):
            raise ValueError(f"combine: model {number} is a {type(model).__name__}; ZipperModels are combined")
    towers: dict[str, TowerSpec] = {}
    owner: dict[str, ZipperModel] = {}
    places: dict[str, dict[str, Any]] = {}
    zips, groups = [], []
    pairs: dict[tuple[str, str], int] = {}
    for number, model in enumerate(models, start=1):
        specs = model.config.tower_specs
        if towers and not set(towers) & set(specs):
            raise ValueError(
                f"combine: model {number} has {list(specs)}, none of the towers before it {sorted(towers)}"
            )
        for name, spec in specs.items():
            if name in towers:
                _check_shared(name, towers[name], spec, number)
                _check_codecs(name, owner[name], model)
            else:
                towers[name], owner[name] = spec, model
            if (layer := model.projection_layer(name)) is None:
                continue
            place = {"input_projection_layer": layer, "input_projection_scale": spec.input_projection_scale}
            if (before := places.setdefault(name, place)) != place:
                raise ValueError(
                    f"combine: tower {name!r} has {before} and, in model {number}, {place}; the input projections of "
                    "one tower stand at one place, and have one scale"
                )
        for zip_spec in model.config.zip_specs:
            pair = (zip_spec.reader, zip_spec.source)
            if pair in pairs:
                raise ValueError(f"combine: two zips for {pair[0]}<-{pair[1]}, in models {pairs[pair]} and {number}")
            pairs[pair] = number
            zips.append(zip_spec)
        groups += model.config.projection_groups
    check_order(zips, {name: model.tower(name).depth for name, model in owner.items()})
    config = ZipperConfig(
        {name: replace(spec, **places.get(name, NOWHERE)) for name, spec in towers.items()},
        zips,
        loss_weights={k: v for model in models for k, v in model.config.loss_weights.items()},
        handover_weight=0.0,
        groups=groups,
    )
    adapters = {name: _adapters(owner[name], name) for name in towers}
    combined = ZipperModel(config, {name: model.tower(name).backbone for name, model in owner.items()})
    for name, tensors in adapters.items():  # a new model makes new adapters in a tower that wants them
        combined.tower(name).backbone.load_state_dict(tensors, strict=False)
    _take_over(combined, models)
    if all(model.processor is not None for model in models):
        combined.processor = ZipperProcessor(_codecs(models), combined.specials)
    combined.to(models[0].device)  # type: ignore[arg-type]
    return combined.eval()


def _adapters(model: ZipperModel, name: str) -> dict[str, torch.Tensor]:
    tower = model.tower(name)
    return {k: v.clone() for k, v in tower.backbone.state_dict().items() if k in tower.adapter_names}


def _check_shared(name: str, ours: TowerSpec, theirs: TowerSpec, number: int) -> None:
    for where, spec in (("before", ours), (f"in model {number}", theirs)):
        if spec.train != "frozen":
            raise ValueError(
                f"combine: tower {name!r} was trained {where} (train={spec.train!r}); what is shared must be frozen"
            )
    if different := [field for field in SAME if getattr(ours, field) != getattr(theirs, field)]:
        raise ValueError(f"combine: tower {name!r} of model {number} is another one: {', '.join(different)} differ")


def _check_codecs(name: str, ours: ZipperModel, theirs: ZipperModel) -> None:
    """The same ids must mean the same: what the two codecs write when they are saved is compared."""
    found = [m.processor.codecs.get(name) for m in (ours, theirs) if m.processor is not None]
    if len(found) < 2 or None in found or found[0] is found[1]:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(i)) for i in range(2)]
        for folder, codec in zip(folders, found):
            assert codec is not None
            codec.save_pretrained(folder)
        names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in folders]
        _, mismatch, errors = filecmp.cmpfiles(folders[0], folders[1], names[0], shallow=False)
        if names[0] != names[1] or mismatch or errors:
            raise ValueError(f"combine: the codecs of tower {name!r} differ: {mismatch or names}")


@torch.no_grad()
def _take_over(combined: ZipperModel, models: Sequence[ZipperModel]) -> None:
    """Zips and input projections of each model, in the order in which its groups were added."""
    taken = dict.fromkeys(combined.names, 0)
    for model in models:
        for reader, source in model.layer_pairs:
            combined.zips[reader][source] = model.zips[reader][source]  # type: ignore[index, operator]
        for name in model.names:
            for key, _ in model.projection_keys[name]:
                new, _ = combined.projection_keys[name][taken[name]]
                combined.input_projections[new] = model.input_projections[key]
                taken[name] += 1


def _codecs(models: Sequence[ZipperModel]) -> Mapping[str, Codec]:
    return {name: c for m in reversed(models) if m.processor is not None for name, c in m.processor.codecs.items()}

"""Whether towers, zips and codecs that stand in a recipe beside `start` are those of the model that it starts from.

They are held against the model itself, not against the recipe that made it: a training checkpoint, or a model that was
fused in Python, has no such recipe, and that of a copy from the Hub has lost its paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zipper_lm.codecs.codec import Codec, codec_hash
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import ZipSpec, expand
from zipper_lm.jobs.recipes.schema import FuseRecipe, TowerRecipe
from zipper_lm.models.checkpoint import bundle
from zipper_lm.utils.hub import CONFIG_FILE
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import place_of

DTYPES = ("dtype", "torch_dtype")
"""Fields of a tower's `config` that say how it is loaded, not what it is."""

_SAME = (
    *("train", "lora", "input_projection", "input_projection_layer", "input_projection_scale"),
    *("layers", "architecture", "quantization"),
)
_WHERE = ("prefix", "config_key")
"""What finds a tower in its source, so that it counts where that is read."""


def lies_with_model(name: str, spec: TowerSpec) -> bool:
    """Whether a tower's weights are read from a fused model's own folder, whatever its source was: those of one that
    was trained, or that is stored along."""
    if spec.train == "full" and not spec.trust_remote_code:  # code lies at the source
        return True
    if spec.source in ("", bundle(name)):
        return True
    folder = Path(spec.source)
    if not folder.is_absolute() or folder.parts[-2:] != Path(bundle(name)).parts:
        return False
    config = folder.parents[1] / CONFIG_FILE  # of a model that a run was started from: another folder may be called so
    there = read_mapping(config).get("towers") if config.is_file() else None
    fields = there.get(name) if isinstance(there, dict) else None
    return isinstance(fields, dict) and fields.get("source") == bundle(name)


def has_moved(name: str, given: TowerRecipe, spec: TowerSpec) -> bool:
    """Whether a recipe names another place for a tower than its model does, and that is where it is read."""
    here = given.source in ("", spec.source) or place_of(given.source) == spec.source
    return not here and not lies_with_model(name, spec)


def check_towers(start: str, given: Mapping[str, TowerRecipe], specs: Mapping[str, TowerSpec], zips: Any) -> None:
    """Raise `ValueError` if a recipe's towers are not those of a model: only where one lies, on which device and in
    which dtype it is, and whether its code may run, is free. A field at its default counts as left out, but `train`:
    who writes `frozen` of a tower that was trained wants another thing.

    Args:
        start: what the model is called. given: as the recipe has them, some or all. specs: the model's.
        zips: the model's.
    """
    if unknown := sorted(set(given) - set(specs)):
        raise ValueError(f"towers names {unknown}, but start ({start}) has {list(specs)}")
    plain = TowerRecipe()
    for name, tower in given.items():
        spec = specs[name]
        theirs = {field: getattr(spec, field) for field in _SAME}
        theirs |= {} if lies_with_model(name, spec) else {field: getattr(spec, field) for field in _WHERE}
        free = _measured(name, tower, spec, zips)
        free |= {field for field in theirs if field != "train" and getattr(tower, field) == getattr(plain, field)}
        other = {f: value for f, value in theirs.items() if getattr(tower, f) != value and f not in free}
        if set(tower.config or {}) - set(DTYPES) and not _has_config(tower.config, spec):
            other["config"] = spec.config
        trained = spec.train == "full" and lies_with_model(name, spec)
        if trained and spec.source and tower.source and _last(tower.source) != _last(spec.source):
            other["source"] = _last(spec.source)
        if other:
            told = "; ".join(f"{field} is {getattr(tower, field)!r}, there {value!r}" for field, value in other.items())
            raise ValueError(
                f"towers.{name}: start ({start}) is trained further as it is, and has another one: {told}. Write what "
                "is there, or leave the tower out"
            )


def check_zips(start: str, given: Sequence[ZipSpec], model: ZippedTowers) -> None:
    """Raise `ValueError` if a recipe's zips are not those of a model; the default counts as none.

    Args:
        start: what the model is called. given: the recipe's. model: with its zips.
    """
    if list(given) == [ZipSpec()]:
        return
    advice = f"start ({start}) is trained further with the zips that it has; leave zips out"
    try:
        wanted = {(each.reader, each.source): each for each in expand(given, model.depths())}
    except ValueError as error:
        raise ValueError(f"zips: {error}; {advice}") from error
    there = {(each.reader, each.source): each for each in model.config.zip_specs}
    if set(wanted) != set(there):
        raise ValueError(f"zips: {_pairs(wanted)}, but start has {_pairs(there)}; {advice}")
    for pair, each in wanted.items():
        theirs = asdict(there[pair])
        free = {"stretch"} if each.stretch is None else set()
        free |= {"scale"} if each.scale == "stream" and isinstance(theirs["scale"], list) else set()
        if other := {f: v for f, v in asdict(each).items() if f not in free and v != theirs[f]}:
            told = "; ".join(f"{field} is {value!r}, there {theirs[field]!r}" for field, value in other.items())
            raise ValueError(f"zips: {_pairs([pair])}: {told}; {advice}")


def check_codecs(recipe: FuseRecipe, codecs: Mapping[str, Codec]) -> None:
    """Raise `ValueError` if codecs that stand in a recipe beside `start` are not those of the model that it starts
    from: ids would mean something else.

    Args:
        recipe: as it was given. codecs: the model's, by tower.
    """
    for name, tower in recipe.towers.items() if recipe.start is not None else ():
        if tower.codec is None:
            continue
        if name not in codecs or codec_hash(tower.codec.make()) != codec_hash(codecs[name]):
            raise ValueError(f"towers.{name}.codec: start ({recipe.start}) has another one, and keeps it; leave it out")


def _measured(name: str, tower: TowerRecipe, spec: TowerSpec, zips: Sequence[ZipSpec]) -> set[str]:
    """Fields that a recipe has in a word, of which the model has the number."""
    found = set()
    if tower.input_projection_layer == "first_zip":
        read = [layer for each in zips if each.reader == name for layer in each.layers]  # type: ignore[union-attr]
        found |= {"input_projection_layer"} if read and min(read) == spec.input_projection_layer else set()
    if tower.input_projection_scale == "stream" and spec.input_projection_scale != 1:
        found.add("input_projection_scale")
    return found


def _has_config(given: Mapping[str, Any] | None, spec: TowerSpec) -> bool:
    """Whether fields that are set otherwise than a checkpoint has them are so in a model; one that stores the tower
    along has them in the tower's own config alone."""
    fields, theirs = ({k: v for k, v in (each or {}).items() if k not in DTYPES} for each in (given, spec.config))
    if fields == theirs:
        return True
    there = spec.backbone or {}
    return set(theirs) <= set(fields) and all(k in there and there[k] == value for k, value in fields.items())


def _last(source: str) -> str:
    """A source's last part: the folders above it are others on another machine."""
    return Path(source).name


def _pairs(pairs: Any) -> str:
    return ", ".join(f"{reader}<-{source}" for reader, source in pairs) or "none"

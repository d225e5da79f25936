"""Checkpoints: split, save, load. What is new and what was there are told apart by module ownership.

A checkpoint is a folder: `config.json`, one `model.safetensors` with the new weights (zips, projections, handover,
adapters, and every tower that was trained), and the codecs. Frozen backbones are named by id, revision, config hash and
weights hash, and never stored, unless asked for. A model card says in words what it is. No pickle anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from zipper_lm.codecs.codec import Codec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.fusion.backbones import (
    base_tensors,
    build_backbone,
    check_same_backbone,
    check_trust,
    load_backbone,
    recorded_dtype,
    weights_seen,
)
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.decoders import check_decoder
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.tower import Tower
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.models.claims import check_checkpoint
from zipper_lm.models.records import generation_settings, write_settings
from zipper_lm.utils.arguments import Loading, check_devices
from zipper_lm.utils.files import check_apart, files_into
from zipper_lm.utils.hub import CONFIG_FILE, WEIGHTS_FILE, commit_of, local_folder
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.known_hashes import FilesSeen
from zipper_lm.utils.places import place_of
from zipper_lm.utils.shards import fill, is_sharded, reshard, whole_tensors
from zipper_lm.utils.tensors import dtype_name, tensors_hash, without_aliases

M = TypeVar("M", bound=ZippedTowers)
T = TypeVar("T")
CONFIG_FIELDS = ("towers", "zips", "loss_weights", "handover_weight", "groups")


def split(model: ZippedTowers) -> dict[str, Tensor]:
    """The tensors that are the model's own: everything outside the towers, adapters, and whole trained towers."""
    own: dict[str, Tensor] = {}
    for child_name, child in model.named_children():
        if child is not model.towers:
            own |= {f"{child_name}.{k}": v for k, v in child.state_dict().items()}
    own |= dict(model.named_parameters(recurse=False))
    for name, spec in model.config.tower_specs.items():
        tower = model.tower(name)
        state = tower.backbone.state_dict()
        # Of adapters first, as aliases of one may go by another name there than among the parameters.
        kept = state if spec.train == "full" else {k: v for k, v in state.items() if k in tower.adapter_names}
        kept = without_aliases(kept)
        own |= {_start(name) + k: v for k, v in kept.items()}
    return own


def _start(name: str) -> str:
    """What the names of a tower's tensors begin with."""
    return f"towers.{name}.backbone."


def save(
    model: ZippedTowers,
    save_directory: str | Path,
    *,
    overwrite: bool = False,
    bundle_towers: bool | Collection[str] = False,
    beside: Callable[[Path], Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str | None = None,
    writes: bool = True,
) -> None:
    """Write a checkpoint, whole or not at all; of a model that is spread over processes, too.

    Args:
        model: the model; its processor is written beside it if there is one.
        save_directory: a folder; made if missing. Other files in it are left alone.
        overwrite: replace a checkpoint that is there.
        bundle_towers: also store the frozen backbones, all or those named, under ``towers/``; always done for towers
            that have no source of their own, as they are now.
        beside: writes what belongs beside the checkpoint, such as its card, into the folder where it is made ready.
        state_dict: the model's tensors, to be stored in place of those that it holds here.
        max_shard_size: the largest file that may be; the weights are one file.
        writes: false: help to gather a model that is spread, and write nothing.

    Raises:
        ValueError: if the weights are larger than `max_shard_size`, `state_dict` lacks some, or a checkpoint is there
            already, or a file of a name that it needs, or what a tower is loaded from; if the folder cannot be written,
            or a tower that has a source is to be stored but differs from it; as
            `ZippedTowers.check_freeze_state`.
    """
    model.check_freeze_state()
    specs = model.config.tower_specs
    _check_apart(model, Path(save_directory))
    bundled = _bundled(model, bundle_towers)
    states = {name: _state_of(model.tower(name), name, state_dict) for name in bundled}
    own = given_tensors(split(model), state_dict, max_shard_size)
    if is_sharded(model):
        own, *complete = (whole_tensors(each, keep=writes) for each in (own, *states.values()))
        states = dict(zip(states, complete))
    if not writes:
        return
    config = _as_saved(model, states)

    def fill(folder: Path) -> None:
        for name in bundled:
            # With a prefix transformers would write the names back as they were in the larger model.
            alike, tower = specs[name].prefix is None, model.tower(name)
            tower.backbone.save_pretrained(folder / bundle(name), state_dict=states[name], save_original_format=alike)
        config.save_pretrained(folder)
        if model.processor is not None:
            model.processor.save_pretrained(folder)
        write_settings(folder, model.generation_settings)
        if beside is not None:
            beside(folder)

    write_checkpoint(Path(save_directory), own, config.fingerprint, fill, overwrite)


def _check_apart(model: ZippedTowers, folder: Path) -> None:
    """Raise `ValueError` if a checkpoint in a folder would replace a tower: where its record says it is, or where it
    was read, which is another place if it was given as a model, or instead of the checkpoint's own copy."""
    for name, spec in model.config.tower_specs.items():
        if not _is_nowhere_else(name, spec):
            check_apart(folder, {f"tower {name!r}": spec.source})
        loaded_from = model.tower(name).backbone.name_or_path
        if loaded_from and Path(loaded_from).resolve() == folder.resolve():
            check_apart(folder, {f"tower {name!r}": loaded_from})


def _bundled(model: ZippedTowers, chosen: bool | Collection[str] = False) -> list[str]:
    """The frozen towers that a checkpoint stores: those chosen, and those that are nowhere else."""
    specs = model.config.tower_specs
    if isinstance(chosen, bool):
        chosen = specs if chosen else ()
    return [n for n, s in specs.items() if s.train != "full" and (n in chosen or _is_nowhere_else(n, s))]


def _state_of(tower: Tower, name: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A tower's tensors under their source names, those of the model's `state_dict` where one is given."""
    if state_dict is None:
        return base_tensors(tower)
    start = _start(name)
    given = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
    return base_tensors(tower, given_tensors(tower.backbone.state_dict(), given))


def given_tensors(
    own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor] | None, max_shard_size: int | str | None = None
) -> Mapping[str, Tensor]:
    """What a checkpoint stores: a model's own tensors, or of those names the ones that a state dict has.

    Args:
        own: by name. state_dict: may hold others besides. max_shard_size: as transformers takes it.

    Raises:
        ValueError: if one is missing there or has another shape, or all together are larger than `max_shard_size`.
    """
    if state_dict is not None:
        if missing := sorted(set(own) - set(state_dict)):
            raise ValueError(f"state_dict lacks {len(missing)} tensors that the checkpoint stores: {missing[:3]}")
        for name, tensor in own.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(f"state_dict: {name} is {list(state_dict[name].shape)}, not {list(tensor.shape)}")
        own = {name: state_dict[name] for name in own}
    if max_shard_size is not None:
        plan = split_torch_state_dict_into_shards(dict(own), max_shard_size=max_shard_size)
        if plan.is_sharded:
            raise ValueError(
                f"max_shard_size={max_shard_size!r} is not followed: the {plan.metadata['total_size']} bytes of a "
                "checkpoint's own weights are one model.safetensors"
            )
    return own


def _as_saved(model: ZippedTowers, bundled: Mapping[str, Mapping[str, Tensor]]) -> ZipperConfig:
    """The config of a checkpoint that stores the towers `bundled`, by name with their tensors.

    Raises:
        ValueError: if one of them cannot be stored, or is no longer what its source has.
    """
    config = ZipperConfig.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    for name, tensors in bundled.items():
        config.towers[name] = asdict(
            _alone(name, model.config.tower_specs[name], tensors, model.tower(name).backbone.dtype)
        )
    return config


def _alone(name: str, spec: TowerSpec, tensors: Mapping[str, Tensor], now: torch.dtype) -> TowerSpec:
    """The spec of a tower that is stored with the checkpoint, as it is now.

    One that is nowhere else may have changed since it was fused, as by ``model.to(torch.bfloat16)``: this is the only
    copy, so the record follows it. One that has a source is that source's copy, or none at all.
    """
    if spec.quantization is not None:
        raise ValueError(f"tower {name!r} is quantized: its backbone cannot be bundled; give it a source")
    alone = replace(spec, source=bundle(name), revision=None, prefix=None, config_key=None, config=None)
    recorded = recorded_dtype(spec)
    if spec.weights_hash in (None, tensors_hash(tensors, None if now == recorded else recorded)):
        return alone
    if not _is_nowhere_else(name, spec):
        raise ValueError(
            f"tower {name!r}: its weights ({dtype_name(now)}) are not those of {spec.source!r} that the zips were made "
            f"with ({dtype_name(recorded)}), so they are not bundled; load the model anew, without dtype="
        )
    return replace(
        alone, weights_hash=tensors_hash(tensors), backbone={**(spec.backbone or {}), "dtype": dtype_name(now)}
    )


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], fingerprint: str, fill: Callable[[Path], None], overwrite: bool
) -> None:
    """Put a checkpoint into a folder, whole or not at all. Other files there are left alone; one that is in the way is
    replaced only with `overwrite`.

    Args:
        folder: made if missing. tensors: the weights. fingerprint: of the config they belong to, kept beside them.
        fill: writes `config.json` and whatever else belongs to it into a folder. overwrite: replace what is there.

    Raises:
        ValueError: if a checkpoint or another file that it needs is there already, or the folder cannot be written.
    """
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise ValueError(f"{folder} already holds a checkpoint; pass overwrite=True to replace it")
    with files_into(folder, last=CONFIG_FILE, overwrite=overwrite) as new:
        # One entry only: safetensors writes several in no fixed order, and the same model shall give the same bytes.
        stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(stored, new / WEIGHTS_FILE, metadata={"config": fingerprint})
        fill(new)


def bundle(name: str) -> str:
    """Where a checkpoint keeps a frozen tower of its own; also that tower's source in the config."""
    return f"towers/{name}"


def _is_nowhere_else(name: str, spec: TowerSpec) -> bool:
    return spec.source in ("", bundle(name))


def load(
    cls: type[M],
    source: str | Path,
    *args: Any,
    towers: Mapping[str, str | Path | PreTrainedModel] | None = None,
    codecs: Mapping[str, Codec] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> M:
    """Load a checkpoint and the backbones it names.

    Args:
        source: folder or Hub id.
        towers: where to take a backbone from instead of the recorded place; it must be the same backbone.
        codecs: by tower, to take in place of the stored ones, such as those of a class that only you have.
        revision: of the checkpoint itself.
        trust_remote_code: let towers that have code of their own run it. What the checkpoint's config says of that does
            not count, also in a folder: whoever wrote it may be anybody.
        args, kwargs: `dtype` of the backbones (or `torch_dtype`) and `device_map`, each one for all, or some by tower;
            `attn_implementation` of every tower and of the zips; `config`, in place of the checkpoint's; `cache_dir`,
            `token`, `local_files_only`, `force_download`. See `zipper_lm.utils.arguments.Loading`.

    Raises:
        ValueError: for any other argument of transformers' loaders; if a backbone cannot be had at the recorded
            revision, or differs in config or weights from the one the zips were trained on, if one with code of its own
            is not trusted, or tensors are missing, unknown or of the wrong shape.
    """
    where = f"{cls.__name__}.from_pretrained"
    how = Loading.of(where, args, kwargs, towers=True)
    hub = dict(how.hub or {})
    folder = local_folder(source, revision, **hub)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{source}: no {CONFIG_FILE} there")
    written = read_config(folder)
    config = how.merge(where, written, CONFIG_FIELDS)
    for each in (written, config):
        check_trust(each, source, trust_remote_code)
        check_checkpoint(each, folder / WEIGHTS_FILE)
    if unknown := sorted(set(towers or {}) - set(config.towers)):
        raise ValueError(f"towers= names {unknown}, but the checkpoint has {list(config.towers)}")
    check_devices(where, how.apart or {}, list(config.towers))
    if unknown := sorted(set(how.dtypes or {}) - set(config.towers)):
        raise ValueError(f"{where}: dtype names {unknown}, but the towers are {list(config.towers)}")
    backbones: dict[str, PreTrainedModel] = {}
    there: list[str] = []
    for name, spec in config.tower_specs.items():
        given, dtype = (towers or {}).get(name), how.dtype_for(name)
        if not isinstance(given, (str, Path, NoneType)):
            check_decoder(f"towers= for {name!r}", given)
        if spec.train == "full" and given is None:
            made = partial(build_backbone, config, name, dtype, blank=True, trust_remote_code=trust_remote_code, **hub)
            backbones[name] = _fetched(name, spec, made)
            # At once, because a tower is tried when it is made of its backbone.
            stored = {_start(name) + k: v for k, v in without_aliases(backbones[name].state_dict()).items()}
            copy_tensors(stored, config.fingerprint, folder / WEIGHTS_FILE, under=_start(name))
            there.append(_start(name))
            continue
        if spec.train == "full" and isinstance(given, PreTrainedModel):
            raise ValueError(f"towers= gives a model for {name!r}, which was trained: its weights would be overwritten")
        if given is None and spec.source == bundle(name):
            given = folder / spec.source
        seen: FilesSeen | None = None
        if isinstance(given, PreTrainedModel):
            backbones[name] = given
        else:
            at = spec if given is None else replace(spec, source=str(given), revision=None)
            seen = _fetched(name, spec, partial(weights_seen, at, **hub))
            backbones[name] = _fetched(name, spec, partial(load_backbone, at, dtype=recorded_dtype(spec), **hub))
        check_same_backbone(name, spec, backbones[name], seen)
        if isinstance(given, str | Path) and spec.source != bundle(name):  # a later save names the new place
            place = place_of(given)
            config.towers[name] |= {"source": place, "revision": commit_of(place, None, hub.get("cache_dir"))}
        if dtype not in (None, backbones[name].dtype) and not isinstance(given, PreTrainedModel):
            backbones[name] = load_backbone(at, dtype=dtype, **hub)  # `.to(dtype)` would round its float32 buffers too
    model = cls(config, {name: how.place(backbone, name) for name, backbone in backbones.items()})
    copy_tensors(split(model), config.fingerprint, folder / WEIGHTS_FILE, apart=there)
    if (folder / "processor_config.json").is_file():
        model.processor = ZipperProcessor.from_pretrained(
            folder, codecs=codecs, trust_remote_code=trust_remote_code, **hub
        )
    model.generation_settings = generation_settings(folder)
    return how.settle(model, written)


def read_config(folder: Path) -> ZipperConfig:
    """The config of a checkpoint.

    Raises:
        ValueError: if there is none, or it is another model's, or damaged.
    """
    file = folder / CONFIG_FILE
    kind = read_mapping(file).get("model_type")
    if kind != ZipperConfig.model_type:
        raise ValueError(f"{file}: holds no zipped model: its model_type is {kind!r}, not {ZipperConfig.model_type!r}")
    try:
        return ZipperConfig.from_pretrained(folder)
    except Exception as error:  # transformers checks the fields of every config in its own ways
        raise ValueError(f"{file}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _fetched(name: str, spec: TowerSpec, load: Callable[[], T]) -> T:
    """A tower's backbone, or what else is got from where it is, or an error that names the tower and says how to go
    on."""
    try:
        return load()
    except ValueError as error:
        raise ValueError(
            f"tower {name!r}: {error}; if the same backbone is elsewhere, pass towers={{{name!r}: PATH}} "
            f"(in a recipe with start: towers.{name}.source=PATH)"
        ) from error


def load_own(model: ZippedTowers, file: Path) -> None:
    """Copy the tensors of a checkpoint that this model wrote back into it; see `copy_tensors`. Of one that is spread
    over processes each takes its shard."""
    reshard(model)
    bundled = {n: base_tensors(model.tower(n)) for n in _bundled(model)}
    if is_sharded(model):
        bundled = {name: whole_tensors(tensors, keep=True) for name, tensors in bundled.items()}
    copy_tensors(split(model), _as_saved(model, bundled).fingerprint, file)


def is_of(folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds the weights of a model with this config."""
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
            return (stored.metadata() or {}).get("config") == fingerprint
    except Exception:  # nothing there, or nothing of ours: safetensors' own errors have no common base
        return False


def copy_tensors(
    own: Mapping[str, Tensor], fingerprint: str, file: Path, *, under: str = "", apart: Collection[str] = ()
) -> None:
    """Copy a checkpoint's tensors into a model's own, after checking that they are exactly the ones it needs.

    Args:
        own: by name, the tensors to write to. fingerprint: of the model's config. file: the checkpoint's.
        under: what the names begin with, to be checked and copied. apart: beginnings of names that are passed over.

    Raises:
        ValueError: if a tensor is missing, unknown or of the wrong shape, the config was changed, or the file damaged.
    """

    def asked(names: Iterable[str]) -> set[str]:
        return {name for name in names if name.startswith(under) and not name.startswith(tuple(apart))}

    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("config") not in (None, fingerprint):
                raise ValueError(f"{file}: {CONFIG_FILE} was changed since these weights were saved")
            names, needed = asked(stored.keys()), asked(own)
            missing, extra = sorted(needed - names), sorted(names - needed)
            if missing or extra:
                raise ValueError(
                    f"{file}: missing tensors {missing[:5]} ({len(missing)}), unknown {extra[:5]} ({len(extra)})"
                )
            for name in sorted(names):
                shape = tuple(stored.get_slice(name).get_shape())
                if shape != tuple(own[name].shape):
                    raise ValueError(f"{file}: {name} is {list(shape)}, the model needs {list(own[name].shape)}")
            with torch.no_grad():
                for name in sorted(names):
                    fill(own[name], stored.get_tensor(name))
    except ValueError:
        raise
    except Exception as error:  # safetensors' own errors have no common base
        raise ValueError(f"{file}: cannot be read: {error}") from error

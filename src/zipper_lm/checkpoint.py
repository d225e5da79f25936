"""Checkpoints: fuse, split, save, load. What is new and what was there are told apart by module ownership.

A checkpoint is a folder: `config.json`, one `model.safetensors` with the new weights (zips, projections, handover,
adapters, and every tower that was trained), and the codecs. Frozen backbones are named by id, revision, config hash and
weights hash, and never stored, unless asked for. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from huggingface_hub import CommitInfo, HfApi, snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from zipper_lm.config import TowerSpec, ZipperConfig, ZipSpec, config_hash, expand, plain
from zipper_lm.modality.codec import CODEC_FILE, Codec, load_codec
from zipper_lm.tower import Tower

if TYPE_CHECKING:
    from zipper_lm.model import ZipperModel
    from zipper_lm.processor import ZipperProcessor

M = TypeVar("M", bound="ZipperModel")
logger = logging.getLogger(__name__)
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
AUTO_ARGUMENTS = ("config", "trust_remote_code", "adapter_kwargs", "_from_auto", "_commit_hash")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
HUB_ARGUMENTS = ("cache_dir", "token", "local_files_only", "force_download")


# --- backbones -------------------------------------------------------------------------------------------------------


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _class_of(config: PreTrainedConfig, spec: TowerSpec) -> Any:
    """The class that loads a backbone: the causal-LM map, else the class that the checkpoint itself names."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or spec.trust_remote_code:
        return AutoModelForCausalLM
    for name in [spec.architecture, *(getattr(config, "architectures", None) or [])]:
        if found := getattr(transformers, name, None) if name else None:
            return found
    raise ValueError(
        f"tower {spec.source!r}: {type(config).__name__} has no causal-LM class in transformers and its config names "
        "no other; a model with code of its own needs trust_remote_code=True"
    )


def load_backbone(spec: TowerSpec, *, dtype: Any = None, **hub: Any) -> PreTrainedModel:
    """Load one backbone from a path or the Hub, in evaluation mode.

    Raises:
        ValueError: if it is not there, cannot be reached, or has no known class.
    """
    common = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code, **hub}
    try:
        config = AutoConfig.from_pretrained(spec.source, **common)
        kwargs = {**common, **({"dtype": dtype} if dtype is not None else {})}
        return _class_of(config, spec).from_pretrained(spec.source, config=config, **kwargs).eval()
    except OSError as error:
        raise ValueError(f"tower {spec.source!r}: cannot be loaded: {error}") from error


def build_backbone(config: ZipperConfig, name: str, **hub: Any) -> PreTrainedModel:
    """A backbone with random weights from its recorded config."""
    spec = config.tower_specs[name]
    if spec.trust_remote_code:  # its code is where its weights are
        return load_backbone(spec, **hub)
    backbone = config.backbone_config(name)
    owner = _class_of(backbone, spec)
    model = owner.from_config(backbone) if owner is AutoModelForCausalLM else owner(backbone)
    return model.to(_recorded_dtype(spec))


def set_training(tower: Tower, spec: TowerSpec) -> None:
    """Freeze a tower, train it, or give it LoRA adapters (arXiv 2106.09685, through PEFT)."""
    tower.adapter_names = frozenset()
    tower.backbone.requires_grad_(spec.train == "full")
    if spec.train == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        before = {id(p) for p in tower.backbone.parameters()}
        inject_adapter_in_model(LoraConfig(**{"target_modules": "all-linear", **(spec.lora or {})}), tower.backbone)
        added = {n for n, p in tower.backbone.named_parameters() if id(p) not in before}
        for name, parameter in tower.backbone.named_parameters():
            parameter.requires_grad_(name in added)
        tower.adapter_names = frozenset(added)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's tensors, as hex. A tied tensor counts once."""
    digest = hashlib.sha256()
    for name, tensor in _without_aliases(module.state_dict()).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sorted by name; of tensors that share their memory (tied embeddings) only the first."""
    seen: set[tuple[int, int]] = set()
    kept = {}
    for name in sorted(tensors):
        key = (tensors[name].data_ptr(), tensors[name].numel())
        if key not in seen or tensors[name].numel() == 0:
            kept[name] = tensors[name]
        seen.add(key)
    return kept


def _revision(spec: TowerSpec, **hub: Any) -> str | None:
    """The commit a Hub id was loaded at, read off the cache; a local folder has none."""
    if Path(spec.source).is_dir():
        return None
    path = try_to_load_from_cache(
        spec.source, CONFIG_FILE, revision=spec.revision or "main", cache_dir=hub.get("cache_dir")
    )
    return Path(path).parent.name if isinstance(path, str) else spec.revision


# --- fuse ------------------------------------------------------------------------------------------------------------


def fuse(
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
        towers: by name: Hub id, path, a loaded model, or a `TowerSpec` for more settings.
        codecs: by name: a codec or its folder. Where none is given: the backbone's own `codec.json`, else its
            tokenizer, else the tower takes ids only.
        zips: which tower reads which, and how; `None` is all pairs, four layers evenly spaced.
        train: by name, ``"frozen"`` (default), ``"full"`` or ``"lora"``.
        loss_weights, handover_weight: see `ZipperConfig`.
        dtype: of the backbones; `None` takes the checkpoint's. New weights have torch's default dtype.
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
    for name, given in towers.items():
        if isinstance(given, PreTrainedModel):
            spec, backbone = TowerSpec(source=given.name_or_path or ""), given
        else:
            spec = given if isinstance(given, TowerSpec) else TowerSpec(source=str(given))
            backbone = load_backbone(spec, dtype=dtype, **hub)
        if train and name in train:
            spec = replace(spec, train=train[name])  # type: ignore[arg-type]
        codec = _codec(spec, (codecs or {}).get(name), **hub)
        if codec is not None:
            found[name] = codec
        specs[name] = _describe(name, spec, backbone, codec, **hub)
        backbones[name] = backbone
    if len({id(b) for b in backbones.values()}) < len(backbones):
        raise ValueError(f"fuse: two of the towers {list(backbones)} are one and the same model; load it twice")
    depths = {n: Tower(b, n, specs[n].layers).depth for n, b in backbones.items()}
    chosen = [zips] if isinstance(zips, ZipSpec) else list(zips) if zips is not None else [ZipSpec()]
    config = ZipperConfig(
        towers=specs,
        zips=expand(chosen, depths),
        loss_weights=dict(loss_weights or {}),
        handover_weight=handover_weight,
    )
    model = cls(config, backbones)
    from zipper_lm.processor import ZipperProcessor

    model.processor = ZipperProcessor(found, model.specials)
    return model.eval()


def _check_names(names: Sequence[str]) -> None:
    folded: dict[str, str] = {}
    for name in names:
        if not name.isidentifier() or hasattr(nn.ModuleDict, name) or name in ("auto", "handover"):
            raise ValueError(f"tower name {name!r} cannot be used: it must be a plain word of its own")
        if (other := folded.setdefault(name.lower(), name)) != name:
            raise ValueError(f"tower names {other!r} and {name!r} clash: they differ in case only")


def _codec(spec: TowerSpec, given: Codec | str | Path | None, **hub: Any) -> Codec | None:
    from zipper_lm.modality.text import TextCodec

    if isinstance(given, (str, Path)):
        return load_codec(given)
    if given is not None:
        return given
    if not spec.source:
        return None
    at = {"revision": spec.revision, **hub}
    if _has(spec.source, CODEC_FILE, **at):
        return load_codec(local_folder(spec.source, **at))
    if not any(_has(spec.source, file, **at) for file in TOKENIZER_FILES):
        return None  # transformers would make an empty tokenizer up
    try:
        return TextCodec.from_pretrained(spec.source, trust_remote_code=spec.trust_remote_code, **at)
    except (OSError, ValueError, KeyError):
        return None  # a tower without a tokenizer takes ids


def _has(source: str, file: str, **at: Any) -> bool:
    return bool(cached_file(source, file, _raise_exceptions_for_missing_entries=False, **at))


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
    embedding: Any = backbone.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    if codec is not None and codec.vocab_size > size:
        raise ValueError(f"tower {name!r}: the codec has {codec.vocab_size} ids, the backbone's vocabulary only {size}")
    return replace(
        spec,
        source=str(Path(spec.source).resolve()) if spec.source and Path(spec.source).is_dir() else spec.source,
        revision=_revision(spec, **hub) if spec.source else None,
        architecture=type(backbone).__name__,
        backbone=plain({**config.to_dict(), "dtype": _dtype_name(backbone.dtype)}),
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        weights_hash=weights_hash(backbone),
    )


# --- split, save, load -----------------------------------------------------------------------------------------------


def split(model: ZipperModel) -> dict[str, Tensor]:
    """The tensors that are the model's own: everything outside the towers, adapters, and whole trained towers."""
    own: dict[str, Tensor] = {}
    for child_name, child in model.named_children():
        if child is not model.towers:
            own |= {f"{child_name}.{k}": v for k, v in child.state_dict().items()}
    own |= dict(model.named_parameters(recurse=False))
    for name, spec in model.config.tower_specs.items():
        tower = model.tower(name)
        state = _without_aliases(tower.backbone.state_dict())
        kept = state if spec.train == "full" else {k: v for k, v in state.items() if k in tower.adapter_names}
        own |= {f"towers.{name}.backbone.{k}": v for k, v in kept.items()}
    return own


def save(
    model: ZipperModel,
    save_directory: str | Path,
    *,
    overwrite: bool = False,
    bundle_towers: bool = False,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        model: the model; its processor is written beside it if there is one.
        save_directory: a folder; made if missing. Other files in it are left alone.
        overwrite: replace a checkpoint that is there.
        bundle_towers: also store the frozen backbones, under ``towers/``; always done for towers that have no source
            of their own.
        push_to_hub: upload the checkpoint afterwards (`repo_id` and other arguments of `push` in kwargs).

    Raises:
        ValueError: if a checkpoint is there already, or the folder cannot be written.
    """
    folder = Path(save_directory)
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise ValueError(f"{folder} already holds a checkpoint; pass overwrite=True to replace it")
    specs = model.config.tower_specs
    bundled = [n for n, s in specs.items() if s.train != "full" and (bundle_towers or s.source in ("", _bundle(n)))]
    for name in bundled:
        if specs[name].train == "lora":
            raise ValueError(f"tower {name!r} has adapters: its backbone cannot be bundled; give it a source")
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}") from error
    try:
        config = ZipperConfig.from_dict(model.config.to_dict())
        config.architectures = [type(model).__name__]
        for name in bundled:
            model.tower(name).backbone.save_pretrained(staging / "new" / _bundle(name))
            config.towers[name] = asdict(replace(specs[name], source=_bundle(name), revision=None))
        (staging / "new").mkdir(exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in split(model).items()}
        # One entry only: safetensors writes several in no fixed order, and the same model shall give the same bytes.
        save_file(tensors, staging / "new" / WEIGHTS_FILE, metadata={"config": config.fingerprint})
        config.save_pretrained(staging / "new")
        if model.processor is not None:
            model.processor.save_pretrained(staging / "new")
        _move_in(staging / "new", folder, staging / "old")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # folders that were there before, or hold something, stay
            for path in made:
                path.rmdir()
        raise
    shutil.rmtree(staging, ignore_errors=True)
    if push_to_hub:
        push(model, kwargs.pop("repo_id", folder.name), **kwargs)


def _bundle(name: str) -> str:
    """Where a checkpoint keeps a frozen tower of its own; also that tower's source in the config."""
    return f"towers/{name}"


def _move_in(new: Path, folder: Path, old: Path) -> None:
    """Rename files into place, config last; if one cannot be, put all back as they were."""
    files = sorted((p for p in new.rglob("*") if p.is_file()), key=lambda p: p == new / CONFIG_FILE)
    names = [file.relative_to(new) for file in files]
    for file in files:
        with file.open("rb") as written:
            os.fsync(written.fileno())  # some file systems tell only now that the disk is full
    done: list[Path] = []
    try:
        for name in names:
            done.append(name)
            for path in (folder / name, old / name):
                path.parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                os.replace(folder / name, old / name)
            os.replace(new / name, folder / name)
    except BaseException:
        for name in done:
            if (old / name).exists():
                os.rename(old / name, folder / name)
            elif not (new / name).exists():
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                for parent in name.parents:
                    (folder / parent).rmdir()
        raise


def push(
    model: ZipperModel,
    repo_id: str,
    *,
    commit_message: str = "Upload ZipperModel",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    bundle_towers: bool = False,
) -> CommitInfo:
    """Upload a checkpoint to the Hub. Frozen towers that live in a local folder go with it, others stay named by id.

    Raises:
        ValueError: as `save`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        local = [n for n, s in model.config.tower_specs.items() if s.source and Path(s.source).is_absolute()]
        save(model, temporary, bundle_towers=bundle_towers or bool(local))
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=temporary,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def local_folder(source: str | Path, revision: str | None = None, **hub: Any) -> Path:
    """A checkpoint's folder on disk; a Hub id is fetched (or found in the cache) first.

    Raises:
        ValueError: if it is neither a folder nor reachable.
    """
    if Path(source).is_dir():
        return Path(source)
    known = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS}
    try:
        return Path(snapshot_download(str(source), revision=revision, **known))
    except Exception as error:
        raise ValueError(f"{source}: no such folder, and the Hub gave: {error}") from error


def load(
    cls: type[M],
    source: str | Path,
    *_: Any,
    towers: Mapping[str, str | Path | PreTrainedModel] | None = None,
    revision: str | None = None,
    dtype: Any = None,
    **kwargs: Any,
) -> M:
    """Load a checkpoint and the backbones it names.

    Args:
        source: folder or Hub id.
        towers: where to take a backbone from instead of the recorded place; it must be the same backbone.
        revision: of the checkpoint itself.
        dtype: of the backbones.
        kwargs: `cache_dir`, `token`, `local_files_only`.

    Raises:
        ValueError: if a backbone differs in config or weights from the one the zips were trained on, or tensors are
            missing, unknown or of the wrong shape.
    """
    hub = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS}
    if ignored := sorted(set(kwargs) - set(hub) - set(AUTO_ARGUMENTS)):
        logger.warning("ZipperModel.from_pretrained: %s have no effect", ignored)
    folder = local_folder(source, revision, **hub)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{source}: no {CONFIG_FILE} there")
    config = ZipperConfig.from_pretrained(folder)
    if unknown := sorted(set(towers or {}) - set(config.towers)):
        raise ValueError(f"towers= names {unknown}, but the checkpoint has {list(config.towers)}")
    backbones: dict[str, PreTrainedModel] = {}
    for name, spec in config.tower_specs.items():
        given = (towers or {}).get(name)
        if spec.train == "full" and given is None:
            backbones[name] = build_backbone(config, name, **hub)
            continue
        if given is None and spec.source == _bundle(name):
            given = folder / spec.source
        if isinstance(given, PreTrainedModel):
            backbones[name] = given
        else:
            at = spec if given is None else replace(spec, source=str(given), revision=None)
            backbones[name] = load_backbone(at, dtype=_recorded_dtype(spec), **hub)
        check_same_backbone(name, spec, backbones[name])
        if dtype not in (None, "auto", backbones[name].dtype) and not isinstance(given, PreTrainedModel):
            backbones[name] = load_backbone(at, dtype=dtype, **hub)  # `.to(dtype)` would round its float32 buffers too
    model = cls(config, backbones)
    load_own(model, folder / WEIGHTS_FILE)
    if (folder / "processor_config.json").is_file():
        from zipper_lm.processor import ZipperProcessor

        model.processor = ZipperProcessor.from_pretrained(folder)
    return model.eval()


def _recorded_dtype(spec: TowerSpec) -> Any:
    return getattr(torch, (spec.backbone or {}).get("dtype") or "float32", None)


def check_same_backbone(name: str, spec: TowerSpec, backbone: PreTrainedModel) -> None:
    """Raise `ValueError` by name if `backbone` is not the one the checkpoint was made with."""
    theirs = plain(backbone.config.to_dict())
    # The recorded config as this version of transformers spells it: a later one may have more fields.
    ours = plain(type(backbone.config).from_dict(dict(spec.backbone or {})).to_dict())
    if config_hash(theirs) != config_hash(ours):
        changed = {k: (ours.get(k), theirs.get(k)) for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)}
        raise ValueError(f"tower {name!r}: the backbone's config differs from {spec.source!r} (was, is): {changed}")
    if backbone.dtype != _recorded_dtype(spec):
        logger.warning("tower %r: in another dtype than recorded, so its weights are not compared", name)
    elif spec.weights_hash and weights_hash(backbone) != spec.weights_hash:
        raise ValueError(f"tower {name!r}: same config but other weights than {spec.source!r} when the zips were made")


def load_own(model: ZipperModel, file: Path) -> None:
    """Copy a checkpoint's tensors into the model, after checking that they are exactly the ones it needs."""
    own = split(model)
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("config") not in (None, model.config.fingerprint):
                raise ValueError(f"{file}: {CONFIG_FILE} was changed since these weights were saved")
            names = set(stored.keys())
            missing, extra = sorted(set(own) - names), sorted(names - set(own))
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
                    own[name].copy_(stored.get_tensor(name))
    except ValueError:
        raise
    except Exception as error:  # safetensors' own errors have no common base
        raise ValueError(f"{file}: cannot be read: {error}") from error


def processor_of(model: ZipperModel) -> ZipperProcessor:
    """The model's processor. Raises `ValueError` if it has none."""
    if model.processor is None:
        raise ValueError("this model has no processor: give ids, or set model.processor")
    return model.processor

"""One backbone: load it, build it anew from its config, freeze or train it, tell whether it is the same as before."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.decoders import check_source
from zipper_lm.fusion.fields import plain
from zipper_lm.fusion.tower import Tower
from zipper_lm.fusion.tower_spec import TowerSpec, backbone_config, config_hash
from zipper_lm.utils.hub import commit_of, license_of, reaching
from zipper_lm.utils.known_hashes import FilesSeen
from zipper_lm.utils.places import place_of
from zipper_lm.utils.sizes import check_size, weight_files
from zipper_lm.utils.tensors import dtype_name, lacking_tensors, weights_hash

logger = logging.getLogger(__name__)
WRAPPED = ("base_layer", "original_module", "token_adapter")
"""What PEFT's wrappers call that which they wrap, or the wrapper of it."""


def _class_of(config: PreTrainedConfig, spec: TowerSpec) -> Any:
    """The class that loads a backbone: the causal-LM map, else the class that the checkpoint itself names."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or spec.trust_remote_code:
        return AutoModelForCausalLM
    for name in [spec.architecture, *(getattr(config, "architectures", None) or [])]:
        found = getattr(transformers, name, None) if isinstance(name, str) and name else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"tower {spec.source!r}: {type(config).__name__} has no causal-LM class in transformers and its config names "
        "no other; name one as architecture, or, for a model with code of its own, set trust_remote_code=True"
    )


def dtype_in_training(spec: TowerSpec) -> torch.dtype | None:
    """To load what is trained in full: float32, as small updates are lost in half precision; `None` if the spec's own
    `config` says which."""
    return None if {"dtype", "torch_dtype"} & (spec.config or {}).keys() else torch.float32


def load_backbone(spec: TowerSpec, *, dtype: Any = None, **hub: Any) -> PreTrainedModel:
    """Load one backbone from a path or the Hub, in evaluation mode.

    Raises:
        ValueError: if it is not there, cannot be reached, has no known class, or the checkpoint lacks some of its
            tensors.
    """
    with reaching("tower", spec.source, spec.revision):
        check_source(spec.source, revision=spec.revision, **hub)
    common = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code, **hub}
    config = source_config(spec, **hub)
    kwargs = {**common, **({"dtype": dtype} if dtype is not None else {})}
    if spec.prefix is not None:
        kwargs["key_mapping"] = {f"^{re.escape(spec.prefix)}": ""}
    if spec.quantization is not None:
        kwargs["quantization_config"] = quantization_config(spec.quantization)
    if config.model_type.startswith("zipper"):
        raise ValueError(
            f"tower {spec.source!r}: holds a fused model, no decoder; fuse its decoders, or combine models that share "
            "a frozen one (zipper combine)"
        )
    owner = _class_of(config, spec)
    if not spec.trust_remote_code:  # code of its own makes what it likes
        where = {"revision": spec.revision, **hub}
        with reaching("tower", spec.source, spec.revision):
            files = weight_files(spec.source, **where)
        quantized = spec.quantization is not None
        check_size(f"tower {spec.source!r}", config, files, lambda own: from_config(own, spec), quantized=quantized)
    with reaching("tower", spec.source, spec.revision):
        model, found = owner.from_pretrained(spec.source, config=config, output_loading_info=True, **kwargs)
    if lacking := lacking_tensors(found):
        raise ValueError(
            f"tower {spec.source!r}: the checkpoint lacks {len(lacking)} tensors of {type(model).__name__}, such as "
            f"{lacking[:3]}; it has {sorted(found['unexpected_keys'])[:3] or 'nothing else'} besides. A backbone "
            "inside a larger model needs prefix (and config_key)"
        )
    return model.eval()


def source_config(spec: TowerSpec, **hub: Any) -> PreTrainedConfig:
    """The config of a backbone where it comes from, with the spec's own fields set.

    Raises:
        ValueError: if it cannot be read, has nothing at `spec.config_key`, or refuses a field.
    """
    at = {"revision": spec.revision, **hub}
    with reaching("tower", spec.source, spec.revision):
        if spec.config_key is None:
            config = AutoConfig.from_pretrained(spec.source, trust_remote_code=spec.trust_remote_code, **at)
        else:
            whole, _ = PreTrainedConfig.get_config_dict(spec.source, **at)
    if spec.config_key is not None:
        parts = {k: v for k, v in whole.items() if isinstance(v, dict)}
        if spec.config_key not in parts:
            raise ValueError(
                f"tower {spec.source!r}: its config has no part {spec.config_key!r}; it has {sorted(parts)}"
            )
        config = backbone_config(f"tower {spec.source!r}", parts[spec.config_key])
    if unknown := sorted(k for k in spec.config or {} if not hasattr(config, k)):
        raise ValueError(f"tower {spec.source!r}: config names {unknown}, which {type(config).__name__} does not have")
    for name, value in (spec.config or {}).items():
        setattr(config, name, value)
    check_no_kernels(f"tower {spec.source!r}", config, spec.trust_remote_code)
    return config


def check_trust(config: ZipperConfig, source: str | Path, trust_remote_code: bool) -> None:
    """Raise `ValueError` if towers of a checkpoint want to run code and the caller did not allow it. What the config
    says of trust is only the wish of whoever wrote it, also where the checkpoint is a folder here: it may have come
    from anywhere.

    Args:
        config: the checkpoint's. source: where that is. trust_remote_code: the caller's own word.
    """
    if trust_remote_code:
        return
    for name, spec in config.tower_specs.items():
        if spec.trust_remote_code:
            raise ValueError(
                f"tower {name!r} of {source} runs code of its own, from {spec.source!r}: its config.json says "
                "trust_remote_code: true, which only you can allow; read that code, then pass trust_remote_code=True "
                "(--trust-remote-code on the command line), or, in a recipe with start, set "
                f"towers.{name}.trust_remote_code: true"
            )
    check_no_kernels(str(source), config, False)


def check_no_kernels(what: str, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raise `ValueError` if a config names an implementation of attention or experts by a Hub id and that is not
    trusted: transformers fetches such a kernel and runs it.

    Args:
        what: for the message. config: of a backbone, its parts are looked at too, or of a whole model.
    """
    if trust_remote_code:
        return
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(kernel := getattr(part, name, None)):
                raise ValueError(
                    f"{what}: its config names {kernel!r} as {name.removeprefix('_')}, which is code on the Hub: it "
                    "runs only with trust_remote_code"
                )


def quantization_config(fields: Mapping[str, Any]) -> Any:
    """transformers' own quantization config of a ``quant_method``.

    Raises:
        ValueError: for an unknown method or field, or if its package is not installed.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(dict(fields))
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"tower.quantization {dict(fields)}: {error}") from error


def build_backbone(
    config: ZipperConfig,
    name: str,
    dtype: torch.dtype | None = None,
    *,
    blank: bool = False,
    trust_remote_code: bool = False,
    **hub: Any,
) -> PreTrainedModel:
    """A backbone from its recorded config, in a dtype of its own or the recorded one: with random weights, or blank,
    for tensors that are put in next.

    Raises:
        ValueError: if it has code of its own, and `trust_remote_code` does not allow that; or is unknown.
    """
    spec = config.tower_specs[name]
    if spec.trust_remote_code:  # its code is where its weights are
        check_trust(config, "this config", trust_remote_code)
        return load_backbone(spec, dtype=dtype or recorded_dtype(spec), **hub)
    return (blank_backbone if blank else from_config)(config.backbone_config(name), spec, dtype)


def from_config(config: PreTrainedConfig, spec: TowerSpec, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A backbone with random weights, in a dtype, or that which its spec records.

    It is made in it, as `from_pretrained` does: ``.to(dtype)`` would round buffers too that are float32 there, such as
    the frequencies of rotary positions.
    """
    check_no_kernels(f"tower {spec.source!r}", config, False)
    owner, dtype = _class_of(config, spec), dtype or recorded_dtype(spec)
    if owner is not AutoModelForCausalLM:
        return owner._from_config(config, dtype=dtype)
    # Said outright: where it is not, transformers asks at the terminal. What has code of its own is not made here.
    return owner.from_config(config, dtype=dtype, trust_remote_code=False)


def blank_backbone(config: PreTrainedConfig, spec: TowerSpec, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """As `from_config`, in evaluation mode, and nothing is drawn: its tensors are zeros, for others to be copied there.

    Transformers' `from_pretrained` makes it, of a state dict. So tables that no checkpoint holds, and what a family
    keeps in float32, are as they were where the backbone was first loaded. Where not all tensors come that way, it is
    that of `from_config`.
    """
    try:
        with torch.device("meta"):
            like: Any = from_config(deepcopy(config), spec, dtype)
        named = like.state_dict(keep_vars=True)  # under all their names, as it is the family that knows its ties
        made = {id(each): torch.zeros(each.shape, dtype=each.dtype, device="cpu") for each in named.values()}
        zeros = {name: made[id(each)] for name, each in named.items()}
        blank, found = type(like).from_pretrained(
            None, config=config, state_dict=zeros, dtype=dtype or recorded_dtype(spec), output_loading_info=True
        )
        _check_blank(blank, found)
    except Exception as error:  # of classes that are not ours, each with its own kinds
        logger.debug("%s is drawn at random, then loaded: %s", type(config).__name__, error)
        return from_config(config, spec, dtype).eval()
    blank.name_or_path = blank.config.name_or_path = config.name_or_path  # else ``"None"``
    return blank


def _check_blank(blank: nn.Module, found: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a tensor was made otherwise than of the state dict, or not at all.

    Args:
        blank: the model. found: transformers' loading info.
    """
    stored = {tensor.data_ptr() for tensor in blank.state_dict().values()}
    odd = {fault: names for fault, names in found.items() if names}
    odd["elsewhere"] = [name for name, each in blank.named_parameters() if each.data_ptr() not in stored]
    odd["nowhere"] = [n for n, each in chain(blank.named_parameters(), blank.named_buffers()) if each.is_meta]
    if any(odd.values()):
        raise ValueError(str(odd))


def set_training(tower: Tower, spec: TowerSpec) -> None:
    """Freeze a tower, train it, or give it LoRA adapters (arXiv 2106.09685, through PEFT)."""
    tower.adapter_names = frozenset()
    tower.backbone.requires_grad_(spec.train == "full")
    if spec.train == "lora":
        tower.adapter_names = add_adapters(tower.backbone, spec.lora)


def check_freeze_state(tower: Tower, spec: TowerSpec) -> None:
    """Raise `ValueError` if parameters of a tower are trained that no checkpoint of its spec keeps."""
    if spec.train == "full":
        return
    trained = {name for name, parameter in tower.backbone.named_parameters() if parameter.requires_grad}
    if lost := sorted(trained - tower.adapter_names):
        raise ValueError(
            f"tower {tower.name!r} is {spec.train!r} by its config, which checkpoints keep, but {len(lost)} of its own "
            f"parameters are trained, such as {lost[0]}, and would not be saved: fuse it with train='full'"
        )


def add_adapters(backbone: PreTrainedModel, lora: Mapping[str, Any] | None) -> frozenset[str]:
    """Give a backbone LoRA adapters, and train nothing else. They are float32, whatever the backbone is.

    Args:
        backbone: changed in place. lora: arguments of `peft.LoraConfig`; by default every linear layer has an adapter.

    Returns:
        The names of the adapters' parameters.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    try:
        inject_adapter_in_model(lora_config(lora), backbone)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tower.lora {dict(lora or {})}: {str(error).splitlines()[0]}") from error
    cast_adapter_dtype(backbone, "default")  # PEFT's own models do so; injecting alone takes the backbone's dtype
    # Under all their names: of tied ones a checkpoint stores but one, and not the one that comes first here.
    named, around = list(backbone.named_parameters(remove_duplicate=False)), wrappers(backbone)
    added = frozenset(name for name, _ in named if _source_name(name, around) is None)
    for name, parameter in named:
        parameter.requires_grad_(name in added)
    return added


def lora_config(lora: Mapping[str, Any] | None) -> Any:
    """`peft.LoraConfig` of a tower's `lora`; by default every linear layer has an adapter."""
    from peft import LoraConfig

    given = deepcopy(dict(lora or {}))  # PEFT takes names out of the lists that it is given
    return LoraConfig(**{"target_modules": "all-linear", **given})


def base_tensors(tower: Tower, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A tower's tensors, or those of a `state` under the same names, by their source names, without what PEFT added."""
    state = dict(tower.backbone.state_dict() if state is None else state)
    if not tower.adapter_names:
        return state
    around = wrappers(tower.backbone)
    return {name: tensor for key, tensor in state.items() if (name := _source_name(key, around)) is not None}


def wrappers(backbone: nn.Module) -> dict[str, Any]:
    """The modules that PEFT put around others, under all their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = backbone.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))}


def _source_name(name: str, around: Collection[str]) -> str | None:
    """A tensor's name where nothing is wrapped; `None` if a wrapper holds it besides what it wraps."""
    parts = name.split(".")
    inside = [i for i in range(1, len(parts)) if ".".join(parts[:i]) in around]
    if any(parts[i] not in WRAPPED for i in inside):
        return None
    return ".".join(part for i, part in enumerate(parts) if i not in inside)


def came_from(spec: TowerSpec, backbone: PreTrainedModel, **hub: Any) -> TowerSpec:
    """The spec with where its backbone was read, at which commit, with which weights and under which licence.

    Args:
        spec: `source` and `revision` as they were asked for. backbone: as it was read. hub: for the Hub.
    """
    spec = replace(spec, weights_hash=weights_hash(backbone))
    if not spec.source:
        return replace(spec, revision=None)
    source = place_of(spec.source) if Path(spec.source).is_dir() else spec.source
    commit = commit_of(spec.source, spec.revision, hub.get("cache_dir"))
    license = license_of(spec.source, commit, **hub)
    return replace(spec, source=source, revision=commit, license=license)


def recorded_dtype(spec: TowerSpec) -> Any:
    return getattr(torch, (spec.backbone or {}).get("dtype") or "float32", None)


def weights_seen(spec: TowerSpec, **hub: Any) -> FilesSeen:
    """The files of weights of a backbone, as they are before it is loaded; none where something else decides, too, what
    is loaded: code of its own, or how it is quantized here.

    Raises:
        ValueError: if it cannot be reached.
    """
    if spec.trust_remote_code or spec.quantization is not None or hub.get("force_download"):
        return FilesSeen([])
    with reaching("tower", spec.source, spec.revision):
        return FilesSeen(weight_files(spec.source, revision=spec.revision, **hub))


def check_same_backbone(name: str, spec: TowerSpec, backbone: PreTrainedModel, seen: FilesSeen | None = None) -> None:
    """Raise `ValueError` by name if `backbone` is not the one the checkpoint was made with.

    One in a wider dtype than the recorded one is compared after rounding, which takes nothing from weights that were
    widened. One in a narrower dtype has lost what would be compared, so it is refused.

    Args:
        name: of the tower. spec: as recorded. backbone: to be compared. seen: the files that it was read from just now
            (`weights_seen`), of which the hash may be remembered; `None`: it is computed.
    """
    theirs = plain(backbone.config.to_dict())
    # The recorded config as this version of transformers spells it: a later one may have more fields.
    try:
        ours = plain(type(backbone.config).from_dict(dict(spec.backbone or {})).to_dict())
    except Exception as error:  # families check their fields each in its own way
        raise ValueError(
            f"tower {name!r}: its recorded config cannot be used: {' '.join(str(error).split())}"
        ) from error
    if config_hash(theirs) != config_hash(ours):
        changed = {k: (ours.get(k), theirs.get(k)) for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)}
        raise ValueError(f"tower {name!r}: the backbone's config differs from {spec.source!r} (was, is): {changed}")
    if not spec.weights_hash:
        return
    given, recorded = backbone.dtype, recorded_dtype(spec)
    if torch.promote_types(given, recorded) != given:
        raise ValueError(
            f"tower {name!r}: given in {dtype_name(given)}, too coarse to be compared with the {dtype_name(recorded)} "
            "weights that the zips were made with; give its folder or Hub id, and dtype= for what it shall become"
        )
    compared = None if given == recorded else recorded
    compute = partial(weights_hash, backbone, compared)
    if seen is None or getattr(backbone.config, "quantization_config", None) is not None:
        found = compute()
    else:
        where = [transformers.__version__, type(backbone).__qualname__, spec.prefix, spec.config_key]
        how = [*where, config_hash(theirs), str(given), str(compared)]
        found = seen.hash(how, spec.weights_hash, compute)
    if found != spec.weights_hash:
        raise ValueError(f"tower {name!r}: same config but other weights than {spec.source!r} when the zips were made")

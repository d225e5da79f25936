"""One backbone: load it, build it anew from its config, freeze or train it, tell whether it is the same as before."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
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

from zipper_lm.config import TowerSpec, ZipperConfig, config_hash, plain
from zipper_lm.hub import reaching
from zipper_lm.tower import Tower

logger = logging.getLogger(__name__)


def dtype_name(dtype: Any) -> str:
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
    with reaching("tower", spec.source, spec.revision):
        config = AutoConfig.from_pretrained(spec.source, **common)
    kwargs = {**common, **({"dtype": dtype} if dtype is not None else {})}
    owner = _class_of(config, spec)
    with reaching("tower", spec.source, spec.revision):
        return owner.from_pretrained(spec.source, config=config, **kwargs).eval()


def build_backbone(config: ZipperConfig, name: str, **hub: Any) -> PreTrainedModel:
    """A backbone with random weights from its recorded config."""
    spec = config.tower_specs[name]
    if spec.trust_remote_code:  # its code is where its weights are
        return load_backbone(spec, **hub)
    return from_config(config.backbone_config(name), spec)


def from_config(config: PreTrainedConfig, spec: TowerSpec) -> PreTrainedModel:
    """A backbone with random weights, in the dtype that its spec records."""
    owner = _class_of(config, spec)
    model = owner.from_config(config) if owner is AutoModelForCausalLM else owner(config)
    return model.to(recorded_dtype(spec))


def set_training(tower: Tower, spec: TowerSpec) -> None:
    """Freeze a tower, train it, or give it LoRA adapters (arXiv 2106.09685, through PEFT)."""
    tower.adapter_names = frozenset()
    tower.backbone.requires_grad_(spec.train == "full")
    if spec.train == "lora":
        tower.adapter_names = add_adapters(tower.backbone, spec.lora)


def add_adapters(backbone: PreTrainedModel, lora: Mapping[str, Any] | None) -> frozenset[str]:
    """Give a backbone LoRA adapters, and train nothing else.

    Args:
        backbone: changed in place. lora: arguments of `peft.LoraConfig`; by default every linear layer has an adapter.

    Returns:
        The names of the adapters' parameters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    before = {id(p) for p in backbone.parameters()}
    inject_adapter_in_model(LoraConfig(**{"target_modules": "all-linear", **(lora or {})}), backbone)
    added = frozenset(n for n, p in backbone.named_parameters() if id(p) not in before)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in added)
    return added


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's tensors, as hex. A tied tensor counts once."""
    digest = hashlib.sha256()
    for name, tensor in without_aliases(module.state_dict()).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sorted by name; of tensors that share their memory (tied embeddings) only the first."""
    seen: set[tuple[int, int]] = set()
    kept = {}
    for name in sorted(tensors):
        key = (tensors[name].data_ptr(), tensors[name].numel())
        if key not in seen or tensors[name].numel() == 0:
            kept[name] = tensors[name]
        seen.add(key)
    return kept


def recorded_dtype(spec: TowerSpec) -> Any:
    return getattr(torch, (spec.backbone or {}).get("dtype") or "float32", None)


def check_same_backbone(name: str, spec: TowerSpec, backbone: PreTrainedModel) -> None:
    """Raise `ValueError` by name if `backbone` is not the one the checkpoint was made with."""
    theirs = plain(backbone.config.to_dict())
    # The recorded config as this version of transformers spells it: a later one may have more fields.
    ours = plain(type(backbone.config).from_dict(dict(spec.backbone or {})).to_dict())
    if config_hash(theirs) != config_hash(ours):
        changed = {k: (ours.get(k), theirs.get(k)) for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)}
        raise ValueError(f"tower {name!r}: the backbone's config differs from {spec.source!r} (was, is): {changed}")
    if backbone.dtype != recorded_dtype(spec):
        logger.warning("tower %r: in another dtype than recorded, so its weights are not compared", name)
    elif spec.weights_hash and weights_hash(backbone) != spec.weights_hash:
        raise ValueError(f"tower {name!r}: same config but other weights than {spec.source!r} when the zips were made")

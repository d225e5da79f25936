"""A tower as data: where its backbone comes from, how it trains, and where its input projection stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig

from zipper_lm.fusion.fields import Stream, check_scale, config_fingerprint, one_of, without_sets
from zipper_lm.fusion.zip_spec import ZipSpec

InputProjectionForm = Literal["none", "residual", "paper"]
FirstZip = Literal["first_zip"]
Training = Literal["frozen", "full", "lora"]
LORA_STARTS = (True, False, "gaussian", "orthogonal")
"""How adapters may start (PEFT's `init_lora_weights`): such as leave the base weights alone and ask for no data."""

# Keys of a backbone's config that say where it came from or how it runs, not what it computes.
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map",
    "_attn_implementation_autoset", "attn_implementation",
}  # fmt: skip


@dataclass(kw_only=True)
class TowerSpec:
    """One tower, as recorded in the config.

    Args:
        source: Hub id or path of the backbone.
        revision: commit, tag or branch on the Hub.
        architecture: backbone class name, such as ``"LlamaForCausalLM"``.
        backbone: the backbone's own config as a dict.
        bos_token_id, eos_token_id, pad_token_id: what opens, ends and pads this tower's segments.
        train: ``"frozen"``, ``"full"`` or ``"lora"``.
        lora: arguments of `peft.LoraConfig` when train is ``"lora"``.
        input_projection: see `zipper_lm.fusion.zips.InputProjection`.
        input_projection_layer: index of the layer before which it stands, 0 to stand at the embeddings; ``"first_zip"``
            is the first layer at which the tower reads another one, and becomes its index when the model is fused.
        input_projection_scale: what a residual input projection adds is multiplied by this number; ``"stream"`` becomes
            the size of the tower's residual stream where it stands when the model is fused.
        layers: dotted name of the layer list where it is not found by itself.
        weights_hash: fingerprint of the source's tensors (see `zipper_lm.utils.tensors.weights_hash`).
        trust_remote_code: whether the backbone's own code from the Hub may run.
        prefix: what stands before the names of the backbone's tensors in its checkpoint, such as ``"lm."``, where it is
            part of a larger model.
        config_key: where in the checkpoint's ``config.json`` the backbone's own config is, such as ``"base_config"``.
        config: fields of the backbone's config to set otherwise than the checkpoint does.
        quantization: ``quant_method`` (``"bitsandbytes"``, ``"torchao"``, ...) and the further arguments of
            transformers' quantization config of that name; for frozen towers and LoRA.
        license: what the model card beside the source stated, such as ``"apache-2.0"``; `None` is unknown.
    """

    source: str
    revision: str | None = None
    architecture: str = ""
    backbone: dict[str, Any] | None = None
    bos_token_id: int = 0
    eos_token_id: int = 0
    pad_token_id: int = 0
    train: Training = "frozen"
    lora: dict[str, Any] | None = None
    input_projection: InputProjectionForm = "residual"
    input_projection_layer: int | FirstZip = 0
    input_projection_scale: float | Stream = 1.0
    layers: str | None = None
    weights_hash: str | None = None
    trust_remote_code: bool = False
    prefix: str | None = None
    config_key: str | None = None
    config: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        one_of("tower.train", self.train, Training)
        one_of("tower.input_projection", self.input_projection, InputProjectionForm)
        check_projection_layer(self.input_projection_layer)
        check_projection_scale(self.input_projection, self.input_projection_scale)
        check_lora(self.lora)
        self.lora = without_sets(self.lora)
        if self.quantization is not None and self.train == "full":
            raise ValueError(
                'tower.train="full" and tower.quantization: quantized weights cannot be trained; use "lora"'
            )

    @property
    def config_hash(self) -> str:
        """Fingerprint of the backbone's config: what shapes and computes, not where it came from."""
        return config_hash(self.backbone or {})


def check_projection_layer(layer: Any) -> None:
    """Raise `ValueError` for what is neither a layer's index nor ``"first_zip"``."""
    if layer != "first_zip" and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ValueError(f"tower.input_projection_layer must be 'first_zip' or a layer from 0 on, got {layer!r}")


def check_projection_scale(form: str, scale: Any) -> None:
    """Raise `ValueError` for a scale that is none, or that nothing is multiplied by."""
    check_scale("tower.input_projection_scale", scale)
    if form == "paper" and scale != 1:
        raise ValueError(
            f"tower.input_projection_scale={scale!r}: input_projection 'paper' adds nothing, so it has none"
        )


def place_projections(towers: Mapping[str, TowerSpec], zips: Sequence[ZipSpec]) -> dict[str, TowerSpec]:
    """Towers whose input projection stands before a layer with an index.

    Args:
        towers: by name. zips: with explicit layers.

    Raises:
        ValueError: if one is to stand at the first layer at which its tower reads, and the tower reads no other.
    """
    placed = dict(towers)
    for name, spec in towers.items():
        if spec.input_projection_layer != "first_zip":
            continue
        read = [
            layer for each in zips if each.reader == name and isinstance(each.layers, list) for layer in each.layers
        ]
        if not read:
            raise ValueError(
                f"tower {name!r}: input_projection_layer is 'first_zip', but no zip lets it read another tower; name a "
                "layer, or set input_projection to none"
            )
        placed[name] = replace(spec, input_projection_layer=min(read))
    return placed


def check_lora(lora: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` for arguments of `peft.LoraConfig` that a tower cannot have.

    Such as PiSSA move a part of the base weights into the adapters: what is frozen changes, and the adapters alone,
    which are all that is stored, mean nothing to the weights that the tower is loaded with.
    """
    if (bias := (lora or {}).get("bias", "none")) != "none":
        raise ValueError(f"tower.lora.bias must be 'none', got {bias!r}: the tower's own biases stay as they are")
    start = (lora or {}).get("init_lora_weights", True)
    if start not in LORA_STARTS:
        raise ValueError(
            f"tower.lora.init_lora_weights must be one of {list(LORA_STARTS)}, got {start!r}: the others change the "
            "frozen weights, or need data before training"
        )


def config_hash(backbone: dict[str, Any]) -> str:
    """SHA-256 of a backbone config's computing part, as hex."""
    return config_fingerprint({k: v for k, v in backbone.items() if k not in _INCIDENTAL})


def backbone_config(what: str, fields: dict[str, Any] | None) -> PreTrainedConfig:
    """A backbone's recorded config as its own class.

    Raises:
        ValueError: naming `what`, if its `model_type` is unknown.
    """
    fields = dict(fields or {})
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"config: {what} has a backbone of unknown model_type {kind!r}")
    try:
        return CONFIG_MAPPING[kind](**fields)
    except Exception as error:  # families check their fields each in its own way
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"config: {what}: its backbone's config cannot be used: {first}") from error

"""What a zipped model is made of, as data: towers, zips, and the `ZipperConfig` that holds both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cache
from itertools import permutations
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers import CONFIG_MAPPING, PreTrainedConfig

from zipper_lm.utils.arguments import refuse
from zipper_lm.utils.places import public

Positions = Literal["none", "sinusoid", "rotary"]
Projection = Literal["linear", "relu", "mlp"]
InputProjectionForm = Literal["none", "residual", "paper"]
FirstZip = Literal["first_zip"]
Stream = Literal["stream"]
Embeddings = Literal["embeddings"]
EMBEDDINGS = -1
"""In the place of a source's layer: what enters its first layer, before any projection."""
MOST_CONTEXT = 64
"""Neighbours on each side: a zip's first matrix grows with them."""
Training = Literal["frozen", "full", "lora"]
LORA_STARTS = (True, False, "gaussian", "orthogonal")
"""How adapters may start (PEFT's `init_lora_weights`): such as leave the base weights alone and ask for no data."""
S = TypeVar("S")


def _one_of(where: str, value: Any, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{where} must be one of {list(get_args(allowed))}, got {value!r}")


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int for index in value)


@dataclass(kw_only=True)
class ZipSpec:
    """One directed zip: how `reader` reads `source`. The default is all pairs, four layers evenly spaced.

    Args:
        reader, source: tower names; ``"*"`` stands for every tower.
        layers: how many layers of each tower, evenly spaced and ending at the last, or the reader's layers by index.
        source_layers: the source's layers, as many as `layers`; `None` means as many, evenly spaced. A state says what
            comes next; which token stands there is plain in the embeddings. ``"embeddings"`` reads those in the place
            of each layer, -1 in a list in the place of one.
        heads: attention heads; `None` means one per 64 of the reader's width, at least 4.
        feed_forward: whether a gated feed-forward follows (Flamingo's block, as in the paper).
        gate_start: start of the gates before tanh. At 0 (Flamingo) the output matrices start random, otherwise at zero:
            either way a fresh zip adds exactly nothing.
        positions: what tells the cross-attention where a token stands in its segment (DESIGN section 3).
        stretch: reader tokens per source token. Places of both are counted in tokens of the coarser stream, so that
            attention starts near the diagonal. `None` is 1; `zipper fuse` measures it on the aligned data.
        projection: from the source's width to the reader's: one matrix, the paper's relu(linear), or a 3-layer MLP.
        context: neighbours on each side that a token of the source offers its reader with itself, of its own segment.
        scale: what the zip adds is multiplied by this: a number, one for each layer, or ``"stream"``, which becomes the
            size of the reader's residual stream after each layer when the model is fused (`zipper_lm.fusion.stream`).
        dropout: on attention weights, in training.
        attention: name in transformers' attention interface, of a function that obeys a bool mask: ``"sdpa"``,
            ``"eager"``, or one that you registered there.
    """

    reader: str = "*"
    source: str = "*"
    layers: int | list[int] = 4
    source_layers: list[int] | Embeddings | None = None
    heads: int | None = None
    feed_forward: bool = False
    gate_start: float = 1.0
    positions: Positions = "sinusoid"
    stretch: float | None = None
    projection: Projection = "relu"
    context: int = 0
    scale: float | list[float] | Stream = 1.0
    dropout: float = 0.0
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        _one_of("zip.positions", self.positions, Positions)
        _one_of("zip.projection", self.projection, Projection)
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"zip.layers must be at least 1, got {self.layers}")
        if type(self.layers) is not int and not _are_layers(self.layers):
            raise ValueError(f"zip.layers must be a whole number, or a list of such, got {self.layers!r:.60}")
        if self.source_layers not in (None, "embeddings") and not _are_layers(self.source_layers):
            raise ValueError(
                f"zip.source_layers must be 'embeddings' or a list of whole numbers, got {self.source_layers!r:.60}"
            )
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"zip.heads must be at least 1, got {self.heads}")
        if self.stretch is not None and not self.stretch > 0:
            raise ValueError(f"zip.stretch must be above 0, got {self.stretch}")
        if type(self.context) is not int or not 0 <= self.context <= MOST_CONTEXT:
            raise ValueError(f"zip.context must be a whole number from 0 to {MOST_CONTEXT}, got {self.context!r:.60}")
        check_scale("zip.scale", self.scale)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"zip.dropout must be in [0, 1), got {self.dropout}")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Reader's layer and source's layer, of a zip with explicit layers."""
        assert isinstance(self.layers, list)
        assert isinstance(self.source_layers, list)
        return list(zip(self.layers, self.source_layers, strict=True))

    @property
    def scales(self) -> list[float]:
        """Of each layer, of a zip with explicit layers.

        Raises:
            ValueError: if they are not known yet.
        """
        assert isinstance(self.layers, list)
        if self.scale == "stream":
            raise ValueError(f"zip {self.reader}<-{self.source}: scale='stream': needs numbers here; see `fuse`")
        return self.scale if isinstance(self.scale, list) else [self.scale] * len(self.layers)

    def resolve(self, depths: dict[str, int]) -> ZipSpec:
        """This zip with explicit layer lists.

        Args:
            depths: number of layers of each tower.

        Raises:
            ValueError: naming a layer out of range, or lists of different length.
        """
        deep, source_deep = depths[self.reader], depths[self.source]
        name, given = f"zip {self.reader}<-{self.source}", self.source_layers
        if isinstance(self.layers, list):
            layers = list(self.layers)
        elif isinstance(given, list):
            layers = evenly_spaced(len(given), deep)
        else:
            layers = evenly_spaced(min(self.layers, deep, *([source_deep] if given is None else [])), deep)
        if given == "embeddings":
            source_layers = [EMBEDDINGS] * len(layers)
        elif given is not None:
            source_layers = list(given)
        else:
            if len(layers) > source_deep:
                raise ValueError(
                    f"{name}: {len(layers)} layers, but tower {self.source!r} has only {source_deep}; "
                    "name source_layers"
                )
            source_layers = evenly_spaced(len(layers), source_deep)
        for field, chosen, limit in (("layers", layers, deep), ("source_layers", source_layers, source_deep)):
            if outside := [i for i in chosen if not 0 <= i < limit and (i, field) != (EMBEDDINGS, "source_layers")]:
                raise ValueError(f"{name}: {field} {outside} out of range, the tower has layers 0 to {limit - 1}")
            if sorted(chosen) != list(chosen) or (field == "layers" and len(set(chosen)) != len(chosen)):
                raise ValueError(f"{name}: {field} must be in rising order without repeats, got {chosen}")
        if not layers or len(layers) != len(source_layers):
            raise ValueError(f"{name}: {len(layers)} layers but {len(source_layers)} source_layers")
        if isinstance(self.scale, list) and len(self.scale) != len(layers):
            raise ValueError(f"{name}: {len(layers)} layers but {len(self.scale)} numbers in scale")
        return replace(self, layers=layers, source_layers=source_layers)


def evenly_spaced(count: int, depth: int) -> list[int]:
    """`count` layer indices of `depth`, evenly spaced, the last layer among them."""
    return [round((k + 1) * depth / count) - 1 for k in range(count)]


def expand(specs: Sequence[ZipSpec], depths: dict[str, int]) -> list[ZipSpec]:
    """Every directed zip with explicit layers; a later spec replaces an earlier one for the same pair.

    Raises:
        ValueError: for an unknown tower, a tower reading itself, or zips that would wait for each other for ever.
    """
    names = list(depths)
    zips: dict[tuple[str, str], ZipSpec] = {}
    for spec in specs:
        for end, name in (("reader", spec.reader), ("source", spec.source)):
            if name != "*" and name not in names:
                raise ValueError(f"zip.{end} names tower {name!r}; the towers are {names}")
        if spec.reader == spec.source != "*":
            raise ValueError(f"zip.reader and zip.source are both {spec.reader!r}; a tower cannot read itself")
        for reader, source in permutations(names, 2):
            if spec.reader in ("*", reader) and spec.source in ("*", source):
                zips[reader, source] = replace(spec, reader=reader, source=source).resolve(depths)
    check_order(list(zips.values()), depths)
    return list(zips.values())


def check_order(zips: Sequence[ZipSpec], depths: dict[str, int]) -> None:
    """Play the towers' layers in lockstep on paper: a tower may leave layer l only when its sources are there."""
    reached = dict.fromkeys(depths, 0)  # index of the layer a tower stands at, having computed it
    moved = True
    while moved:
        moved = False
        for name, depth in depths.items():
            needs = [(z.source, m) for z in zips if z.reader == name for layer, m in z.pairs if layer == reached[name]]
            if reached[name] < depth and all(reached[s] >= m for s, m in needs):
                reached[name] += 1
                moved = True
    if stuck := {n: r for n, r in reached.items() if r < depths[n]}:
        raise ValueError(f"zip layers cross: towers wait for each other for ever at layers {stuck}")


def check_projection_layer(layer: Any) -> None:
    """Raise `ValueError` for what is neither a layer's index nor ``"first_zip"``."""
    if layer != "first_zip" and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ValueError(f"tower.input_projection_layer must be 'first_zip' or a layer from 0 on, got {layer!r}")


def check_scale(where: str, scale: Any) -> None:
    """Raise `ValueError` for what is neither ``"stream"``, nor a number above 0, nor, of a zip, a list of such."""
    numbers = scale if isinstance(scale, list) and where == "zip.scale" else [scale]
    if scale != "stream" and not (
        numbers and all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < inf for n in numbers)
    ):
        several = ", or a list of such" if where == "zip.scale" else ""
        raise ValueError(f"{where} must be 'stream' or a number above 0{several}, got {scale!r:.60}")


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
        _one_of("tower.train", self.train, Training)
        _one_of("tower.input_projection", self.input_projection, InputProjectionForm)
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


# Keys of a backbone's config that say where it came from or how it runs, not what it computes.
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map",
    "_attn_implementation_autoset", "attn_implementation",
}  # fmt: skip


def config_hash(backbone: dict[str, Any]) -> str:
    """SHA-256 of a backbone config's computing part, as hex."""
    return _hash({k: v for k, v in backbone.items() if k not in _INCIDENTAL})


def without_sets(value: Any) -> Any:
    """`value` with a sorted list for every set in it, which JSON has not and whose order changes."""
    if isinstance(value, Mapping):
        return {k: without_sets(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [without_sets(v) for v in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """`value` as it comes back from a JSON file: keys are strings, tuples are lists."""
    return json.loads(json.dumps(value, default=str))


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


def _hash(value: Any) -> str:
    """Of a path only the last part counts, as no more of it is uploaded."""
    return hashlib.sha256(json.dumps(public(plain(value)), sort_keys=True).encode()).hexdigest()


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a field's type."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or origin is Literal:  # what is allowed is said where the field is checked
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inside)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inside[0]) for each in value)
    return isinstance(value, origin or hint)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields. They are texts, and a config is asked for its specs by every document."""
    return get_type_hints(kind)


def typed(kind: type[S], what: str, fields: dict[str, Any]) -> S:
    """A dataclass of fields out of JSON.

    Raises:
        ValueError: naming `what` and a field that is unknown, missing, or of another type.
    """
    if unknown := sorted(set(fields) - {f.name for f in dataclass_fields(kind)}):  # type: ignore[arg-type]
        raise ValueError(f"config: {what} has unknown fields {unknown}")
    types: Any = kind  # a dataclass can be kept by, which mypy does not see
    hints = _hints(types)
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"config: {what}: {name} cannot be {type(value).__name__} {value!r:.60}")
    try:
        return kind(**fields)
    except TypeError as error:  # a field that has no default
        raise ValueError(f"config: {what}: {error}") from error


class Followed(PreTrainedConfig):
    """A config whose `from_pretrained` drops no argument."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of `PreTrainedConfig`.

        Raises:
            ValueError: for an argument that is neither a field nor for the Hub, unless ``return_unused_kwargs=True``.
        """
        found: Any = super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "return_unused_kwargs": True})
        config, unused = found
        if kwargs.get("return_unused_kwargs"):
            return config, unused
        refuse(f"{cls.__name__}.from_pretrained", unused, {})
        return config


class ZipperConfig(Followed):
    """Config of a `ZipperModel`: `towers` by name and directed `zips`, both also as typed specs.

    Args:
        towers: name to the fields of a `TowerSpec`.
        zips: fields of resolved `ZipSpec`s.
        loss_weights: weight of each modality's loss; missing ones count 1.
        handover_weight: weight of the loss that learns which modality speaks next (`schedule="auto"`); 0 where nobody
            has learned it.
        groups: where zips were trained apart (`zipper_lm.models.combine`): for each training, its towers and the form
            of their input projections. Empty: all were trained together, in the towers' own form.
    """

    model_type = "zipper"

    def __init__(
        self,
        towers: dict[str, Any] | None = None,
        zips: list[Any] | None = None,
        loss_weights: dict[str, float] | None = None,
        handover_weight: float = 0.1,
        groups: Sequence[dict[str, InputProjectionForm]] = (),
        **kwargs: Any,
    ) -> None:
        if not isinstance(towers or {}, Mapping) or not isinstance(zips or [], Sequence):
            raise ValueError("config: towers must be a mapping, zips a list")
        for name, value in (towers or {}).items():
            if not name.isidentifier():  # a folder is made of it on saving
                raise ValueError(f"config: {name!r} is no tower's name: it must be a plain word")
            if not isinstance(value, (TowerSpec, Mapping)):
                raise ValueError(f"config: tower {name!r} must be a mapping, got {value!r:.60}")
        if not isinstance(loss_weights or {}, Mapping) or not isinstance(groups or [], Sequence):
            raise ValueError("config: loss_weights must be a mapping, groups a list")
        if wrong := [group for group in groups or () if not isinstance(group, Mapping)]:
            raise ValueError(f"config: a group must be a mapping, got {wrong[0]!r:.60}")
        for weight in [*(loss_weights or {}).values(), handover_weight]:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError(f"config: a weight of a loss must be a number, got {weight!r:.60}")
        if wrong := [z for z in zips or [] if not isinstance(z, (ZipSpec, Mapping))]:
            raise ValueError(f"config: a zip must be a mapping, got {wrong[0]!r:.60}")
        # Sorted, as in the JSON file: the order of towers is the order of the handover's classes.
        named = sorted((towers or {}).items())
        self.towers = {n: asdict(t) if isinstance(t, TowerSpec) else dict(t) for n, t in named}
        self.zips = [asdict(z) if isinstance(z, ZipSpec) else dict(z) for z in zips or []]
        self.loss_weights = dict(loss_weights or {})
        self.handover_weight = handover_weight
        self.groups = [dict(group) for group in groups or ()]
        for group in self.groups:
            if unknown := sorted(set(group) - set(self.towers)):
                raise ValueError(f"config: a group names towers {unknown}; the towers are {list(self.towers)}")
        for name, weight in self.loss_weights.items():
            if name not in self.towers or weight < 0:
                raise ValueError(f"loss_weights[{name!r}]={weight}: needs a tower of {list(self.towers)} and >= 0")
        super().__init__(**kwargs)

    @property
    def tower_specs(self) -> dict[str, TowerSpec]:
        """The towers, typed."""
        return {name: typed(TowerSpec, f"tower {name!r}", fields) for name, fields in self.towers.items()}

    @property
    def zip_specs(self) -> list[ZipSpec]:
        """The directed zips, typed."""
        return [typed(ZipSpec, "zip", fields) for fields in self.zips]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what the weights mean: not where towers come from, nor losses and dropout."""
        free = (
            *("source", "revision", "backbone", "trust_remote_code", "license"),
            *("prefix", "config_key", "config", "quantization"),
        )
        towers = {n: {k: v for k, v in asdict(s).items() if k not in free} for n, s in self.tower_specs.items()}
        for fields in towers.values():
            for field, plain_value in (("input_projection_layer", 0), ("input_projection_scale", 1)):
                if fields[field] == plain_value:  # as of what was made before there was a choice
                    del fields[field]
        hashes = {n: s.config_hash for n, s in self.tower_specs.items()}
        zips = [{k: v for k, v in asdict(z).items() if k not in ("dropout", "attention")} for z in self.zip_specs]
        for fields in zips:
            if fields["scale"] == 1:
                del fields["scale"]
        return _hash([towers, hashes, zips, *([self.groups] if self.groups else [])])

    @property
    def projection_groups(self) -> list[dict[str, InputProjectionForm]]:
        """Form of each tower's input projection, for each training that the zips come from."""
        return self.groups or [{name: spec.input_projection for name, spec in self.tower_specs.items()}]

    def backbone_config(self, name: str) -> PreTrainedConfig:
        """The config of one tower's backbone, as its own class (remote-code families excepted: see `checkpoint`)."""
        return backbone_config(f"tower {name!r}", self.towers[name]["backbone"])

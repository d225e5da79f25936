"""Towers in lockstep, each reading the others through gated cross-attention: the network that `ZipperModel` is.

What is unusual here (arXiv 2405.18669, and `docs/concepts.md`):

- A tower is any Hugging Face decoder, run by its own family's `forward` (`tower.py`); this file holds no layer loop.
- Zips sit between the layers of several towers that advance together (`lockstep.py`, `reading.py`).
- Each tower keeps its own token stream. The document's order only decides what is visible across towers.
- Fusion weights live in their own tree (`zips`, `input_projections`, `handover`), apart from the backbones: what is
  new and what was there are told apart by ownership, never by name.
- A row that involves one tower only bypasses zips and projections: it is that backbone, bit for bit.
- Each segment is written by the tower's own `generate()` (`generation/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from zipper_lm.data.collation import Batch, Specials
from zipper_lm.fusion.backbones import build_backbone, check_freeze_state, set_training
from zipper_lm.fusion.causal import check_causal
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.document_model import DocumentModel
from zipper_lm.fusion.packing import check_packing
from zipper_lm.fusion.tower import Tower, rest_in_forward
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zips import Gate, InputProjection, ZipLayer, can_attend
from zipper_lm.utils.arguments import check_devices
from zipper_lm.utils.shards import whole

if TYPE_CHECKING:
    from zipper_lm.data.processor import ZipperProcessor


class ZippedTowers(DocumentModel):
    """Two or more decoders and the zips between them.

    Args:
        config: towers and zips.
        backbones: the pre-trained decoders by tower name; `None` builds them from the config with random weights.

    Raises:
        ValueError: if a backbone is missing, or a special id lies outside its tower's vocabulary.
    """

    config_class = ZipperConfig
    config: ZipperConfig
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ZipperConfig, backbones: Mapping[str, PreTrainedModel] | None = None) -> None:
        super().__init__(config)
        specs = config.tower_specs
        if backbones is None:
            backbones = {name: build_backbone(config, name) for name in specs}
        if missing := sorted(set(specs) - set(backbones)):
            raise ValueError(f"no backbone given for towers {missing}")
        self.towers = nn.ModuleDict()
        self.input_projections = nn.ModuleDict()
        self.handover = nn.ModuleDict()
        self.projection_keys: dict[str, list[tuple[str, list[int]]]] = {name: [] for name in specs}
        self._projection_layers: dict[str, int] = {}
        for name, spec in specs.items():
            check_causal(f"tower {name!r}", backbones[name])
            tower = Tower(backbones[name], name, spec.layers)
            set_training(tower, spec)
            self.towers[name] = tower
            _check_specials(tower, spec)
            self._projection_layers[name] = _placed(tower, spec)
            for group in config.projection_groups:
                if (form := group.get(name, "none")) != "none":
                    key = f"{name}@{len(self.projection_keys[name])}" if self.projection_keys[name] else name
                    scale = spec.input_projection_scale if form == "residual" else 1.0
                    if not isinstance(scale, (int, float)):
                        raise ValueError(
                            f"tower {name!r}: input_projection_scale={scale!r}: needs a number here; see `fuse`"
                        )
                    self.input_projections[key] = InputProjection(tower.hidden_size, form, scale)
                    self.projection_keys[name].append((key, [list(specs).index(member) for member in group]))
            head = nn.Linear(tower.hidden_size, len(specs) + 1)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.handover[name] = nn.Sequential(nn.LayerNorm(tower.hidden_size), head)
        self.handover_start = nn.Parameter(torch.zeros(len(specs) + 1))
        self.zips = nn.ModuleDict()
        self.layer_pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for zip_spec in config.zip_specs:
            reader, source = zip_spec.reader, zip_spec.source
            if not isinstance(zip_spec.layers, list) or not isinstance(zip_spec.source_layers, list):
                raise ValueError(
                    f"zip {reader}<-{source}: needs explicit layers and source_layers; see `config.expand`"
                )
            zip_spec.resolve({name: self.tower(name).depth for name in (reader, source)})
            self.layer_pairs[reader, source] = zip_spec.pairs
            width, source_width = self.tower(reader).hidden_size, self.tower(source).hidden_size
            layers = nn.ModuleList(ZipLayer(zip_spec, width, source_width, scale) for scale in zip_spec.scales)
            if reader not in self.zips:
                self.zips[reader] = nn.ModuleDict()
            self.zips[reader][source] = layers  # type: ignore[operator]
        self.processor: ZipperProcessor | None = None
        self.generation_settings: dict[str, dict[str, Any]] = {}
        self.all_tied_weights_keys: dict[str, str] = {}
        kinds = {type(layer).__name__ for name in specs for layer in self.tower(name).layers}
        self._no_split_modules = {*kinds, "ZipLayer", "InputProjection"}

    @classmethod
    def with_random_weights(cls, config: Any, dtype: torch.dtype | None, trust: bool = False) -> Self:
        """See `DocumentModel`."""
        backbones = {name: build_backbone(config, name, dtype, trust_remote_code=trust) for name in config.towers}
        return cls(config, backbones)

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Tower names, in the order of the handover's classes."""
        return list(self.config.towers)

    @property
    def specials(self) -> dict[str, Specials]:
        """Each tower's special ids."""
        towers = self.config.towers.items()  # not as typed specs: every request asks, and typing them takes longer
        keys = "bos_token_id", "eos_token_id", "pad_token_id"
        return {name: Specials(*(given.get(key, getattr(TowerSpec, key)) for key in keys)) for name, given in towers}

    def tower(self, name: str) -> Tower:
        """One tower. Raises `ValueError` for an unknown name."""
        if name not in self.towers:
            raise ValueError(f"unknown tower {name!r}; this model has {list(self.towers)}")
        tower = self.towers[name]
        assert isinstance(tower, Tower)
        return tower

    def zip_layer(self, reader: str, source: str, k: int) -> ZipLayer:
        """The k-th zip layer through which `reader` reads `source`."""
        zips: Any = self.zips
        return zips[reader][source][k]

    def set_stretch(self, reader: str, source: str, stretch: float) -> None:
        """Set how many of `reader`'s tokens one of `source`'s spans, in config and layers (see `ZipSpec.stretch`)."""
        for spec in self.config.zips:
            if (spec["reader"], spec["source"]) == (reader, source):
                spec["stretch"] = stretch
        for k in range(len(self.layer_pairs[reader, source])):
            self.zip_layer(reader, source, k).stretch = stretch

    def gates(self) -> dict[str, float]:
        """tanh of every gate, by ``reader<-source.k``, and ``....ff`` for feed-forward gates. Of a model that is spread
        over processes all of them ask."""

        def value(gate: Gate) -> float:
            return float(torch.tanh(whole(gate.weight.detach())))

        values: dict[str, float] = {}
        for (reader, source), pairs in self.layer_pairs.items():
            for k in range(len(pairs)):
                layer = self.zip_layer(reader, source, k)
                values[f"{reader}<-{source}.{k}"] = value(layer.gate)
                if layer.feed_forward is not None:
                    values[f"{reader}<-{source}.{k}.ff"] = value(layer.feed_forward_gate)
        return values

    def projection_layer(self, name: str) -> int | None:
        """The layer before which a tower's input projections stand, 0 for the embeddings; `None` if it has none."""
        return self._projection_layers[name] if self.projection_keys[name] else None

    def project_input(
        self,
        name: str,
        depth: int,
        hidden_states: Tensor,
        involved: Tensor,
        projections: Mapping[str, nn.Module] | None = None,
    ) -> Tensor:
        """A tower's input projection, for the rows that involve several towers; before any other layer than that at
        which it stands, nothing.

        Where zips were trained apart (`combine`), each training has a projection of its own, for rows that involve
        several of its towers; where several apply, what each adds is added.

        Args:
            depth: of the layer. hidden_states: ``[batch, time, hidden]`` before it. involved: bool ``[batch, towers]``.
            projections: others in place of the model's own, such as structural copies of them.
        """
        if depth != self._projection_layers[name]:
            return hidden_states
        involved, result, before = involved.to(hidden_states.device), hidden_states, None
        for key, members in self.projection_keys[name]:
            taking_part = torch.stack([involved[:, member] for member in members])  # a list as index would be sent
            rows = (taking_part.sum(0) > 1)[:, None, None]
            projected = (projections or self.input_projections)[key](hidden_states)
            if before is not None:
                projected = torch.where(before, result + (projected - hidden_states), projected)
            result = torch.where(rows, projected, result)
            before = rows if before is None else before | rows
        return result

    def handover_logits(self, name: str, finals: Tensor, stream: Mapping[str, Tensor]) -> Tensor:
        """Who speaks next, ``[batch, towers + 1]``, as said at the last EOS of `name` in each row.

        Args:
            finals: ``[batch, time, hidden]``, the tower's state after its last layer and zip.
            stream: the tower's batch; a row without this tower gives the state at its padding, not to be used.
        """
        order = torch.arange(finals.shape[1], device=finals.device)
        last = (stream["segments"].to(finals.device) >= 0).long() * order
        state = finals[torch.arange(len(finals), device=finals.device), last.argmax(1)]
        return self.handover_head(name, state)

    def handover_head(self, name: str, states: Tensor) -> Tensor:
        """Logits of who speaks next, ``[..., towers + 1]``, from states ``[..., hidden]`` at segments' ends."""
        head: Any = self.handover[name]
        return head(states.to(head[1].weight.dtype))

    def train(self, mode: bool = True) -> Self:
        """As usual, but a frozen tower stays in evaluation mode (no dropout)."""
        super().train(mode)
        for name, spec in self.config.tower_specs.items():
            if spec.train == "frozen":
                backbone = self.tower(name).backbone.eval()
                for layer in backbone.modules():  # layers checkpoint their activations in training mode only
                    if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                        layer.training = mode
                        rest_in_forward(layer)
        return self

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str], *args: Any, **kwargs: Any) -> None:
        """Choose how towers and zips attend from now on; it is not saved.

        Args:
            attn_implementation: a name of transformers' attention interface for all, or names by tower. Zips keep
                theirs where one is given by tower, or obeys no bool mask (flash and flex do not).
            args, kwargs: as of each backbone's own.

        Raises:
            ValueError: for an unknown tower, or what a tower cannot attend by.
        """
        everywhere = attn_implementation if isinstance(attn_implementation, str) else None
        by_tower: Any = attn_implementation if everywhere is None else dict.fromkeys(self.names, everywhere)
        for name in by_tower:  # all names before any change
            self.tower(name)
        for name, chosen in by_tower.items():
            self.tower(name).backbone.set_attn_implementation(chosen, *args, **kwargs)
        if everywhere is not None and can_attend(everywhere):
            for layer in self.zips.modules():
                if isinstance(layer, ZipLayer):
                    layer.attention = everywhere

    def backbones(self) -> dict[str, PreTrainedModel]:
        """The pre-trained decoders, by tower name."""
        return {name: self.tower(name).backbone for name in self.names}

    def depths(self) -> dict[str, int]:
        """Number of layer calls in one forward, by tower name."""
        return {name: self.tower(name).depth for name in self.names}

    def place(self, devices: Mapping[str, Any]) -> Self:
        """Put towers on devices of their own, each with what is new for it: the zips through which it reads, its input
        projections, its handover head. Only states that it reads cross, on their way into its memory. An optimizer is
        made afterwards.

        Args:
            devices: by tower; the others stay where they are. Each as `torch.device` takes it.

        Raises:
            ValueError: for an unknown tower, or what is no device that is here.
        """
        known = check_devices(f"{type(self).__name__}.place", devices, self.names)
        for name, device in known.items():
            keys = [key for key, _ in self.projection_keys[name]]
            parts = [self.tower(name), self.handover[name], *(self.input_projections[key] for key in keys)]
            for part in [*parts, *([self.zips[name]] if name in self.zips else [])]:
                part.to(device)
        start = self.handover_start
        first = start.detach().to(self.tower(self.names[0]).device)
        self.handover_start = nn.Parameter(first, requires_grad=start.requires_grad)
        return self

    @property
    def is_apart(self) -> bool:
        """Whether its towers are on several devices."""
        return len({self.tower(name).device for name in self.names}) > 1

    @property
    def hf_device_map(self) -> dict[str, str]:
        """Device by tower, of a model that `is_apart`; of another it is not there. By it Trainer and accelerate know
        that a model stays where it is."""
        if not self.is_apart:
            raise AttributeError("hf_device_map: all towers are on one device")
        return {f"towers.{name}": str(self.tower(name).device) for name in self.names}

    # --- what the trainer asks -----------------------------------------------------------------------------------

    def check_freeze_state(self) -> None:
        """Raise `ValueError` if what is trained is not what the config says, so that checkpoints would lose some."""
        for name, spec in self.config.tower_specs.items():
            check_freeze_state(self.tower(name), spec)

    def check_packing(self) -> None:
        """Raise `ValueError` if a tower does not read documents that share a row as each alone. It is tried."""
        for name in self.names:
            check_packing(f"tower {name!r}", self.tower(name).backbone, self.tower(name).interface)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """The towers' parameters, which have a learning rate of their own."""
        return list(self.towers.parameters())

    def trained_vocabularies(self) -> dict[str, int]:
        """Number of ids of every tower that is not frozen."""
        codecs = self.processor.codecs if self.processor is not None else {}
        return {
            name: codecs[name].vocab_size if name in codecs else self.tower(name).vocab_size
            for name, spec in self.config.tower_specs.items()
            if spec.train != "frozen"
        }

    def describe_training(self) -> str:
        """In words, how each tower is trained."""
        return ", ".join(f"{n} {s.train}" for n, s in self.config.tower_specs.items())

    def step_flops(self, batch: Batch) -> int:
        """About 6 per parameter and token, tower by tower (Kaplan et al. 2020, section 2.1); zips left out."""
        return sum(
            6 * stream["input_ids"].numel() * self.tower(name).backbone.num_parameters(exclude_embeddings=True)
            for name, stream in batch.items()
        )

    def check_ids(self, name: str, low: int, high: int) -> None:
        """Raise `ValueError` if ids from `low` to `high` are not all in a tower's vocabulary."""
        size = self.tower(name).vocab_size
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: token id {low if low < 0 else high} out of range, the tower has ids 0 to {size - 1}"
            )


def _placed(tower: Tower, spec: TowerSpec) -> int:
    layer = spec.input_projection_layer
    if not isinstance(layer, int):
        raise ValueError(f"tower {tower.name!r}: input_projection_layer={layer!r}: needs an index here; see `fuse`")
    if layer >= tower.depth:
        raise ValueError(
            f"tower {tower.name!r}: input_projection_layer={layer}, but it has layers 0 to {tower.depth - 1}"
        )
    return layer


def _check_specials(tower: Tower, spec: TowerSpec) -> None:
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not 0 <= (value := getattr(spec, field)) < tower.vocab_size:
            raise ValueError(f"tower {tower.name!r}: {field}={value}, but its ids are 0 to {tower.vocab_size - 1}")

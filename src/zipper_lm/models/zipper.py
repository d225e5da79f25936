"""ZipperModel: pre-trained decoders in lockstep, each reading the others through gated cross-attention.

What is unusual here (arXiv 2405.18669, and `docs/concepts.md`):

- A tower is any Hugging Face decoder, run by its own family's `forward` (`tower.py`); this file holds no layer loop.
- Zips sit between the layers of several towers that advance together (`lockstep.py`, `reading.py`).
- Each tower keeps its own token stream. The document's order only decides what is visible across towers.
- Fusion weights live in their own tree (`zips`, `input_projections`, `handover`), apart from the backbones: what is
  new and what was there are told apart by ownership, never by name.
- A row that involves one tower only bypasses zips and projections: it is that backbone, bit for bit.
- Each segment is written by the tower's own `generate()` (`generate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from zipper_lm.data.collation import IGNORED, Batch, Specials, TowerBatch, collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.fusion.backbones import build_backbone, set_training
from zipper_lm.fusion.config import TowerSpec, ZipperConfig, ZipSpec
from zipper_lm.fusion.groups import read_by_group
from zipper_lm.fusion.reading import read
from zipper_lm.fusion.tower import Tower, rest_in_forward
from zipper_lm.fusion.zips import InputProjection, ZipLayer
from zipper_lm.generation import generate
from zipper_lm.generation.segment import StreamedToken
from zipper_lm.models import assemble, checkpoint, sharing


@dataclass
class ZipperOutput(ModelOutput):
    """What `ZipperModel.forward` returns.

    Attributes:
        loss: weighted sum of `losses`, or `None` if the batch has no targets.
        losses: mean next-token cross-entropy per modality, and ``"handover"``.
        logits: per tower, ``[batch, time, vocab]``.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None


class ZipperModel(PreTrainedModel):
    """Two or more decoders fused by zips.

    Args:
        config: towers and zips.
        backbones: the pre-trained decoders by tower name; `None` builds them from the config with random weights.

    Raises:
        ValueError: if a backbone is missing, or a special id lies outside its tower's vocabulary.
    """

    config_class = ZipperConfig
    config: ZipperConfig
    base_model_prefix = ""
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
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
        for name, spec in specs.items():
            tower = Tower(backbones[name], name, spec.layers)
            set_training(tower, spec)
            self.towers[name] = tower
            _check_specials(tower, spec)
            for group in config.projection_groups:
                if (form := group.get(name, "none")) != "none":
                    key = f"{name}@{len(self.projection_keys[name])}" if self.projection_keys[name] else name
                    self.input_projections[key] = InputProjection(tower.hidden_size, form)
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
            if not isinstance(zip_spec.layers, list) or zip_spec.source_layers is None:
                raise ValueError(
                    f"zip {reader}<-{source}: needs explicit layers and source_layers; see `config.expand`"
                )
            self.layer_pairs[reader, source] = list(zip(zip_spec.layers, zip_spec.source_layers))
            width, source_width = self.tower(reader).hidden_size, self.tower(source).hidden_size
            layers = nn.ModuleList(ZipLayer(zip_spec, width, source_width) for _ in zip_spec.layers)
            if reader not in self.zips:
                self.zips[reader] = nn.ModuleDict()
            self.zips[reader][source] = layers  # type: ignore[operator]
        self.processor: ZipperProcessor | None = None
        self.all_tied_weights_keys: dict[str, str] = {}

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Tower names, in the order of the handover's classes."""
        return list(self.config.towers)

    @property
    def specials(self) -> dict[str, Specials]:
        """Each tower's special ids."""
        return {n: Specials(s.bos_token_id, s.eos_token_id, s.pad_token_id) for n, s in self.config.tower_specs.items()}

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
        """tanh of every gate, by ``reader<-source.k``, and ``....ff`` for feed-forward gates."""
        values: dict[str, float] = {}
        for (reader, source), pairs in self.layer_pairs.items():
            for k in range(len(pairs)):
                layer = self.zip_layer(reader, source, k)
                values[f"{reader}<-{source}.{k}"] = float(torch.tanh(layer.gate.weight.detach()))
                if layer.feed_forward is not None:
                    values[f"{reader}<-{source}.{k}.ff"] = float(torch.tanh(layer.feed_forward_gate.weight.detach()))
        return values

    def project_input(self, name: str, hidden_states: Tensor, involved: Tensor) -> Tensor:
        """A tower's input projection, for the rows that involve several towers.

        Where zips were trained apart (`combine`), each training has a projection of its own, for rows that involve
        several of its towers; where several apply, what each adds is added.

        Args:
            hidden_states: ``[batch, time, hidden]`` before the first layer. involved: bool ``[batch, towers]``.
        """
        involved, result, before = involved.to(hidden_states.device), hidden_states, None
        for key, members in self.projection_keys[name]:
            rows = (involved[:, members].sum(1) > 1)[:, None, None]
            projected = self.input_projections[key](hidden_states)
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
        return self._handover(name, state)

    def _handover(self, name: str, states: Tensor) -> Tensor:
        head: Any = self.handover[name]
        return head(states.to(head[1].weight.dtype))

    def train(self, mode: bool = True) -> ZipperModel:
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

    # --- what the trainer asks -----------------------------------------------------------------------------------

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

    def kept(self) -> str:
        """In words, how each tower is trained."""
        return ", ".join(f"{n} {s.train}" for n, s in self.config.tower_specs.items())

    def step_flops(self, batch: Batch) -> int:
        """About 6 per parameter and token, tower by tower (Kaplan et al. 2020, section 2.1); zips left out."""
        return sum(
            6 * stream["input_ids"].numel() * self.tower(name).backbone.num_parameters(exclude_embeddings=True)
            for name, stream in batch.items()
        )

    def unimodal_loss(self, name: str, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Summed next-token loss in nats over rows of one modality alone, and how many tokens that is.

        The tower is run as a plain backbone.

        Args:
            name: the tower. rows: content ids.
        """
        documents = [Document([Segment(name, ids=list(row), target=True)]) for row in rows]
        stream, tower = collate(documents, self.specials)[name], self.tower(name)
        logits, _ = tower(stream["input_ids"].to(tower.device), stream["attention_mask"].to(tower.device))
        labels = _targets(stream, logits)
        counts = labels != IGNORED
        return float(loss_at(counts, logits, labels, reduction="sum")), int(counts.sum())

    # --- forward -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> ZipperOutput:
        """Run whole documents and score their targets.

        Args:
            batch: from `collate` or the processor.

        Returns:
            losses and logits. The loss of a modality is the mean over its target tokens, weighted by
            `config.loss_weights`; modalities without targets do not count.

        Raises:
            ValueError: for an unknown tower, or a token id outside its tower's vocabulary.
        """
        if not batch:
            raise ValueError("batch: no tower has any token")
        for name, stream in batch.items():
            self.check_ids(name, int(stream["input_ids"].min()), int(stream["input_ids"].max()))
        reading = read_by_group(self, batch) if self.config.groups else read(self, batch)
        losses: dict[str, Tensor] = {}
        for name, stream in batch.items():
            logits = reading.logits[name]
            labels = _targets(stream, logits)
            if (counts := labels != IGNORED).any():
                losses[name] = loss_at(counts, logits, labels)
        device = next(iter(reading.logits.values())).device
        total = [self.config.loss_weights.get(n, 1.0) * loss.to(device) for n, loss in losses.items()]
        if losses and self.config.handover_weight:
            losses["handover"] = self._handover_loss(batch, reading.finals)
            total.append(self.config.handover_weight * losses["handover"].to(device))
        return ZipperOutput(loss=torch.stack(total).sum() if total else None, losses=losses, logits=reading.logits)

    def _handover_loss(self, batch: Batch, finals: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of who speaks next, at every segment's end and at the documents' start."""
        logits, labels = [], []
        for name, stream in batch.items():
            here = stream["handover"].to(finals[name].device)
            at = here != IGNORED
            logits.append(self._handover(name, finals[name][at]).to(self.handover_start.device))
            labels.append(here[at].to(self.handover_start.device))
            first = (stream["segments"] == 0).any(1)
            logits.append(self.handover_start.expand(int(first.sum()), -1))
            labels.append(torch.full((int(first.sum()),), self.names.index(name), device=self.handover_start.device))
        return F.cross_entropy(torch.cat(logits).float(), torch.cat(labels))

    def check_ids(self, name: str, low: int, high: int) -> None:
        """Raise `ValueError` if ids from `low` to `high` are not all in a tower's vocabulary."""
        size = self.tower(name).vocab_size
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: token id {low if low < 0 else high} out of range, the tower has ids 0 to {size - 1}"
            )

    # --- making, saving, writing ---------------------------------------------------------------------------------

    @classmethod
    def fuse(
        cls,
        towers: Mapping[str, str | Path | PreTrainedModel | TowerSpec],
        *,
        codecs: Mapping[str, Any] | None = None,
        zips: ZipSpec | Sequence[ZipSpec] | None = None,
        **kwargs: Any,
    ) -> ZipperModel:
        """Fuse pre-trained decoders; see `zipper_lm.models.assemble.fuse`."""
        return assemble.fuse(cls, towers, codecs=codecs, zips=zips, **kwargs)

    def load_own(self, file: Path) -> None:
        """Copy a checkpoint's tensors into the model; see `zipper_lm.models.checkpoint.load_own`."""
        checkpoint.load_own(self, file)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, new weights, codecs and model card; see `zipper_lm.models.checkpoint.save`."""
        checkpoint.save(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload a checkpoint; see `zipper_lm.models.sharing.push`."""
        return sharing.push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> ZipperModel:
        """Load what `save_pretrained` wrote, and the backbones it names; see `zipper_lm.models.checkpoint.load`."""
        return checkpoint.load(cls, pretrained_model_name_or_path, *args, **kwargs)

    def generate(self, documents: Sequence[Document], schedule: Any, **kwargs: Any) -> list[Document]:
        """Let towers write the next segments; see `zipper_lm.generation.generate.generate`."""
        return generate.generate(self, documents, schedule, **kwargs)

    def stream(self, document: Document, schedule: Any, **kwargs: Any) -> Iterator[StreamedToken]:
        """As `generate` for one document, token by token; see `zipper_lm.generation.generate.stream`."""
        return generate.stream(self, document, schedule, **kwargs)


def loss_at(counts: Tensor, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy where it counts: elsewhere no float32 copy of the logits is made, and no gradient.

    Args:
        counts: bool ``[batch, time - 1]``. logits: ``[batch, time, vocab]``. labels: int64 ``[batch, time - 1]``, the
            next tokens. reduction: ``"mean"`` or ``"sum"``.
    """
    return F.cross_entropy(logits[:, :-1][counts].float(), labels[counts], reduction=reduction)


def _targets(stream: TowerBatch, logits: Tensor) -> Tensor:
    """What each position shall say next, int64 ``[batch, time - 1]``. An id that the tower can read but not write, as
    ImageGPT's one special id is, is no target."""
    labels = stream["labels"][:, 1:].to(logits.device)
    return labels.masked_fill(labels >= logits.shape[-1], IGNORED)


def _check_specials(tower: Tower, spec: TowerSpec) -> None:
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not 0 <= (value := getattr(spec, field)) < tower.vocab_size:
            raise ValueError(f"tower {tower.name!r}: {field}={value}, but its ids are 0 to {tower.vocab_size - 1}")


AutoConfig.register(ZipperConfig.model_type, ZipperConfig)
AutoModel.register(ZipperConfig, ZipperModel)
AutoProcessor.register(ZipperConfig, ZipperProcessor)

"""Are the frozen towers untouched? Tensor by tensor, and in what they say."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zipper_lm.fusion.backbones import (
    base_tensors,
    check_same_backbone,
    check_trust,
    load_backbone,
    recorded_dtype,
    wrappers,
)
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.tower import Tower
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.utils.hub import CONFIG_FILE, local_folder
from zipper_lm.utils.processes import shared
from zipper_lm.utils.shards import gathered
from zipper_lm.utils.tensors import stored, weights_hash

if TYPE_CHECKING:
    from zipper_lm.fusion.network import ZippedTowers
    from zipper_lm.generation.writer import Writer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerReport:
    """One tower against its source.

    Attributes:
        name: the tower. train: how it was trained. source: where the source was loaded from.
        tensors: tensors compared; none if there is no source, as of a tower that was given as an object and trained.
        equal: how many are bit-identical. largest: largest difference anywhere.
        logits_equal: whether logits on sample input are bit-identical to the source's (with LoRA: without adapters).
        source_as_fused: whether the source has the config and the hash of weights that the zips were made with; true of
            a tower that was trained in full. The hash is computed, whatever was remembered when the model was loaded.
    """

    name: str
    train: str
    source: str
    tensors: int
    equal: int
    largest: float
    logits_equal: bool
    source_as_fused: bool = True

    @property
    def identical(self) -> bool:
        """Every tensor and the logits on sample input, and the source is what it was."""
        return self.equal == self.tensors and self.logits_equal and self.source_as_fused

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "identical": self.identical}


def verify(model: ZippedTowers, folder: str | Path | None = None, **hub: Any) -> list[TowerReport]:
    """Compare every tower with its source checkpoint, loaded anew. All processes that a model is spread over call it.

    Args:
        model: the model. folder: where it was loaded from, for towers stored beside it. hub: see `fuse`.

    Raises:
        ValueError: if a source cannot be loaded.
    """
    with gathered(model):
        return [_compare(model, name, spec, folder, **hub) for name, spec in model.config.tower_specs.items()]


def _compare(model: ZippedTowers, name: str, spec: TowerSpec, folder: str | Path | None, **hub: Any) -> TowerReport:
    tower = model.tower(name)
    if spec.train == "full" and not spec.source:
        return TowerReport(name, spec.train, "", 0, 0, 0.0, False)
    spec = _placed(spec, folder)
    source = load_backbone(spec, dtype=tower.backbone.dtype, **hub)
    theirs = source.state_dict()
    ours = base_tensors(tower)
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())[:5]
        raise ValueError(f"tower {name!r}: tensors differ from {spec.source}: {odd}")
    differences = {k: _difference(ours[k], theirs[k]) for k in theirs}
    return TowerReport(
        name=name,
        train=spec.train,
        source=spec.source,
        tensors=len(theirs),
        equal=sum(_equal(ours[k], theirs[k]) for k in theirs),
        largest=max(differences.values(), default=0.0),
        logits_equal=_same_logits(tower, source),
        source_as_fused=spec.train == "full" or _as_fused(name, spec, source, **hub),
    )


def _placed(spec: TowerSpec, folder: str | Path | None) -> TowerSpec:
    """With the place of a source that lies in the folder that the model was loaded from."""
    inside = folder is not None and spec.source and (Path(folder) / spec.source).is_dir()
    return replace(spec, source=str(Path(folder) / spec.source)) if folder is not None and inside else spec


def load_source(model: Writer, name: str, folder: str | Path | None = None, **hub: Any) -> PreTrainedModel:
    """The checkpoint that a decoder of a model came from, loaded anew, in the dtype that the decoder has.

    Args:
        model: the model. name: of the decoder. folder: where the model was loaded from. hub: see `fuse`.

    Raises:
        ValueError: if it is not recorded where it came from, cannot be loaded, or is no longer what it was.
    """
    spec, dtype = model.config.tower_specs[name], model.backbones()[name].dtype
    if not spec.source:
        raise ValueError(f"tower {name!r}: it is not recorded where it came from, so there is nothing to compare with")
    source = load_backbone(_placed(spec, folder), dtype=dtype, **hub)
    if spec.weights_hash and dtype == recorded_dtype(spec) and weights_hash(source) != spec.weights_hash:
        raise ValueError(f"tower {name!r}: {spec.source} is no longer what it came from: other weights")
    return source


def _as_fused(name: str, spec: TowerSpec, source: PreTrainedModel, **hub: Any) -> bool:
    """Whether a source, as it was loaded, is the one that the zips were made with."""
    recorded = recorded_dtype(spec)
    if torch.promote_types(source.dtype, recorded) != source.dtype:  # rounded, it would tell nothing
        source = load_backbone(spec, dtype=recorded, **hub)
    try:
        check_same_backbone(name, spec, source)
    except ValueError:
        return False
    return True


def changed_sources(folder: str | Path, *, trust_remote_code: bool = False, **hub: Any) -> dict[str, str]:
    """Towers of a checkpoint whose source is no longer what the zips were trained on, and what is wrong.

    Raises:
        ValueError: if there is no checkpoint.
    """
    folder = local_folder(folder, **hub)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE} there")
    changed = {}
    config = ZipperConfig.from_pretrained(folder)
    check_trust(config, folder, trust_remote_code)
    for name, spec in config.tower_specs.items():
        if spec.train == "full":  # stored with the checkpoint
            continue
        at = replace(spec, source=str(folder / spec.source)) if (folder / spec.source).is_dir() else spec
        try:
            check_same_backbone(name, spec, load_backbone(at, dtype=recorded_dtype(spec), **hub))
        except ValueError as error:
            changed[name] = str(error)
    return changed


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(stored(ours), stored(theirs), strict=True))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one, over codes and scales of a quantized tensor."""
    if ours.shape != theirs.shape:
        return math.inf
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(stored(ours), stored(theirs), strict=True)]
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


@torch.no_grad()
def _same_logits(tower: Tower, source: Any, length: int = 16) -> bool:
    """Sample input: ids from a fixed seed; tower and source as plain backbones, without adapters."""
    generator = torch.Generator().manual_seed(0)
    limit = min(tower.vocab_size, int(getattr(source.config, "vocab_size", tower.vocab_size)))
    ids = torch.randint(0, limit, (2, length), generator=generator)
    ids = ids.to(tower.device)  # the source too: another device adds in another order
    with _without_adapters(tower):
        ours = tower.backbone(input_ids=ids).logits
    return torch.equal(ours, source.to(tower.device)(input_ids=ids).logits)


@contextmanager
def _without_adapters(tower: Tower) -> Iterator[None]:
    """The tower in evaluation mode as it was before LoRA."""
    was_training = tower.backbone.training
    layers = list(wrappers(tower.backbone).values()) if tower.adapter_names else []
    active = [(name, p.requires_grad) for name, p in tower.backbone.named_parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    tower.backbone.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, requires in active:  # enabling makes adapters trainable, disabling makes them not
            tower.backbone.get_parameter(name).requires_grad_(requires)
        tower.backbone.train(was_training)


@torch.no_grad()
def perplexity(model: Writer, name: str, rows: Sequence[Sequence[int]], batch_size: int = 32) -> float:
    """Perplexity per token on one modality alone; a tower is run as a plain backbone. Several processes share the rows.

    Args:
        model: the model. name: the modality. rows: content ids. batch_size: rows at a time.
    """
    loss, count = 0.0, 0
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for nats, tokens in shared(batches, partial(model.unimodal_loss, name)):
        loss, count = loss + nats, count + tokens
    return from_loss(name, loss / max(count, 1))


def from_loss(name: str, loss: float) -> float:
    """Perplexity of a mean loss in nats; infinite, with a warning, where no number is as large.

    Args:
        name: the modality, for the message. loss: per token.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        logger.warning("%s: a loss of %.0f nats per token; its perplexity is beyond all numbers", name, loss)
        return math.inf

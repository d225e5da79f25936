"""ZipperModel: a zipped network as its user holds it. It is trained, saved, loaded, pushed, and writes documents.

The network itself is `fusion/network.py`; what is behind each door here has a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel

from zipper_lm.data.batch_check import check_batch
from zipper_lm.data.collation import IGNORED, Batch, TowerBatch, batch_on_host, collate, with_every_tower
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.groups import read_by_group
from zipper_lm.fusion.head import tokens_at_once
from zipper_lm.fusion.loss import Targets, ZipperOutput, share, targets
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import Reading, read, tower_head
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.generation import generate
from zipper_lm.generation.arguments import Given, Schedule
from zipper_lm.generation.segment import StreamedToken
from zipper_lm.models import assemble, checkpoint, export, sharing
from zipper_lm.models.card import refresh_card
from zipper_lm.utils.arguments import Saving
from zipper_lm.utils.host import send
from zipper_lm.utils.shards import gathered, is_sharded


class ZipperModel(ZippedTowers):
    """Two or more decoders fused by zips.

    Args:
        config: towers and zips.
        backbones: the pre-trained decoders by tower name; `None` builds them from the config with random weights.

    Raises:
        ValueError: if a backbone is missing, or a special id lies outside its tower's vocabulary.
    """

    def forward(
        self,
        batch: Batch,
        target_counts: Mapping[str, Tensor] | None = None,
        return_loss: bool = True,
        return_logits: bool = True,
    ) -> ZipperOutput:
        """Run whole documents and score their targets.

        Args:
            batch: from `collate` or the processor.
            target_counts: by part of the loss, the number that the sum over its targets is divided by, int64 scalars;
                where gradients of several batches are added, that of all of them. `None`: the batch's own
                (`target_counts`).
            return_loss: false leaves the losses out. transformers' Trainer looks for an argument of this name.
            return_logits: false leaves the logits out: where they are many, they are made of a few targets at a time.

        Returns:
            losses and logits. The loss of a modality is the mean over its target tokens, weighted by
            `config.loss_weights`; modalities without targets do not count.

        Raises:
            ValueError: for an unknown tower, a token id outside its tower's vocabulary, or keys, dtypes or shapes that
                are not those of `collate`.
        """
        check_batch(batch, self.names, self.check_ids)
        if sharded := is_sharded(self):  # other processes wait for each part of it
            batch = with_every_tower(batch, self.specials)
        few = return_loss and not return_logits
        reading = (read_by_group if self.config.groups else read)(self, batch, logits=not few)
        if not return_loss:
            return ZipperOutput(logits=reading.logits)
        known = batch_on_host(batch)
        numbers = self.target_counts(known) if target_counts is None else target_counts
        losses: dict[str, Tensor] = {}
        idle: list[Tensor] = []
        for name in reading.finals:
            if len(wanted := Targets.of(targets(known[name], self.tower(name).head_size))):
                losses[name] = share(self._loss_of(name, wanted, reading), numbers[name])
            elif sharded:
                idle.append(self._loss_of(name, wanted, reading))  # of no target: zero, and so are its gradients
        device = self.tower(next(iter(reading.finals))).device
        total = [self.config.loss_weights.get(n, 1.0) * loss.to(device) for n, loss in losses.items()]
        if losses and self.config.handover_weight:
            losses["handover"] = share(self._handover_loss(known, reading.finals), numbers["handover"])
            total.append(self.config.handover_weight * losses["handover"].to(device))
        total += [zero.to(device) for zero in idle] if total else []
        loss = torch.stack(total).sum() if total else None
        return ZipperOutput(loss=loss, losses=losses, logits=reading.logits if return_logits else None)

    def _loss_of(self, name: str, wanted: Targets, reading: Reading) -> Tensor:
        """Summed loss of a tower's targets."""
        if name in reading.logits:
            return wanted.loss(reading.logits[name])
        tower = self.tower(name)
        head = tower_head(tower)
        assert head is not None
        if not len(wanted):
            return 0.0 * head(reading.finals[name].flatten(0, 1)[:1]).float().sum()
        return wanted.loss_by_parts(head, reading.finals[name], tokens_at_once(tower.head_size))

    def target_counts(self, batch: Batch) -> dict[str, Tensor]:
        """How many targets a batch has for each part of the loss, int64 scalars on the CPU: each tower's, 0 where it
        has none, and ``"handover"``, if that has a weight."""
        counts = dict.fromkeys(self.names, torch.tensor(0))
        said = []
        for name, stream in batch_on_host(batch).items():
            counts[name] = (targets(stream, self.tower(name).head_size) != IGNORED).sum()
            said += [(stream["handover"] != IGNORED).sum(), _begun(stream).sum()]
        if self.config.handover_weight:
            counts["handover"] = torch.stack(said).sum()
        return counts

    def _handover_loss(self, batch: Batch, finals: Mapping[str, Tensor]) -> Tensor:
        """Summed cross-entropy of who speaks next, at every segment's end and at the documents' start.

        Args:
            batch: on the host. finals: by tower, ``[batch, time, hidden]``.
        """
        logits, labels = [], []
        for name, stream in batch.items():
            here = stream["handover"].flatten()
            ends = (here != IGNORED).nonzero()[:, 0]
            states = finals[name].flatten(0, 1).index_select(0, *send([ends], finals[name].device))
            logits.append(self.handover_head(name, states).to(self.handover_start.device))
            first = int(_begun(stream).sum())
            logits.append(self.handover_start.expand(first, -1))
            labels += [here[ends], torch.full((first,), self.names.index(name))]
        (said,) = send([torch.cat(labels)], self.handover_start.device)
        return F.cross_entropy(torch.cat(logits).float(), said, reduction="sum")

    def unimodal_loss(self, name: str, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Summed next-token loss in nats over rows of one modality alone, and how many tokens that is.

        The tower is run as a plain backbone.

        Args:
            name: the tower. rows: content ids.
        """
        documents = [Document([Segment(name, ids=list(row), target=True)]) for row in rows]
        stream, tower = collate(documents, self.specials)[name], self.tower(name)
        logits, _ = tower(stream["input_ids"].to(tower.device), stream["attention_mask"].to(tower.device))
        wanted = Targets.of(targets(stream, logits.shape[-1]))
        return float(wanted.loss(logits)), len(wanted)

    # --- making, saving, writing ---------------------------------------------------------------------------------

    @classmethod
    def fuse(
        cls,
        towers: Mapping[str, str | Path | PreTrainedModel | TowerSpec],
        *,
        codecs: Mapping[str, Any] | None = None,
        zips: ZipSpec | Sequence[ZipSpec] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Fuse pre-trained decoders; see `zipper_lm.models.assemble.assemble`."""
        return assemble.assemble(cls, towers, codecs=codecs, zips=zips, **kwargs)

    def load_own(self, file: Path) -> None:
        """Copy a checkpoint's tensors into the model; see `zipper_lm.models.checkpoint.load_own`."""
        checkpoint.load_own(self, file)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        bundle_towers: Any = False,
        card: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write config, new weights, codecs and model card, whole or not at all. Of a model that is spread over
        processes by FSDP2 it is the same: all of them call this, unless there is a `state_dict`, and the first writes.

        Args:
            save_directory: a folder; made if missing. Other files in it are left alone.
            overwrite, bundle_towers: see `zipper_lm.models.checkpoint.save`. With `state_dict`, as trainers call it,
                a checkpoint of the same config is replaced without being asked: it is the run's own.
            card: write a model card and its picture too. A card that somebody edited is left alone.
            kwargs: `is_main_process` (false: this process writes nothing), `state_dict`, `max_shard_size`;
                `push_to_hub`, and with it `repo_id` and other arguments of `zipper_lm.models.sharing.push`.

        Raises:
            ValueError: as `checkpoint.save`; for an argument that is not followed.
        """
        how = Saving.of(f"{type(self).__name__}.save_pretrained", kwargs)
        together = how.state_dict is None and is_sharded(self)
        writes = how.is_main_process and not (together and torch.distributed.get_rank())
        if not writes and not together:
            return
        folder = Path(save_directory)
        with gathered(self) if card and together else nullcontext():  # a card tells of gates
            checkpoint.save(
                self,
                folder,
                overwrite=overwrite or ("state_dict" in kwargs and checkpoint.is_of(folder, self.config.fingerprint)),
                bundle_towers=bundle_towers,
                beside=partial(refresh_card, model=self, kept=folder) if card else None,
                state_dict=how.state_dict,
                max_shard_size=how.max_shard_size,
                writes=writes,
            )
            if writes:
                sharing.push_saved(self, folder, how, bundle_towers)

    def export_tower(self, name: str, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write one tower as a plain Hugging Face checkpoint; see `zipper_lm.models.export.export_tower`."""
        export.export_tower(self, name, save_directory, overwrite=overwrite)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload a checkpoint; see `zipper_lm.models.sharing.push`."""
        return sharing.push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Self:
        """Load what `save_pretrained` wrote, and the backbones it names; see `zipper_lm.models.checkpoint.load`."""
        return checkpoint.load(cls, pretrained_model_name_or_path, *args, **kwargs)

    @overload
    def generate(self, documents: Sequence[Document], schedule: Schedule, **how: Any) -> list[Document]: ...

    @overload
    def generate(self, documents: Given, schedule: Schedule, **how: Any) -> Document: ...

    @overload
    def generate(self, documents: Any, schedule: Schedule, **how: Any) -> Any: ...

    def generate(self, documents: Any, schedule: Schedule, **how: Any) -> Any:
        """Let towers write the next segments; see `zipper_lm.generation.generate.generate`. A model that is spread over
        processes is gathered for the span: all of them call it, each with documents of its own."""
        with gathered(self):
            return generate.generate(self, documents, schedule, **how)

    def stream(self, document: Given, schedule: Schedule, **how: Any) -> Iterator[StreamedToken]:
        """As `generate` for one document, token by token; see `zipper_lm.generation.generate.stream`."""
        return generate.stream(self, document, schedule, **how)


def _begun(stream: TowerBatch) -> Tensor:
    """bool ``[batch, time]``: the first token of each document that begins with this tower."""
    return (stream["segments"] == 0) & (stream["positions"] == 0)


AutoConfig.register(ZipperConfig.model_type, ZipperConfig)
AutoModel.register(ZipperConfig, ZipperModel)
AutoProcessor.register(ZipperConfig, ZipperProcessor)

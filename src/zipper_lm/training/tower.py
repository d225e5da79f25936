"""The trainer of a tower that is made from scratch: streams of rows, and what they spell.

With joint CTC, what some of the tower's layers hold of a row must spell the row's text, in training alone
(`zipper_lm.training.ctc`): the tower then knows what is said before another one is to read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler
from transformers import TrainerCallback

from zipper_lm.codecs.codec import Codec
from zipper_lm.data.collation import IGNORED
from zipper_lm.training.base import IDLE, BaseTrainer, evened
from zipper_lm.training.beside import faded
from zipper_lm.training.ctc import HEADS_FILE, HeadsCallback, Spelled, TowerCtc
from zipper_lm.utils.host import send
from zipper_lm.utils.letters import text_of
from zipper_lm.utils.processes import several
from zipper_lm.utils.randomness import randomness_kept

SPELLED = "spelled"
"""Key of a batch's texts, and of where each is to be spelled."""


class Streams(Dataset[dict[str, Any]]):
    """Rows as the tower will read them, ``BOS ids EOS``, several in a stream of at most `context` tokens.

    Rows are drawn together in an order from `seed`; none is cut, so a longer row makes a longer stream of its own.

    Args:
        rows: ids. codec: whose. context: tokens. seed: of the order, and of what is lost.
        texts: what each row says, to be spelled; `None` for one that is not known.
        corrupt: share of the tokens that are read as padding, drawn anew in each epoch; all are learned.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        codec: Codec,
        context: int,
        seed: int,
        texts: Sequence[str | None] | None = None,
        corrupt: float = 0.0,
    ) -> None:
        self.spells = texts is not None
        self.corrupt, self.seed, self.lost = corrupt, seed, codec.pad_id
        self.kept = {codec.bos_id, codec.eos_id}
        # In shared memory: workers that outlive an epoch (persistent_workers) see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.streams: list[list[int]] = []
        self.texts: list[list[tuple[range, str]]] = []
        for index in np.random.default_rng(seed).permutation(len(rows)):
            ids = [codec.bos_id, *rows[index], codec.eos_id]
            if not self.streams or len(self.streams[-1]) + len(ids) > context:
                self.streams.append([])
                self.texts.append([])
            places = range(len(self.streams[-1]), len(self.streams[-1]) + len(ids))
            self.streams[-1] += ids
            if (text := texts[index] if texts is not None else None) is not None:
                self.texts[-1].append((places, text))

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on. Accelerate's loaders call it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A stream by its number; ``~number`` is the same one, read again for nothing (`training.order.Evened`)."""
        number = ~index if index < 0 else index
        ids = self.streams[number]
        item = {"input_ids": self._read(number), "labels": ids} if self.corrupt else {"input_ids": ids}
        return item | {IDLE: index < 0} | ({SPELLED: self.texts[number]} if self.spells else {})

    def _read(self, number: int) -> list[int]:
        """A stream with what is lost in this epoch, which depends on nothing but seed, epoch and number."""
        ids = self.streams[number]
        hit = np.random.default_rng((self.seed, int(self._epoch), number, 1)).random(len(ids)) < self.corrupt
        return [self.lost if gone and each not in self.kept else each for each, gone in zip(ids, hit.tolist())]

    def spelled(self) -> Iterator[Spelled]:
        """All texts that are to be spelled."""
        for stream in self.texts:
            yield from _spelled(0, stream)


def _spelled(row: int, texts: Sequence[tuple[range, str]], places: int = 1) -> list[Spelled]:
    return [Spelled.of(text, row, torch.arange(read.start, read.stop), places) for read, text in texts]


class PadStreams:
    """Right padding; padding is no target.

    Args:
        pad: id. places: of a token, at which it spells.
    """

    def __init__(self, pad: int, places: int = 1) -> None:
        self.pad, self.places = pad, places

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        idle = all(i[IDLE] for i in items)
        items = items[:1] if idle else [i for i in items if not i[IDLE]]
        width = max(len(i["input_ids"]) for i in items)
        ids = self._padded([i["input_ids"] for i in items], width)
        learned = self._padded([i.get("labels", i["input_ids"]) for i in items], width)
        mask = torch.tensor([[1] * len(i["input_ids"]) + [0] * (width - len(i["input_ids"])) for i in items])
        labels = learned.masked_fill((mask == 0) | idle, IGNORED)  # which Trainer counts
        texts = [
            each for row, i in enumerate(items) if not idle for each in _spelled(row, i.get(SPELLED, ()), self.places)
        ]
        spelled = {SPELLED: served} if (served := [each for each in texts if each.letters and each.fits]) else {}
        made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return made | spelled | ({IDLE: True} if idle else {})

    def _padded(self, rows: Sequence[list[int]], width: int) -> torch.Tensor:
        return torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """Joint CTC beside the loss of a tower that is pre-trained.

    Args:
        heads: what spells. weight: of the loss. fade_out: share of the steps in which it falls to nothing.
    """

    heads: TowerCtc
    weight: float
    fade_out: float | None = None


class TowerTrainer(BaseTrainer):
    """Trainer reads a checkpoint's file as it lies there, leniently. But `save_pretrained` writes tensors of some
    families under other names than their modules have (the head of GPT-NeoX, the experts of mixtures), and those would
    silently stay as they were: here `from_pretrained` reads it. Looking at the held-out rows draws no random numbers.
    Several processes see the streams that one would see.

    Args:
        spelling: what else is learned; `None` is nothing. callbacks, kwargs: as of `BaseTrainer`.
    """

    def __init__(
        self, *, spelling: Spelling | None = None, callbacks: list[TrainerCallback] | None = None, **kwargs: Any
    ) -> None:
        self.spelling, self._letters = spelling, 0
        own = [] if spelling is None else [HeadsCallback(spelling.heads, self.mean_of_processes)]
        super().__init__(callbacks=[*(callbacks or []), *own], **kwargs)
        if spelling is not None:
            spelling.heads.to(self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own, and what spells."""
        if self.optimizer is None and self.spelling is not None:
            super().create_optimizer(model)
            assert self.optimizer is not None
            heads = {"params": list(self.spelling.heads.parameters()), "weight_decay": 0.0}
            self.optimizer.add_param_group(heads)
        return super().create_optimizer(model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of an optimizer step; the letters in all of them, and in all processes, are counted."""
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.spelling is not None and batches:
            letters = torch.tensor(sum(len(text.letters) for batch in batches for text in batch.get(SPELLED, ())))
            if several():
                letters = self.accelerator.reduce(*send([letters], self.args.device), "sum").cpu()
            self._letters = int(letters)
            self.part_losses.setdefault("ctc", []).append(torch.zeros((), device=device))
        return batches, counted

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Raises `ValueError` for an order that each process would draw for itself."""
        strategy, order = self.args.train_sampling_strategy, super()._get_train_sampler(train_dataset)
        if isinstance(order, RandomSampler):  # as accelerate draws it: from the seed and the epoch
            order = SeedableRandomSampler(self.train_dataset, data_seed=self.args.data_seed)
        elif not isinstance(order, SequentialSampler):
            if self.args.world_size > 1:
                raise ValueError(f"training.arguments: train_sampling_strategy={strategy!r} is for one process")
            return order  # type: ignore[return-value]
        return evened(order, self.args)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's own, and that of what is spelled; nothing of a batch that is there because the process has no
        stream left in this step."""
        texts = inputs.pop(SPELLED, [])
        if inputs.pop(IDLE, False):
            loss: Any = super().compute_loss(model, inputs | {"labels": inputs["input_ids"]})
            return 0.0 * loss
        if self.spelling is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = inputs | {"output_hidden_states": True}
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        if texts:
            share = faded(self.state.global_step, self.state.max_steps, self.spelling.fade_out)
            cost = self.spelling.weight * share * self.spelling.heads(outputs.hidden_states, texts, self._letters)
            self.part_losses["ctc"][-1] += cost.detach()
            divided = not self.model_accepts_loss_kwargs or num_items_in_batch is None  # by Trainer, afterwards
            parts = self.args.gradient_accumulation_steps if divided else 1
            loss = loss + cost * self.accelerator.num_processes * parts  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's own; training goes on as if it had not happened."""
        with randomness_kept():
            return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def spell(self, streams: Streams) -> list[tuple[str, str]]:
        """Texts of streams, in small letters, and what the tower spells in their places; those that do not fit are left
        out. All processes spell all streams."""
        assert self.spelling is not None
        model: Any = self.model
        said: list[tuple[str, str]] = []
        was_training, size = model.training, self.args.per_device_eval_batch_size
        model.eval()
        for start in range(0, len(streams), size):
            batch = self.data_collator([streams[n] for n in range(start, min(start + size, len(streams)))])
            if texts := batch.pop(SPELLED, []):
                given = {name: batch[name].to(self.args.device) for name in ("input_ids", "attention_mask")}
                with self.accelerator.autocast():
                    states = model(**given, output_hidden_states=True, use_cache=False).hidden_states
                spelled = self.spelling.heads.spell(states, texts)
                said += [(text_of(text.letters), found) for text, found in zip(texts, spelled, strict=True)]
        model.train(was_training)
        return said

    def describe_step(self) -> str:
        """What streams the step at hand is of, in this process."""
        lengths = [int(n) for batch in self.batches for n in batch["attention_mask"].sum(1)]
        return f"{len(lengths)} streams of {min(lengths)} to {max(lengths)} tokens"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tower = self.accelerator.unwrap_model(self.model)
        saved = type(tower).from_pretrained(resume_from_checkpoint, dtype=tower.dtype)
        tower.load_state_dict(saved.state_dict())
        if self.spelling is not None:
            self.spelling.heads.load_state_dict(load_file(Path(resume_from_checkpoint) / HEADS_FILE))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's own; what spells is no part of the tower, but a run that goes on goes on with it."""
        super()._save(output_dir, state_dict)
        if self.spelling is not None and self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            save_file(self.spelling.heads.state_dict(), folder / HEADS_FILE)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

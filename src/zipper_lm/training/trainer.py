"""ZipperTrainer: `transformers.Trainer` for zipped models.

Accelerate, mixed precision, accumulation, checkpointing, logging integrations and resuming come from Trainer. Ours are
the parameter groups, the documents' collation, saving, evaluation by generation, and what is logged of the gates.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from zipper_lm.data.collation import Batch, Specials, collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.generation.writer import Writer
from zipper_lm.training.guided_attention import Pair, watched
from zipper_lm.utils.hub import WEIGHTS_FILE
from zipper_lm.utils.processes import from_main

LAST_WRITTEN = "trainer_state.json"
"""What Trainer writes last; a checkpoint without it was cut off."""

logger = logging.getLogger(__name__)

SHORT = 8
"""A given segment of fewer tokens is not corrupted: a short text has no redundancy to lose."""


def parameter_groups(model: Writer, *, tower_learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters by what they are: new or a tower's, matrix (decayed) or not.

    Frozen + trainable = all is asserted here.
    """
    of_towers = {id(p) for p in model.pretrained_parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    frozen = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            frozen += parameter.numel()
            continue
        groups.setdefault((id(parameter) in of_towers, parameter.dim() >= 2), []).append(parameter)
    trainable = sum(p.numel() for group in groups.values() for p in group)
    assert frozen + trainable == sum(p.numel() for p in model.parameters()), "parameter groups must cover the model"
    if not trainable:
        raise ValueError("training: every parameter is frozen")
    return [
        {"params": group, "weight_decay": weight_decay if matrix else 0.0}
        | ({"lr": tower_learning_rate} if tower else {})
        for (tower, matrix), group in groups.items()
    ]


def check_precision(model: nn.Module) -> None:
    """Warn of bfloat16 weights that are trained: they have 8 bits, so that an update of less than 1/512 of one is lost.

    Raises:
        ValueError: for float16 weights that are trained.
    """
    half = {torch.float16: "", torch.bfloat16: ""}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in half:
            half[parameter.dtype] = half[parameter.dtype] or name
    advice = "load it as float32 (towers.NAME.config: {dtype: float32}) and set training.arguments: {bf16: true}"
    if name := half[torch.float16]:
        raise ValueError(f"training: {name} is float16, whose range is too narrow for training; {advice}")
    if name := half[torch.bfloat16]:
        logger.warning("training: %s is bfloat16, in which small updates are lost; %s", name, advice)


class CorruptedDocuments(Dataset[Document]):
    """Documents with noise in what is read, never in what the loss expects.

    - Given segments lose a share of their tokens (padding in their place), against overfitting.
    - Target segments of towers that are trained have a share of their own history replaced by random ids (word
      dropout, Bowman et al. 2016, arXiv 1511.06349, section 3.1). A tower that can go on from its own last tokens alone
      has little reason to look through its zips; one that cannot trust them has. A frozen tower cannot learn to cope.

    What is hit depends on nothing but seed, epoch and index: a resumed run goes on as if it had never stopped.

    Args:
        documents: map-style, encoded; told the epoch too, if it wants to know.
        specials: each tower's special ids.
        corrupt: share of given segments' ids that is lost; of all, or by modality, 0 where it is missing.
        history_dropout: share of target segments' ids that their tower reads wrongly.
        sizes: number of ids, to draw wrong ones from, of the towers that are trained.
        seed: of what is hit.
    """

    def __init__(
        self,
        documents: Dataset[Document],
        specials: dict[str, Specials],
        *,
        corrupt: float | Mapping[str, float],
        history_dropout: float,
        sizes: dict[str, int],
        seed: int,
    ) -> None:
        self.documents, self.specials, self.seed = documents, specials, seed
        self.corrupt, self.history_dropout, self.sizes = corrupt, history_dropout, sizes
        # In shared memory: workers that outlive an epoch (persistent_workers) see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on. Accelerate's loaders call it."""
        self._epoch.fill_(epoch)
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.documents)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Document:
        document = self.documents[index]
        if not (self.corrupt or self.history_dropout):
            return document
        draw = np.random.default_rng((self.seed, int(self._epoch), index, 1))
        return Document(self._noisy(segment, draw) for segment in document)

    def _noisy(self, segment: Segment, draw: np.random.Generator) -> Segment:
        ids, name = segment.ids or [], segment.modality
        lost = self.corrupt.get(name, 0.0) if isinstance(self.corrupt, Mapping) else self.corrupt
        share = self.history_dropout * (name in self.sizes) if segment.target else lost
        if not share or not (segment.target or len(ids) >= SHORT):
            return segment
        hit = draw.random(len(ids)) < share
        if not segment.target:
            pad = self.specials[name].pad
            return Segment(name, ids=[pad if gone else i for i, gone in zip(ids, hit)])
        wrong = draw.integers(self.sizes[name], size=len(ids))
        keep = ~hit | np.isin(wrong, self.specials[name])  # a special id means something else
        read = [i if kept else int(w) for i, kept, w in zip(ids, keep, wrong)]
        return Segment(name, ids=read, labels=ids, target=True)


class DocumentCollator:
    """Encoded documents to the one argument of `ZipperModel.forward`."""

    def __init__(self, specials: dict[str, Specials]) -> None:
        self.specials = specials

    def __call__(self, documents: Sequence[Document]) -> dict[str, Batch]:
        return {"batch": collate(documents, self.specials)}


class LikeLengths(Sampler[int]):
    """Documents of like length share a batch: less padding. The order is drawn anew from (seed, epoch).

    Args:
        lengths: tokens of each document. batch: documents per optimizer step. seed: of the order.
        documents: told the epoch too: accelerate's loaders tell a data set only if their sampler is not wrapped, and
            it is wrapped in a resumed epoch and with several processes.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, documents: Any = None) -> None:
        self.lengths, self.batch, self.seed, self.documents = list(lengths), batch, seed, documents
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on. Accelerate's loaders call it."""
        self.epoch = epoch
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Whatever is drawn inside, Python's, numpy's and torch's global generators go on as if nothing had been."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one is what is kept)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002


class ZipperTrainer(Trainer):
    """Trainer for a `ZipperModel`, or a baseline with its face, on encoded documents.

    Args:
        model: the model. args: as in transformers.
        train_dataset: map-style, of encoded `Document`s.
        corrupt, history_dropout: see `CorruptedDocuments`.
        tower_learning_rate: for towers that are trained.
        guided: weights of pairs of towers whose attention is held to the diagonal.
        score: called with the model at each evaluation; returns metrics without the ``eval_`` prefix.

    Raises:
        ValueError: for a model with float16 weights that are trained.
    """

    def __init__(
        self,
        model: Writer,
        args: TrainingArguments,
        train_dataset: Dataset[Document],
        *,
        corrupt: float | Mapping[str, float] = 0.0,
        history_dropout: float = 0.0,
        tower_learning_rate: float = 5e-4,
        guided: Mapping[Pair, float] | None = None,
        score: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        module = cast(nn.Module, model)
        check_precision(module)
        self.tower_learning_rate, self.guided, self.score = tower_learning_rate, guided or {}, score
        self.part_losses: dict[str, list[torch.Tensor]] = {}
        documents = CorruptedDocuments(
            train_dataset,
            model.specials,
            corrupt=corrupt,
            history_dropout=history_dropout,
            sizes=model.trained_vocabularies(),
            seed=args.seed,
        )
        super().__init__(
            model=module,
            args=args,
            train_dataset=documents,
            eval_dataset=documents,  # evaluation is by `score`; Trainer wants to see one
            data_collator=DocumentCollator(model.specials),
            callbacks=callbacks,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer class, on our groups."""
        if self.optimizer is None:
            owner, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                self.accelerator.unwrap_model(self.model),
                tower_learning_rate=self.tower_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = owner(groups, **kwargs)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Documents of like length share a batch: less padding, the order still drawn anew."""
        dataset = self.train_dataset
        assert isinstance(dataset, CorruptedDocuments)
        plain = dataset.documents  # noise changes no length
        lengths = [max(len(s.ids or []) for s in plain[i]) for i in range(len(dataset))]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LikeLengths(lengths, batch, seed, dataset)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, and guided attention's; the parts are kept for the next log line."""
        with watched(self.accelerator.unwrap_model(model), self.guided) as costs:
            output = model(**inputs)
        if output.loss is None:
            raise ValueError("training: a batch without a single target; every document needs one")
        parts, total = dict(output.losses), output.loss
        if costs:
            parts["guided_attention"] = torch.stack([cost.to(total.device) for cost in costs]).sum()
            total = total + parts["guided_attention"]
        for name, loss in parts.items():
            self.part_losses.setdefault(name, []).append(loss.detach())  # on the device: a number would wait for it
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the losses by modality and the gates to training's log lines."""
        if "loss" in logs:
            means = {name: float(torch.stack(losses).mean()) for name, losses in self.part_losses.items()}
            logs |= {f"loss_{name}": round(mean, 4) for name, mean in means.items()}
            self.part_losses = {}
            for name, value in self.accelerator.unwrap_model(self.model).gates().items():
                logs[f"gate/{name}"] = round(value, 5)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Generate and score, always with the same draws; training goes on as if it had not happened. If it cannot be
        done, there is a checkpoint: Trainer scores before it saves, by default after the last step."""
        if self.score is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.no_grad(), randomness_kept():
            torch.manual_seed(self.args.seed)
            try:
                scores = self.score(model)
            except Exception:
                if self.args.world_size == 1:  # others would wait for one that failed
                    self._save_checkpoint(model, trial=None)
                raise
            metrics = from_main({f"{metric_key_prefix}_{k}": v for k, v in scores.items()})
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """The model's own estimate."""
        return self.accelerator.unwrap_model(self.model).step_flops(inputs["batch"])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The checkpoint is the model's own: new weights only, no pickled arguments."""
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, overwrite=True, card=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(self.model).load_own(Path(resume_from_checkpoint) / WEIGHTS_FILE)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def describe_parameters(model: Writer) -> str:
    """One line: what is trained and what is frozen, and that it adds up."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert trained + frozen == total
    share = 100 * trained / total
    return (
        f"parameters: {trained:,} trained + {frozen:,} frozen = {total:,} ({share:.1f} %); {model.describe_training()}"
    )


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint with the most steps in a training folder, or `None`."""
    names = re.compile(r"checkpoint-\d+")
    found = [p.parent for p in Path(folder).glob(f"checkpoint-*/{LAST_WRITTEN}") if names.fullmatch(p.parent.name)]
    return max(found, key=lambda p: int(p.name.split("-")[1])) if found else None

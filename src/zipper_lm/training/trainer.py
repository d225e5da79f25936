"""ZipperTrainer: `transformers.Trainer` for zipped models.

Accelerate, mixed precision, accumulation, checkpointing, logging integrations and resuming come from Trainer. Ours are
the parameter groups, the documents' collation, saving, evaluation by generation, and what is logged of the gates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from zipper_lm.checkpoint import WEIGHTS_FILE, load_own
from zipper_lm.collation import Batch, Specials, collate
from zipper_lm.document import Document, Segment
from zipper_lm.model import ZipperModel


def parameter_groups(model: ZipperModel, *, tower_learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters by what they are: new or a tower's, matrix (decayed) or not.

    Frozen + trainable = all is asserted here.
    """
    of_towers = {id(p) for p in model.towers.parameters()}
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


class DocumentCollator:
    """Encoded documents to the one argument of `ZipperModel.forward`.

    Args:
        specials: each tower's special ids.
        corrupt: share of a given (not target) segment's ids that is replaced by padding, in training.
        seed: of what is replaced.
    """

    def __init__(self, specials: dict[str, Specials], corrupt: float = 0.0, seed: int = 0) -> None:
        self.specials, self.corrupt = specials, corrupt
        self.draw = np.random.default_rng(seed)

    def __call__(self, documents: Sequence[Document]) -> dict[str, Batch]:
        if self.corrupt:
            documents = [Document(self._corrupted(s) for s in d) for d in documents]
        return {"batch": collate(documents, self.specials)}

    def _corrupted(self, segment: Segment) -> Segment:
        ids = segment.ids or []
        if segment.target or len(ids) < 8:  # a short text has no redundancy to lose
            return segment
        lost = self.draw.random(len(ids)) < self.corrupt
        pad = self.specials[segment.modality].pad
        return Segment(segment.modality, ids=[pad if gone else i for i, gone in zip(ids, lost)])


class ZipperTrainer(Trainer):
    """Trainer for a `ZipperModel` on encoded documents.

    Args:
        model: the model. args: as in transformers.
        train_dataset: map-style, of encoded `Document`s.
        specials, corrupt: see `DocumentCollator`.
        tower_learning_rate: for towers that are trained.
        score: called with the model at each evaluation; returns metrics without the ``eval_`` prefix.
    """

    def __init__(
        self,
        model: ZipperModel,
        args: TrainingArguments,
        train_dataset: Dataset[Document],
        *,
        corrupt: float = 0.0,
        tower_learning_rate: float = 5e-4,
        score: Callable[[ZipperModel], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.tower_learning_rate, self.score = tower_learning_rate, score
        self.part_losses: dict[str, list[float]] = {}
        collator = DocumentCollator(model.specials, corrupt, args.seed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=train_dataset,  # evaluation is by `score`; Trainer wants to see one
            data_collator=collator,
            callbacks=callbacks,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer class, on our groups."""
        if self.optimizer is None:
            owner, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
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
        lengths = [max(len(s.ids or []) for s in dataset[i]) for i in range(len(dataset))]  # type: ignore[arg-type, index]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(self.args.data_seed or self.args.seed)
        return LengthGroupedSampler(batch, lengths=lengths, generator=generator)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The model's own loss; its parts are kept for the next log line."""
        output = model(**inputs)
        if output.loss is None:
            raise ValueError("training: a batch without a single target; every document needs one")
        for name, loss in output.losses.items():
            self.part_losses.setdefault(name, []).append(float(loss.detach()))
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the losses by modality and the gates to training's log lines."""
        if "loss" in logs:
            logs |= {f"loss_{name}": round(float(np.mean(v)), 4) for name, v in self.part_losses.items()}
            self.part_losses = {}
            for name, value in self.accelerator.unwrap_model(self.model).gates().items():
                logs[f"gate/{name}"] = round(value, 5)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Generate and score."""
        if self.score is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.no_grad():
            metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.score(model).items()}
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """About 6 per parameter and token, tower by tower (Kaplan et al. 2020, section 2.1); zips left out."""
        model = self.accelerator.unwrap_model(self.model)
        return sum(
            6 * stream["input_ids"].numel() * model.tower(name).backbone.num_parameters(exclude_embeddings=True)
            for name, stream in inputs["batch"].items()
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The checkpoint is the model's own: new weights only, no pickled arguments."""
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir, overwrite=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_own(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint) / WEIGHTS_FILE)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def describe_parameters(model: ZipperModel) -> str:
    """One line: what is trained and what is frozen, and that it adds up."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert trained + frozen == total
    kept = ", ".join(f"{n} {s.train}" for n, s in model.config.tower_specs.items())
    return f"parameters: {trained:,} trained + {frozen:,} frozen = {total:,} ({100 * trained / total:.1f} %); {kept}"


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the most steps in a training folder, or `None`."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return max(found, key=lambda p: int(p.name.split("-")[1])) if found else None

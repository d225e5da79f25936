"""ZipperTrainer: `transformers.Trainer` for zipped models.

Accelerate, mixed precision, accumulation, checkpointing, logging integrations and resuming come from Trainer. Ours are
the parameter groups, the documents' collation, saving, evaluation by generation, and what is logged of the gates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from zipper_lm.data.collation import Batch, Specials, collate
from zipper_lm.data.document import Document
from zipper_lm.generation.writer import Writer
from zipper_lm.training.corruption import CorruptedDocuments
from zipper_lm.training.guided_attention import Pair, watched
from zipper_lm.training.parameters import check_precision, parameter_groups
from zipper_lm.utils.files import whole_checkpoint
from zipper_lm.utils.hub import WEIGHTS_FILE
from zipper_lm.utils.processes import from_main


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


class WholeCheckpoints(Trainer):
    """Trainer, whose checkpoints are whole or not at all."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with whole_checkpoint(folder, TRAINER_STATE_NAME, alone=self.args.should_save):
            super()._save_checkpoint(model, trial)


class ZipperTrainer(WholeCheckpoints):
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

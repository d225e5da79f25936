"""BaseTrainer: what training a fusion and training a tower alone have in common, beyond `transformers.Trainer`.

- A step whose loss or gradient is no number does not happen: training stops before it, with the weights as they were.
- A run that was resumed logs what one that never stopped would have: sums of losses go along in its checkpoints.
- A checkpoint is whole or not there.
- Looking at what is held out, and workers that outlive an epoch, leave the random numbers of training alone.
"""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints

from zipper_lm.training.memory import OutOfMemory, told_with_what_fits
from zipper_lm.training.order import Evened
from zipper_lm.training.products import quick_products, scores_of
from zipper_lm.utils.files import new_file, whole_checkpoint, write_json
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.processes import any_of_each, limit_waiting, several
from zipper_lm.utils.randomness import randomness_kept
from zipper_lm.utils.shards import whole

IDLE = "idle"
"""Key of a batch that nothing is learned from: its process has nothing left in this step."""
PLACE = "place"
"""Key in a batch of where its last document's stream can be gone on from, plain values; there if it is of a stream."""
LEAST_SCALE = 1.0
"""Gradients that overflow float16 are the loss scaler's business while it can still scale down to here."""


_LOST = re.compile(r"DataLoader worker \(pid[^)]*\)")


class WorkerLost(ValueError):
    """A process that reads data died."""


class Diverged(ValueError):
    """Training stopped before a step whose loss or gradient was not finite."""


class LossesSoFar(TrainerCallback, ExportableState):
    """What a checkpoint keeps of the losses that led to it; empty before the first.

    Attributes:
        total: sum of the steps' losses up to the last line of the log. since: sum of those after it.
        steps: how many steps both are of. logged: the step of the last line.
        parts: by part of the loss, those of the steps after it.
        documents: of one step, in all processes and accumulated batches; `None` in what an older version wrote.
        place: in the stream that documents come from, not behind the first one that was not seen yet.
    """

    def __init__(self) -> None:
        self.total, self.since, self.steps, self.logged = 0.0, 0.0, 0, 0
        self.parts: dict[str, list[float]] = {}
        self.documents: int | None = None
        self.place: Any = None

    def state(self) -> dict[str, Any]:
        """As Trainer writes it into ``trainer_state.json``."""
        return {"args": {}, "attributes": dict(vars(self))}


def documents_of_a_step(args: TrainingArguments) -> int:
    """Of an optimizer step, in all processes and accumulated batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def step_size(checkpoint: Path) -> int | None:
    """`documents_of_a_step` of the run that wrote a checkpoint; `None` if an older version did."""
    return _kept(read_mapping(checkpoint / TRAINER_STATE_NAME).get("stateful_callbacks", {})).get("documents")


def check_step_size(before: int | None, args: TrainingArguments) -> None:
    """Raise `ValueError` if steps are not cut as they were: what is left of an epoch would be another part of it.

    Args:
        before: from `step_size`. args: of the run that goes on.
    """
    if before is not None and before != (now := documents_of_a_step(args)):
        raise ValueError(
            f"cannot resume: a step had {before} documents, now it has {now} (training.batch_size "
            f"{args.train_batch_size} x gradient_accumulation_steps {args.gradient_accumulation_steps} x "
            f"{args.world_size} processes); change one of these so that there are {before}"
        )


def _kept(callbacks: Any) -> dict[str, Any]:
    """The attributes of `LossesSoFar` in a checkpoint's `stateful_callbacks`."""
    return callbacks.get(LossesSoFar.__name__, {}).get("attributes", {})


def evened(order: Any, args: TrainingArguments) -> Evened:
    """The order of an epoch's documents for the processes that share its steps.

    Args:
        order: of one process, which can be told the epoch.

    Raises:
        ValueError: as `Evened`.
    """
    together = args.train_batch_size * args.world_size if args.world_size > 1 else 1
    return Evened(order, together=together, step=documents_of_a_step(args), drop_last=args.dataloader_drop_last)


class _Begin(TrainerCallback):
    """A resumed run begins with what its checkpoint says."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has set its sums to zero."""
        self.trainer.restore_losses()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """The sampler learns its epoch from the whole loader: with several processes, it lies too deep in the loader of
        an epoch that is begun in its midst."""
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(int(state.epoch or 0))


class BaseTrainer(Trainer):
    """See this file's beginning.

    Attributes:
        part_losses: by part of the loss, what each step since the last line of the log had of it, in this process;
            `compute_loss` may fill it. batches: of the step at hand, in this process.
    """

    def __init__(self, *, callbacks: list[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self.part_losses: dict[str, list[Tensor]] = {}
        self._step_losses: list[Tensor] = []
        self._uncounted = 0
        self._place: Any = None
        self.batches: list[Any] = []
        self._epoch_iterator: Any = None
        super().__init__(callbacks=[*(callbacks or []), LossesSoFar(), _Begin(self)], **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's own; ``training_loss`` is the mean over all steps of the run, those before it was resumed too.

        Raises:
            ValueError: as `check_step_size`.
            Diverged: before a step whose loss or gradient norm is not finite, in all processes.
            OutOfMemory: if the device's memory does not suffice for a step.
            WorkerLost: if a process that reads data died.
        """
        limit_waiting(self.args.ddp_timeout)  # arguments of another training may have been made since
        try:
            output = super().train(*args, **kwargs)
        except RuntimeError as error:
            if (lost := _LOST.search(str(error))) is None:
                raise
            last = get_last_checkpoint(str(self.args.output_dir))
            raise WorkerLost(
                f"a process that reads data died after step {self.state.global_step} ({lost[0]}): out of memory, or "
                f"killed. Go on with resume (--resume) {'from ' + last if last else 'once there is a checkpoint'}, "
                "perhaps with fewer of them (training.arguments.dataloader_num_workers)"
            ) from error
        return output._replace(training_loss=output.metrics["train_loss"])

    # --- no step that would spoil the weights ----------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own, multiplied quickly; the loss is looked at before the optimizer steps."""
        told, inputs = "", args[1] if len(args) > 1 else kwargs["inputs"]
        try:
            with self.products(scores_of(self.accelerator.unwrap_model(self.model), self.streams(inputs))):
                loss = super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            told = str(error)
        if told:  # outside, where the error no longer holds what the step had computed
            raise OutOfMemory(told_with_what_fits(self, inputs, told))
        self._step_losses.append(loss)
        return loss

    def products(self, scores: int = 0) -> AbstractContextManager[None]:
        """See `quick_products`; a compiler asks how products are made as if there were one answer."""
        plain = self.args.device.type != "cpu" or self.args.torch_compile
        return nullcontext() if plain else quick_products(scores)

    def mean_of_processes(self, gradient: Tensor) -> Tensor:
        """The mean over processes of a gradient that no wrapper averages."""
        return self.accelerator.reduce(gradient, "mean")

    def streams(self, inputs: Any) -> dict[str, Tensor]:
        """The ids of a batch, ``[batch, time]``, by tower."""
        return {"": inputs["input_ids"]}

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        loss = torch.stack(self._step_losses).sum()
        self._step_losses = []
        scaler = self.accelerator.scaler
        total = norm if isinstance(norm, Tensor) else torch.full_like(loss, 0.0 if norm is None else norm)
        # Both are looked at in one go: a device is waited for here, once a step.
        lost, over = any_of_each(torch.stack([~value.isfinite() for value in (loss, total.to(loss.device))]))
        if lost or (over and not _can_scale_down(scaler)):
            raise Diverged(self._what_happened(float(loss), norm, scaler))
        return norm

    def _what_happened(self, loss: float, norm: Any, scaler: Any) -> str:
        found = [f"the loss is {loss:.4g}", *([] if norm is None else [f"the gradient's norm {float(norm):.4g}"])]
        if scaler is not None:
            found.append(f"the loss scale {scaler.get_scale():.4g}")
        if parts := ", ".join(f"{n} {float(losses[-1]):.4g}" for n, losses in self.part_losses.items() if losses):
            found[0] += f" ({parts})"
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        rate = self.lr_scheduler.get_last_lr()[0]  # type: ignore[union-attr]
        return (
            f"training diverged at step {self.state.global_step + 1}, which was not taken: {', '.join(found)}; "
            f"learning rate {rate:.4g}; {self.describe_step()}; {kept}. Try a lower learning rate, a longer warmup or "
            "a smaller clip, float32 or bf16 in place of float16, and look at these rows"
        )

    def describe_step(self) -> str:
        """In words, what the step at hand is of."""
        return f"{len(self.batches)} batches in this process"

    # --- a resumed run is the run ----------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own. After the last checkpoint there is no step left, and Trainer would take one more.

        A run that was cut off in its last evaluation is scored now.
        """
        if self.state.global_step >= self.state.max_steps or self._is_out_of_patience():
            if self.args.eval_strategy != "no" and not self._is_scored():
                self._determine_best_metric(metrics=self.evaluate(), trial=None)
                self._save_checkpoint(self.model, trial=None)
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _is_scored(self) -> bool:
        last = (entry for entry in self.state.log_history if entry.get("step") == self.state.global_step)
        return any(key.startswith("eval_") for entry in last for key in entry)

    def _is_out_of_patience(self) -> bool:
        found = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in found)

    def restore_losses(self) -> None:
        """Trainer's sums become what the checkpoint that is gone on from says."""
        self._step_losses, self.part_losses, self._place = [], {}, None
        kept: dict[str, Any] = {}
        if self.state.global_step:
            kept = _kept(self.state.stateful_callbacks)
            check_step_size(kept.get("documents"), self.args)
        # Steps before a checkpoint that was written without sums cannot be counted.
        self._uncounted = self.state.global_step - kept.get("steps", 0)
        if not kept:
            return
        self._place = kept.get("place")
        if self._place is not None:
            self.go_on(self._place)
        device, first = self.args.device, self.is_world_process_zero()
        self._tr_loss = torch.tensor(kept["since"], device=device)
        self._total_loss_scalar, self._globalstep_last_logged = kept["total"], kept["logged"]
        self.part_losses = {  # which are summed over processes
            name: [torch.tensor(loss if first else 0.0, device=device) for loss in losses]
            for name, losses in kept["parts"].items()
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        kept = next(c for c in self.callback_handler.callbacks if isinstance(c, LossesSoFar))
        kept.documents, kept.place = documents_of_a_step(self.args), self._place
        kept.since = self._mean_of(float(self._tr_loss))
        kept.total, kept.logged = self._total_loss_scalar, self._globalstep_last_logged
        kept.parts = {name: losses.tolist() for name, losses in self._parts().items()}
        kept.steps = self.state.global_step - self._uncounted
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with whole_checkpoint(folder, TRAINER_STATE_NAME, alone=self.args.should_save):
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if self.args.should_save:
                _without_nan(folder / TRAINER_STATE_NAME)
                # By number. By time, as Trainer does it, the newest go if the clock was set back.
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(self.args.output_dir), limit, best)

    def _parts(self) -> dict[str, Tensor]:
        """`part_losses` of all processes together, ``[steps]`` each."""
        return {n: self.accelerator.reduce(torch.stack(losses), "sum") for n, losses in self.part_losses.items()}

    def _mean_of(self, value: float) -> float:
        """The mean over processes."""
        if not several():
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.reduce(told, "mean"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss to training's log lines, the mean of the steps that had them; and in the last one,
        let ``train_loss`` be of the whole run."""
        if "loss" in logs:
            logs |= {f"loss_{name}": round(float(losses.mean()), 4) for name, losses in self._parts().items()}
            self.part_losses = {}
        if "train_loss" in logs:
            steps = self.state.global_step - self._uncounted
            logs["train_loss"] = self._mean_of(self._total_loss_scalar) / max(steps, 1)
        super().log(logs, *args, **kwargs)

    # --- the same draws --------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Trainer's own. Workers that outlive an epoch draw a seed when they start, and no other: those of a resumed
        run start later, and draw it without being noticed."""
        kept: Any = nullcontext()
        if self.args.dataloader_persistent_workers and epoch_iterator is not self._epoch_iterator:
            self._epoch_iterator = epoch_iterator
            kept = randomness_kept() if (self.state.epoch or 0) >= 1 else kept
        with kept:
            self.batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in self.batches:
            self._place = batch.pop(PLACE, self._place) if isinstance(batch, dict) else self._place
        return self.batches, counted

    def go_on(self, place: Any) -> None:
        """Let documents come from a place in their stream on; of a trainer that reads streams."""
        raise NotImplementedError


def _without_nan(file: Path) -> None:
    """What is no number in Trainer's JSON, a score for instance, becomes null: ``NaN`` and ``Infinity`` are no JSON."""
    if any(name in (text := file.read_text(encoding="utf-8")) for name in ("NaN", "Infinity")):
        with new_file(file, overwrite=True) as new:
            write_json(new, json.loads(text))


def _can_scale_down(scaler: Any) -> bool:
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= LEAST_SCALE

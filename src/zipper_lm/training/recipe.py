"""What a recipe may say of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zipper_lm.training.prefix_cache import PrefixMode

BESIDE = ("guided_attention", "ctc", "aligned_attention", "forward_sum")
"""Fields that weigh losses beside the model's own, by task."""


def at_least(where: str, value: float, least: float) -> None:
    """Raise `ValueError` for a value below the least that the field `where` may have."""
    if value < least:
        raise ValueError(f"{where} must be at least {least}, got {value}")


@dataclass(kw_only=True)
class TrainingRecipe:
    """How to train. What is not named here goes to `transformers.TrainingArguments` through `arguments`.

    Args:
        steps: optimizer steps.
        batch_size: documents per step and device.
        learning_rate: of the new weights. tower_learning_rate: of towers that are trained (also LoRA).
        warmup: share of the steps that the rate rises; then it falls along a cosine.
        weight_decay: on matrices. clip: largest gradient norm. betas: of Adam (paper: 0.9, 0.99).
        evaluate_every: steps between evaluations and checkpoints, of which the best on the validation split is kept;
            null is once, at the end.
        save_every: steps between further checkpoints, to resume from; null is none but by time. One is written after a
            quarter of an hour without any, whatever the steps.
        patience: evaluations without a better score after which training stops; null never.
        corrupt: share of a given segment's tokens replaced by padding in training, against overfitting; of all, or by
            modality.
        history_dropout: share of a target segment's own tokens that its tower, if it is trained, reads wrongly, so that
            it learns to look through its zips; or by modality, of frozen towers too, whose zips learn to go on after a
            slip.
        interleave: share of documents that hold two rows, one after the other.
        join: share of rows that are joined with another one, end to end, into one longer row: more variety where
            pairs are few. For text and sound; in all tasks, or by task.
        guided_attention: task to weight of a loss on attention that leaves the diagonal, for a zipper whose modalities
            run in step, such as ``{text->speech: 2}`` (`zipper_lm.training.guided_attention`).
        ctc: task to weight of joint CTC, a loss by which what a zip remembers of the source spells the text that is
            written, such as ``{speech->text: 1}`` (`zipper_lm.training.ctc`). For text alone.
        aligned_attention: task to weight of a loss on attention that looks elsewhere than where joint CTC, which it
            needs for the same task, hears what is written next (`zipper_lm.training.aligned_attention`).
        forward_sum: task to weight of a loss on attention that is not monotonic, along whatever path
            (`zipper_lm.training.forward_sum`).
        fade_out: share of the steps in which the weights of these four fall to nothing; null: they stay.
        packing: let documents of a batch share rows: less padding, the same losses and gradients.
        prefix_cache: where the states of frozen towers below their first zips are kept, which are the same in every
            step: ``"memory"`` or ``"disk"``, of all frozen towers or by name; null computes them anew.
        log_every: steps between points in the logs.
        arguments: further fields of `transformers.TrainingArguments` (bf16, gradient_checkpointing, ...).
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    tower_learning_rate: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    evaluate_every: int | None = None
    save_every: int | None = 500
    patience: int | None = None
    corrupt: float | dict[str, float] = 0.0
    history_dropout: float | dict[str, float] = 0.3
    interleave: float = 0.0
    join: float | dict[str, float] = 0.0
    guided_attention: dict[str, float] = field(default_factory=dict)
    ctc: dict[str, float] = field(default_factory=dict)
    aligned_attention: dict[str, float] = field(default_factory=dict)
    forward_sum: dict[str, float] = field(default_factory=dict)
    fade_out: float | None = None
    packing: bool = False
    prefix_cache: PrefixMode | dict[str, PrefixMode] | None = None
    log_every: int = 20
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("evaluate_every", "save_every", "patience"):
            if (value := getattr(self, name)) is not None:
                at_least(f"training.{name}", value, 1)
        for name in ("learning_rate", "tower_learning_rate", "weight_decay", "clip"):
            at_least(f"training.{name}", getattr(self, name), 0)
        for name in ("corrupt", "history_dropout", "interleave", "join", "warmup"):
            value = getattr(self, name)
            for share in value.values() if isinstance(value, dict) else [value]:
                if not 0.0 <= share < 1.0:
                    raise ValueError(f"training.{name} must be in [0, 1), got {value}")
        for name in BESIDE:
            for template, weight in getattr(self, name).items():
                at_least(f"training.{name}.{template}", weight, 0)
        if lacking := sorted(set(self.aligned_attention) - set(self.ctc)):
            raise ValueError(
                f"training.aligned_attention names {lacking}, but training.ctc, which knows places, does not"
            )
        if self.fade_out is not None and not 0.0 < self.fade_out <= 1.0:
            raise ValueError(f"training.fade_out must be in (0, 1], got {self.fade_out}")
        if self.fade_out is not None and not any(getattr(self, name) for name in BESIDE):
            raise ValueError(f"training.fade_out={self.fade_out} has no effect without one of {list(BESIDE)}")

"""TowerTrainer: `transformers.Trainer` for a tower alone, whose checkpoints come back whole."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from zipper_lm.training.trainer import randomness_kept


class TowerTrainer(Trainer):
    """Trainer reads a checkpoint's file as it lies there, leniently. But `save_pretrained` writes tensors of some
    families under other names than their modules have (the head of GPT-NeoX, the experts of mixtures), and those would
    silently stay as they were: here `from_pretrained` reads it. Looking at the held-out rows draws no random numbers.
    """

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's own; training goes on as if it had not happened."""
        with randomness_kept():
            return super().evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tower = self.accelerator.unwrap_model(self.model)
        saved = type(tower).from_pretrained(resume_from_checkpoint, dtype=tower.dtype)
        tower.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

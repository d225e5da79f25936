"""transformers' own Trainer trains a model too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_steps import DOCUMENTS, Documents
from transformers import Trainer, TrainingArguments

from zipper_lm import ZipperModel
from zipper_lm.data.collation import collate
from zipper_lm.training.trainer import DocumentCollator


def test_a_plain_trainer_trains_saves_and_evaluates(tmp_path: Path) -> None:
    """It asked for the number of tokens of its main input, which is no tensor, and knew no loss to evaluate."""
    model = tiny_model(gate=0.5, kinds={"speech": "qwen3"}, train={"speech": "full"})
    given = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    documents = Documents(DOCUMENTS)
    trainer = Trainer(model, given, DocumentCollator(model.specials), documents, documents)
    trainer.train()
    assert trainer.state.total_flos > 0
    logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert logged[1] < logged[0]
    with torch.no_grad():
        loss = model.eval()(collate(DOCUMENTS, model.specials)).loss
    assert logged[1] == pytest.approx(float(loss), rel=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.save_model(str(tmp_path / "saved"))  # as every model of transformers can be: it was refused
    with pytest.raises(ValueError, match="already holds"):
        model.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-4"):
        again = ZipperModel.from_pretrained(folder, towers={"text": model.backbones()["text"]})
        assert torch.equal(again(collate(DOCUMENTS, again.specials)).loss, loss)

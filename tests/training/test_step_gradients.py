"""However a step's documents are cut into batches and processes, it is the same step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_model
from tiny_steps import (
    DOCUMENTS,
    GUIDED,
    Step,
    check_as_near_as_it_rounds,
    check_same,
    free_port,
    in_a_process,
    one_step,
    spelled_step,
)

from zipper_lm.data.collation import collate
from zipper_lm.models.baseline.expand import expand
from zipper_lm.training.guided_attention import query_counts, watched
from zipper_lm.training.trainer import ZipperTrainer

PARTS = {"loss", "loss_text", "loss_speech", "loss_handover", "loss_guided_attention"}


@pytest.fixture(scope="module")
def whole() -> Step:
    """One batch of all documents, in one process."""
    return one_step(4, 1)


@pytest.mark.parametrize(("batch", "accumulated"), [(2, 2), (1, 4), (3, 2)])
def test_accumulation_is_one_large_batch(batch: int, accumulated: int, whole: Step) -> None:
    """Each batch took its own mean, so that few tokens counted like many, and a modality that some batches lack counted
    less: the gradient of 2 x 2 documents was half beside that of 4."""
    assert {"handover_start"} < whole[0].keys()
    assert whole[1].keys() == PARTS
    check_same(one_step(batch, accumulated), whole)


def test_two_processes_are_one_large_batch(whole: Step, tmp_path: Path) -> None:
    """Each process took its own mean too, and what was logged of a modality was the first process's."""
    torch.multiprocessing.spawn(in_a_process, (free_port(), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        at_once, one_by_one, spelled = torch.load(tmp_path / f"{rank}.pt")
        check_same(spelled, spelled_step(4, 1))
        check_same(at_once, whole)
        check_same(one_by_one, whole)


def test_a_single_decoder_and_bfloat16_too() -> None:
    def codec(size: int) -> Any:
        return SimpleNamespace(kind="ids", vocab_size=size, bos_id=0, eos_id=1, pad_id=2)

    def step(batch: int, accumulated: int, **more: Any) -> Step:
        codecs = {"text": codec(31), "speech": codec(20)}
        torch.manual_seed(0)
        return one_step(batch, accumulated, expand("text", tiny_backbone("llama", 31), codecs), **more)

    whole = step(4, 1)
    check_same(step(2, 2), whole)
    check_as_near_as_it_rounds(step(2, 2, bf16=True), step(4, 1, bf16=True), whole)


def test_guided_attention_counts_what_it_weighs() -> None:
    model = tiny_model(gate=0.5)
    batch = collate(DOCUMENTS, model.specials)
    counts = query_counts(batch, GUIDED)
    assert {pair: int(n) for pair, n in counts.items()} == {("speech", "text"): 14}
    with watched(model, batch, GUIDED, counts) as costs:
        model(batch)
    with watched(model, batch, GUIDED, {("speech", "text"): torch.tensor(28)}) as halved:
        model(batch)
    torch.testing.assert_close(torch.stack(costs), 2 * torch.stack(halved))
    model.config.groups = [["text", "speech"], ["text", "speech"]]
    with pytest.raises(ValueError, match="zips that are trained together; these were combined"):
        ZipperTrainer(model, None, [], guided=GUIDED)  # type: ignore[arg-type]


def test_the_loss_of_a_batch_alone_is_a_mean() -> None:
    """What is counted in a batch is what its losses are divided by."""
    model = tiny_model(gate=0.5)
    batch = collate(DOCUMENTS, model.specials)
    counts = model.target_counts(batch)
    assert {name: int(n) for name, n in counts.items()} == {"text": 12, "speech": 13, "handover": 12}
    twice = {name: 2 * number for name, number in counts.items()}
    one, half = model(batch), model(batch, target_counts=twice)
    assert all(torch.equal(one.losses[n], 2 * half.losses[n]) for n in one.losses)
    assert model.target_counts(collate([DOCUMENTS[0]], model.specials))["text"] == 0

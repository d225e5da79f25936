"""Which checkpoint an interrupted run goes on from, and what may have changed since."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zipper_lm.jobs.resume import begin, check_working, latest_checkpoint


def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step, whole in ((5, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_a_working_folder_knows_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "m.training"
    begin(folder, {"seed": 1, "overwrite": False})
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    same = {"seed": 1, "overwrite": True}
    assert check_working(folder, same, resume=True, overwrite=False) == folder / "checkpoint-5"
    with pytest.raises(ValueError, match="'seed'"):
        check_working(folder, {"seed": 2}, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="checkpoint-5"):
        check_working(folder, same, resume=False, overwrite=False)
    assert check_working(folder, same, resume=False, overwrite=True) is None
    begin(folder, same)
    assert latest_checkpoint(folder) is None


def checkpoint(folder: Path, step: int) -> Path:
    """As Trainer writes it, but for what is in the files."""
    here = folder / f"checkpoint-{step}"
    here.mkdir(parents=True)
    save_file({"weight": torch.zeros(100)}, here / "model.safetensors")
    (here / "config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(100)}, here / name)
    (here / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return here


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "config.json", "optimizer.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_checkpoint_that_is_not_whole_is_skipped_and_named(
    name: str, left: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A trainer_state.json that was cut off in the middle, by a kill or a power cut, ended --resume in a traceback,
    though there was a whole checkpoint before it."""
    folder = tmp_path / "m.training"
    begin(folder, {"seed": 1})
    older, newer = checkpoint(folder, 2), checkpoint(folder, 10)
    assert latest_checkpoint(folder) == newer
    content = (newer / name).read_bytes()
    (newer / name).write_bytes(content[: int(left * len(content))])
    assert latest_checkpoint(folder) == older
    with caplog.at_level(logging.WARNING):
        assert check_working(folder, {"seed": 1}, resume=True, overwrite=False) == older
    assert f"going on from checkpoint-2: {newer / name} is not whole" in caplog.text
    (older / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=rf"no checkpoint in .* that is whole: .*10/{name} is not whole; .*-2 has no tr"
    ):
        check_working(folder, {"seed": 1}, resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"generation": {"text": {"max_new_tokens": 8}}}, True),
        ({"scored": ["speech->text"]}, True),
        ({"judge": "elsewhere"}, True),
        ({"training": {"steps": 9, "save_every": 1}}, True),
        ({"training": {"steps": 10, "save_every": 500}}, False),
        ({"data": "other"}, False),
    ],
)
def test_how_a_run_is_scored_may_change_before_it_goes_on(change: dict[str, Any], free: bool, tmp_path: Path) -> None:
    """A generation setting that failed in the first evaluation, after hours, could not be mended: another recipe."""
    recipe = {"seed": 1, "data": "here", "scored": None, "generation": {"text": {"stop_strings": "."}}}
    recipe |= {"training": {"steps": 9, "save_every": 500}}
    begin(tmp_path / "t", recipe)
    newest = checkpoint(tmp_path / "t", 5)
    if free:
        assert check_working(tmp_path / "t", recipe | change, resume=True, overwrite=False) == newest
        return
    with pytest.raises(ValueError, match="cannot resume"):
        check_working(tmp_path / "t", recipe | change, resume=True, overwrite=False)

"""A data set's judge is fitted once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_recipes import workshop

from zipper_lm.evaluation import judges
from zipper_lm.evaluation.recogniser import Recogniser


def test_fitted_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judges, "STEPS", 1)
    steps: list[int] = []
    first = judges.judge_for(str(workshop() / "data"), progress=lambda step, *_: steps.append(step))
    assert steps
    monkeypatch.setattr(Recogniser, "fit", lambda *_, **__: pytest.fail("fitted again"))
    shutil.copytree(workshop() / "data", tmp_path / "moved")
    again = judges.judge_for(str(tmp_path / "moved"))
    assert first.digest() == again.digest()
    assert first.digest() != judges.load_judge(workshop() / "judge").digest()
    with pytest.raises(pytest.fail.Exception):
        judges.judge_for(str(workshop() / "data"), split="test")


@pytest.mark.parametrize("change", [lambda wave: np.concatenate([wave, wave]), lambda wave: wave / 2])
def test_other_sounds_of_the_same_names_have_a_judge_of_their_own(
    change: Callable[[np.ndarray], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus that was made anew, with other sounds under the same names and texts, was judged by the old one's; then,
    one whose sounds were as long as before."""
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judges, "STEPS", 1)
    data = shutil.copytree(workshop() / "data", tmp_path / "data")
    first = judges.judge_for(str(data))
    wave, rate = soundfile.read(data / "train" / "0.wav")
    soundfile.write(data / "train" / "0.wav", change(wave), rate)
    assert judges.judge_for(str(data)).digest() != first.digest()


def test_rows_without_words_teach_a_judge_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them, in the training split, was enough for no judge; a number for a text ended in a traceback."""
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judges, "STEPS", 1)
    sounds = [str(workshop() / "data" / "train" / f"{n}.wav") for n in range(3)]
    lines = [{"speech": s, "text": t} for s, t in zip(sounds, ("one", "...", "two"))]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judges.judge_for(str(file))
    file.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1] | {"text": 7}) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:2: its text is 7, which is no text"):
        judges.judge_for(str(file))


def test_settings_that_are_no_judges(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")  # ended in an AttributeError
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object"):
        judges.load_judge(tmp_path)


def test_data_without_speech_has_no_judge(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match="speech and text"):
        judges.judge_for(str(tmp_path / "train.jsonl"))


def test_what_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One broken recording was enough for no judge at all, whatever data.broken_limit said."""
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    heard: list[str] = []
    judge = workshop() / "judge"  # made before: the workshop fits one, too

    def fit(values: list[object], texts: list[str], **_: object) -> Recogniser:
        heard.extend(texts)
        return Recogniser.from_pretrained(judge)

    monkeypatch.setattr(Recogniser, "fit", fit)
    data = shutil.copytree(workshop() / "data", tmp_path / "data")
    (data / "train" / "0.wav").write_bytes(b"RIFF")
    (data / "train" / "1.wav").unlink()
    with pytest.raises(ValueError, match=r"metadata\.csv:2"):
        judges.judge_for(str(data), broken_limit=1)
    heard.clear()
    judges.judge_for(str(data), broken_limit=2)
    assert len(heard) == 10

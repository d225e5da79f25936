"""Scores by generation."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_recipes import say, tiny_recipe, workshop

from zipper_lm import Segment, ZipperModel
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.evaluation.public_recogniser import PublicRecogniser
from zipper_lm.evaluation.recogniser import Recogniser
from zipper_lm.evaluation.scoring import heard_again, score_task, transcribe, yardsticks
from zipper_lm.jobs.towers import build_model

SETTINGS = {"text": {"max_new_tokens": 4}, "speech": {"max_new_tokens": 8}}


@pytest.fixture(scope="module")
def fused() -> ZipperModel:
    return build_model(tiny_recipe(workshop() / "unused"))


@pytest.fixture(scope="module")
def judge() -> Recogniser:
    return Recogniser.from_pretrained(workshop() / "judge")


def test_text_is_scored_in_the_order_of_the_rows(fused: ZipperModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(read_rows(workshop() / "data", split="train"))
    texts = {row["speech"]: row["text"] for row in rows}

    def generate(documents: list, schedule: list, **_: object) -> list:
        for document in documents:
            document.segments.append(type(document[0])("text", texts[document[0].value]))
        return documents

    monkeypatch.setattr(fused, "generate", generate)
    told: list[tuple[int, int]] = []
    score = score_task(fused, rows, "asr", batch_size=5, progress=lambda *x: told.append(x))
    assert (score.wer, score.cer) == (0.0, 0.0)
    assert score.references == [r["text"] for r in rows]
    assert told == [(4, 12), (8, 12), (12, 12)]
    texts[rows[0]["speech"]] += " six"
    wrong = score_task(fused, rows, "asr").wer
    assert wrong == pytest.approx(100 / sum(len(r["text"].split()) for r in rows))


def test_speech_is_heard_by_the_judge(fused: ZipperModel, judge: Recogniser) -> None:
    rows = read_rows(workshop() / "data", split="test")
    score = score_task(fused, rows, "tts", judge=judge, settings=SETTINGS)
    assert score.task == "text->speech"
    assert len(score.values) == len(rows) == score.summary()["utterances"]
    assert score.hypotheses == transcribe(judge, score.values)
    assert score.summary()["wer_95"][0] <= score.wer <= score.summary()["wer_95"][1]


def test_a_judge_of_another_language_is_refused_before_anything_is_written(
    fused: ZipperModel, judge: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "generate", None)
    with pytest.raises(ValueError, match=r"judge: it has no letters for 100 % of the texts.*of another language"):
        score_task(fused, [{"text": "два один"}], "tts", judge=judge, settings=SETTINGS)


def test_a_sound_too_short_for_a_word_is_silence(judge: Recogniser) -> None:
    assert transcribe(judge, [np.zeros(10, np.float32), say("one two")])[0] == ""


def test_a_row_with_nothing_to_compare_is_found_first(fused: ZipperModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose text holds no words was an error only after everything had been generated, and without its number."""
    rows = list(read_rows(workshop() / "data", split="test"))
    monkeypatch.setattr(fused, "generate", None)
    for empty in ("", " ... ", Segment("text", ids=[3])):
        with pytest.raises(ValueError, match=r"'speech->text': text of row 1 holds nothing to compare"):
            score_task(fused, [rows[0], {**rows[1], "text": empty}], "asr")


def test_what_cannot_be_scored(fused: ZipperModel) -> None:
    rows = list(read_rows(workshop() / "data", split="test"))
    with pytest.raises(ValueError, match="a judge must say what it is"):
        score_task(fused, rows, "tts")
    with pytest.raises(ValueError, match="no rows"):
        score_task(fused, [], "asr")
    with pytest.raises(ValueError, match=r"row 1 has no \['speech'\]"):
        score_task(fused, [rows[0], {"text": "one"}], "asr")
    with pytest.raises(ValueError, match="image"):
        score_task(fused, rows, "image->text")


def test_another_normaliser_compares_what_a_public_judge_spells(
    fused: ZipperModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a judge writes numbers as digits and titles short; the plain normaliser would count each as an error, and
    what it takes from them cannot be put back."""
    judge = PublicRecogniser(None)  # type: ignore[arg-type]
    monkeypatch.setattr(PublicRecogniser, "_heard", lambda *_: "Um, $2.")
    monkeypatch.setattr(PublicRecogniser, "letters", lambda _: None)
    rows = [{"text": "two dollars", "speech": say("two")}]
    settings = {"speech": {"min_new_tokens": 8, "max_new_tokens": 8}}
    rates = []
    for name in ("plain", "whisper-english"):
        how = {"judge": judge, "settings": settings, "normaliser": name}
        monkeypatch.setattr(fused.processor.codecs["text"], "encode", lambda values: [[4, 5] for _ in values])
        score = score_task(fused, rows, "tts", **how)
        rates.append((score.wer, score.exact, score.summary().get("normaliser")))
        assert yardsticks(fused, rows, judge, normaliser=name)["judge_wer_on_originals"] == score.wer
        assert heard_again(score, judge)["wer"] == score.wer
    assert rates == [(100.0, 0.0, None), (0.0, 100.0, "whisper-english")]
    with pytest.raises(ValueError, match="normaliser must be one of"):
        score_task(fused, rows, "tts", judge=judge, normaliser="none")


def test_copies_are_heard_with_the_learned_decoder_and_without(
    fused: ZipperModel, judge: Recogniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused.processor is not None
    codec = fused.processor.codecs["speech"]
    rows = [{"text": "two", "speech": say("two")}]
    plain = yardsticks(fused, rows, judge)
    assert "look_up_wer" not in plain
    monkeypatch.setattr(codec, "decoder", None)  # put back behind the test
    codec.fit_decoder([say("two")], 1, width=4)
    monkeypatch.setattr(type(codec.decoder), "frames", lambda self, units, plain: plain[:0])  # says nothing
    both = yardsticks(fused, rows, judge)
    assert (both["oracle_wer"], both["look_up_wer"]) == (100.0, plain["oracle_wer"])

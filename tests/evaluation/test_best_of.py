"""Best of n by a judge, and by the model's own score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import often_ending, tiny_model

from zipper_lm import Document, Segment
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.evaluation.best_of import Heard, sampled
from zipper_lm.evaluation.scoring import score_task
from zipper_lm.generation.read_back import ReadBack

WORDS = ("one", "two", "three", "four", "five")


class Waves:
    """A codec of "sounds" that say what their first id is."""

    kind, rate = "waves", 25.0
    vocab_size, bos_id, eos_id, pad_id = 53, 0, 1, 2

    def encode(self, values: Any) -> list[list[int]]:
        return [[int(i) for i in value[:3]] for value in values]

    def decode(self, ids: Any) -> list[np.ndarray]:
        return [np.full(2000, row[0] if row else 0, dtype=np.float32) for row in ids]


class Listener:
    """Hears a word for each sound."""

    asked = 0

    def transcribe(self, values: Any, /) -> list[str]:
        self.asked += 1
        return [WORDS[int(value[0]) % 5] for value in values]

    def digest(self) -> str:
        return "listener"


def speaking() -> Any:
    model = often_ending(tiny_model(gate=0.5))
    codec = TextCodec.train(["one two three four five"] * 4, vocab_size=31)
    model.processor = ZipperProcessor({"text": codec, "speech": Waves()}, model.specials)  # type: ignore[dict-item]
    return model


def candidates(*rows: tuple[int, float]) -> list[Segment]:
    waves = Waves()
    return [Segment("speech", waves.decode([[i]])[0], ids=[i], logprobs=[score]) for i, score in rows]


def test_the_one_that_is_heard_best() -> None:
    model, judge = speaking(), Listener()
    choose = Heard(model, judge)
    said = Document([("text", "five"), ("text", "three")])
    wordless = Document([("speech", [5])])
    written = Document([Segment("text", ids=model.processor.codecs["text"].encode(["four"])[0])])
    three = candidates((10, -1.0), (12, -9.0), (12, -5.0))  # one, three, three
    assert choose([said, wordless, written], [three, three, candidates((10, -1.0), (13, -7.0))]) == [2, 0, 1]
    assert judge.asked == 1, "all are heard together"
    texts = [Segment("text", "a", ids=[5], logprobs=[-2.0]), Segment("text", "b", ids=[6], logprobs=[-1.0])]
    assert choose([said], [texts]) == [1], "what it cannot judge is chosen by score"


@pytest.mark.parametrize("best_by", ["score", "judge"])
def test_a_task_is_scored_by_the_best_of_several(best_by: str) -> None:
    """More samples, fewer errors, where the judge chooses; the model's own score knows nothing of it."""
    model, judge = speaking(), Listener()
    rows = [{"text": WORDS[i % 5]} for i in range(10)]
    wer = {}
    for samples in (1, 6):
        torch.manual_seed(0)
        settings = {"speech": {"max_new_tokens": 3, "do_sample": True, "temperature": 3.0, "top_k": 0}}
        more = {"best_of": samples, "best_by": best_by}
        wer[samples] = score_task(model, rows, "tts", judge=judge, settings=settings, **more).wer
    assert (wer[6] < wer[1] - 20) == (best_by == "judge")


@pytest.mark.parametrize("best_by", ["score", "reading"])
def test_a_task_is_scored_by_what_the_model_reads_best(best_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the settings that are kept beside the model say otherwise."""
    model, asked = speaking(), []

    def choose(self: ReadBack, documents: Any, found: Any) -> list[int]:
        asked.append([len(row) for row in found])
        return [0] * len(documents)

    monkeypatch.setattr(ReadBack, "__call__", choose)
    settings = {"speech": {"max_new_tokens": 3, "do_sample": True, "best_by": "reading"}}
    score_task(model, [{"text": "one"}], "tts", judge=Listener(), settings=settings, best_of=3, best_by=best_by)
    assert asked == [[3]] * (best_by == "reading")


def test_who_may_choose() -> None:
    with pytest.raises(ValueError, match="best_by must be one of"):
        score_task(speaking(), [{"text": "one"}], "asr", best_by="luck")
    with pytest.raises(ValueError, match="best of 0: at least 1 sample"):
        sampled({}, ["speech"], 0)
    kept = {"speech": {"top_k": 5}, "text": {"num_beams": 2}}
    assert sampled(kept, ["speech"], 1) == kept
    assert sampled(kept, ["speech"], 3) == {
        "speech": {"top_k": 5, "do_sample": True, "num_return_sequences": 3},
        "text": {"num_beams": 2},
    }

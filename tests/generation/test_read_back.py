"""Best of n by the model's own reading: the sample goes on from which it reads best what was to be said."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import doc, ids_of, limits, tiny_backbone, tiny_model

from zipper_lm import Document, Engine, Segment, ZipperModel
from zipper_lm.data.collation import collate
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.generation.settings import generation_config
from zipper_lm.models.baseline.expand import expand

TEXTS = [doc(("text", [7, 9, 4])), doc(("speech", [8, 5]), ("text", [5])), doc(("text", []))]
BEST = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 4, "seed": 3, "best_by": "reading"}


def zipped(**more: Any) -> ZipperModel:
    return tiny_model(gate=0.5, **more)


def read(model: ZipperModel, said: Segment, heard: Segment) -> float:
    """Log-probability of a text after a sound, by the loss of the model's own forward."""
    whole = Document([Segment("speech", ids=heard.ids), Segment("text", ids=said.ids, target=True)])
    with torch.no_grad():
        found = model(collate([whole], model.specials)).losses["text"]
    return -float(found) * (len(said.ids or []) + 1)


def test_what_is_read_best_goes_on() -> None:
    """By one forward over sound and text, EOS included, and its mean log-probability; the sum of those is another
    opinion, and so is reading alone."""
    model = zipped()
    by_score = 0
    for given, row in zip(TEXTS, model.generate(TEXTS, ["speech"], settings=limits(model, 8, **BEST), decode=False)):
        said, written = given[-1], row[-1]
        assert len({tuple(c.ids) for c in written.candidates}) > 1
        best = max(written.candidates, key=lambda c: read(model, said, c) + float(np.mean(c.logprobs)))
        assert (written.ids, written.logprobs) == (best.ids, best.logprobs)
        by_score += best.ids == max(written.candidates, key=lambda c: c.score).ids
    assert by_score < len(TEXTS), "else this test says little"


def test_an_engine_and_groups_choose_the_same() -> None:
    """Also where the segment is not the last, and its step is another's while somebody chooses."""
    model = zipped()
    settings = limits(model, 8, **BEST)
    settings["text"] = {"max_new_tokens": 4}
    plain = model.generate(TEXTS, ["speech", "text"], settings=settings, decode=False)
    with Engine(model, slots=8, compile=False) as engine:
        assert ids_of(model.generate(TEXTS, ["speech", "text"], settings=settings, engine=engine)) == ids_of(plain)
    again = model.generate(TEXTS, ["speech", "text"], settings=settings, decode=False)
    assert ids_of(again) == ids_of(plain)


def test_nothing_is_decoded_to_be_read_and_a_judge_goes_first() -> None:
    model, decoded = zipped(), list[int]()

    def decode(name: str, ids: list[list[int]]) -> list[tuple[int, ...]]:
        decoded.append(len(ids))
        return [tuple(row) for row in ids]

    model.processor = SimpleNamespace(  # type: ignore[assignment]
        codecs={"speech": SimpleNamespace(kind="ids", rate=None, vocab_size=53, decode=None)},
        encode=lambda documents: [Document(list(d)) for d in documents],
        decode=decode,
    )
    settings = {"speech": {**BEST, "max_new_tokens": 8}}
    model.generate(TEXTS, ["speech"], settings=settings, decode=False)
    assert decoded == []
    first = model.generate(TEXTS, ["speech"], settings=settings, choose=lambda d, c: [0] * len(d), decode=False)
    assert [d[-1].ids for d in first] == [d[-1].candidates[0].ids for d in first]
    assert decoded


@pytest.mark.parametrize("by_engine", [False, True])
def test_who_cannot_read_it_is_refused_before_anything_is_written(
    by_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zipper_lm.generation import request

    def never(*_: Any) -> None:
        raise AssertionError("something was written")

    deaf, model = zipped(zips=[ZipSpec(reader="speech", source="text", layers=3)]), zipped()
    monkeypatch.setattr(request, "write_segment", never)
    for who, given, message in (
        (deaf, TEXTS[0], "settings for 'speech': best_by='reading', but no tower reads 'speech': no zip"),
        (model, doc(("speech", [4])), r"needs something before 'speech' .* is read by \['text'\]"),
    ):
        with Engine(who, slots=8) if by_engine else nullcontext() as engine, pytest.raises(ValueError, match=message):
            who.generate([given], ["speech"], settings={"speech": BEST}, engine=engine)


def test_a_single_decoder_has_no_zips_to_read_with() -> None:
    codec = SimpleNamespace(vocab_size=9, bos_id=6, eos_id=7, pad_id=8, rate=None)
    codecs: Any = {"text": codec, "speech": codec}
    single = expand("text", tiny_backbone("llama", 9), codecs)
    with pytest.raises(ValueError, match="settings for 'speech': best_by='reading' is for zips"):
        single.generate([doc(("text", [3]))], ["speech"], settings={"speech": BEST})


def test_the_setting() -> None:
    with pytest.raises(ValueError, match="settings for 'speech': best_by must be 'score' or 'reading', got 'judge'"):
        generation_config("speech", {**BEST, "best_by": "judge"})
    with pytest.warns(UserWarning, match="best_by='reading' has no effect without num_return_sequences"):
        generation_config("speech", {"best_by": "reading"})
    assert generation_config("speech", BEST).best_by == "reading"

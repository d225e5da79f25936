"""Best of n: samples share what was read, are scored as a forward pass scores them, and one of them goes on."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, limits, often_ending, tiny_backbone, tiny_model

from zipper_lm import Document, Segment, ZipperModel
from zipper_lm.data.collation import IGNORED, collate
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder

RAGGED = [doc(("speech", [5, 6, 7, 8]), ("text", [7, 9])), doc(("text", [5, 6]), ("speech", [9]))]
SAMPLED = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5}
BEST = {**SAMPLED, "num_return_sequences": 3}


class Ids:
    """A codec of ids that stand for themselves."""

    kind, rate = "ids", None

    def __init__(self, size: int, first_special: int) -> None:
        self.vocab_size = size
        self.bos_id, self.eos_id, self.pad_id = range(first_special, first_special + 3)

    def encode(self, values: list) -> list:
        return [list(v) for v in values]

    def decode(self, ids: list) -> list:
        return [tuple(row) for row in ids]


def single() -> SingleDecoder:
    torch.manual_seed(0)
    codecs: dict[str, Any] = {"text": Ids(31, 0), "speech": Ids(53, 50)}
    return expand("text", tiny_backbone("llama", 31), codecs)


def zipped(kind: str = "llama") -> ZipperModel:
    return often_ending(tiny_model(gate=0.5, kinds={"text": kind}))


def seeded(model: Any, documents: Any, schedule: Any, **how: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(documents, schedule, **how)


def forward_logprobs(model: Any, document: Document, ended: bool) -> list[float]:
    """Of the last segment, by the model's own forward over the whole document."""
    last = document[-1]
    given = [replace(s, target=False) for s in document.segments[:-1]]
    whole = Document([*given, Segment(last.modality, ids=last.ids, target=True)])
    involved = [set(model.names)]
    batch = collate([whole], model.specials, involved=involved)
    with torch.no_grad():
        logits = model(batch).logits
    if isinstance(model, SingleDecoder):
        from zipper_lm.models.baseline.vocabulary import join

        logits, labels = logits["decoder"], join(batch, model.modalities).labels[:, 1:]
    else:
        logits, labels = logits[last.modality], batch[last.modality]["labels"][:, 1:]
    at = labels[0] != IGNORED
    found = logits[0, :-1][at].log_softmax(-1).gather(1, labels[0][at][:, None])[:, 0].tolist()
    return found if ended else found[:-1]


@pytest.mark.parametrize("make", [zipped, lambda: zipped("mamba"), lambda: zipped("lfm2"), single])
@pytest.mark.parametrize("name", ["text", "speech"])
def test_scores_are_those_of_a_forward_pass(make: Any, name: str) -> None:
    """Not those of the distribution that was drawn from, which temperature and suppressed ids change."""
    model = make()
    for given, row in zip(RAGGED, seeded(model, RAGGED, [name], settings={name: BEST}, decode=False)):
        assert len(row[-1].candidates) == 3
        assert len({tuple(c.ids) for c in row[-1].candidates}) > 1, "else this test says little"
        for candidate in row[-1].candidates:
            ended = len(candidate.logprobs) == len(candidate.ids) + 1
            assert ended or len(candidate.ids) == 8
            expected = forward_logprobs(model, Document([*given, candidate]), ended)
            torch.testing.assert_close(candidate.logprobs, expected, rtol=1e-3, atol=1e-4)
            assert candidate.score == sum(candidate.logprobs)


@pytest.mark.parametrize("make", [zipped, lambda: zipped("mamba"), single])
def test_the_likeliest_goes_on(make: Any) -> None:
    model = make()
    for row in seeded(model, RAGGED, ["speech", "text"], settings={"speech": BEST, "text": SAMPLED}, decode=False):
        best = max(row[-2].candidates, key=lambda c: c.score)
        assert (row[-2].ids, row[-2].logprobs) == (best.ids, best.logprobs)
        assert row[-1].candidates is None
        assert row[-1].logprobs is None


@pytest.mark.parametrize("make", [zipped, single])
@pytest.mark.parametrize("more", [{}, {"guidance_scale": 2.0}, {"stop_threshold": 0.3}, {"use_cache": False}], ids=str)
def test_samples_are_what_as_many_copies_of_the_document_write(make: Any, more: dict[str, Any]) -> None:
    model = make()
    alone, schedule = [RAGGED[0]], ["text", "speech"]
    together = seeded(model, alone, schedule[:1], settings={"text": {**BEST, **more}}, decode=False)[0]
    copies = seeded(model, alone * 3, schedule[:1], settings={"text": {**SAMPLED, **more}}, decode=False)
    assert [c.ids for c in together[-1].candidates] == [d[-1].ids for d in copies]
    assert len({tuple(c.ids) for c in together[-1].candidates}) > 1


def test_what_was_read_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample goes on from a copy of what the tower remembers; memory of the other tower is not copied at all."""
    model, given = zipped(), [doc(("speech", [5] * 9), ("text", [6] * 11), ("speech", [7]))]
    seen: list[tuple[int, int]] = []
    layer = model.tower("text").layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    seeded(model, given, ["text"], settings={"text": {**BEST, "min_new_tokens": 8}})
    assert seen[0] == (1, 13)  # BOS, 11 ids, EOS
    assert seen[1:9] == [(3, 1)] * 8  # BOS of the new segment, then a token a step
    assert seen[9:] == [(1, 10)] * 3  # each sample once, for its score
    assert {memory.keys.shape[0] for memory in _memories(model, given, monkeypatch)} == {1}


def _memories(model: ZipperModel, given: list[Document], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from zipper_lm.fusion.zips import ZipLayer

    used: list[Any] = []
    real = ZipLayer.forward

    def noting(self: ZipLayer, hidden: Any, positions: Any, *read: Any) -> Any:
        used.extend(read[:1])  # the memory, where one is read and not made
        return real(self, hidden, positions, *read)

    monkeypatch.setattr(ZipLayer, "forward", noting)
    seeded(model, given, ["text"], settings={"text": BEST})
    return used


@pytest.mark.parametrize("make", [zipped, single])
def test_one_sample_is_as_before(make: Any) -> None:
    model = make()
    plain, one, scored = (
        seeded(model, RAGGED, ["speech"], settings={"speech": {**SAMPLED, **more}}, decode=False)
        for more in ({}, {"num_return_sequences": 1}, {"output_scores": True})
    )
    assert ids_of(plain) == ids_of(one) == ids_of(scored)
    for a, b, c in zip(plain, one, scored):
        assert (a[-1].logprobs, a[-1].candidates, b[-1].logprobs, b[-1].candidates) == (None,) * 4
        assert c[-1].candidates is None
        assert len(c[-1].logprobs) >= len(c[-1].ids) > 0
    with pytest.raises(ValueError, match="has no logprobs; output_scores asks for them"):
        _ = plain[0][-1].score


def test_beams_can_be_candidates_too() -> None:
    model = zipped()
    settings = {"text": {"max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 2}}
    for given, row in zip(RAGGED, model.generate(RAGGED, ["text"], settings=settings)):
        assert len({tuple(c.ids) for c in row[-1].candidates}) == 2
        for c in row[-1].candidates:
            ended = len(c.logprobs) == len(c.ids) + 1
            expected = forward_logprobs(model, Document([*given, c]), ended)
            torch.testing.assert_close(c.logprobs, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [zipped, single])
def test_somebody_else_may_choose(make: Any) -> None:
    model = make()
    model.processor = SimpleNamespace(  # type: ignore[assignment]
        codecs={"speech": Ids(53, 50)}, encode=copy.deepcopy, decode=lambda name, ids: [tuple(row) for row in ids]
    )
    asked: list[Any] = []

    def shortest(documents: Any, candidates: Any) -> list[int]:
        asked.append(([d.modalities for d in documents], [[c.value for c in row] for row in candidates]))
        return [min(range(3), key=lambda i: len(row[i].ids)) for row in candidates]

    rows = seeded(model, RAGGED, ["speech", "text"], settings={"speech": BEST, "text": SAMPLED}, choose=shortest)
    ((before, values),) = asked
    assert before == [["speech", "text"], ["text", "speech"]]
    for row, heard in zip(rows, values):
        chosen = row[-2]
        assert len(chosen.ids) == min(len(c.ids) for c in chosen.candidates)
        assert heard == [tuple(c.ids) for c in chosen.candidates]
        assert [c.value for c in chosen.candidates] == heard
        assert chosen.value == tuple(chosen.ids)
    with pytest.raises(ValueError, match=r"choose: 2 documents with 3 candidates each, but it chose \[3, 0\]"):
        model.generate(RAGGED, ["speech"], settings={"speech": BEST}, choose=lambda d, c: [3, 0])
    with pytest.raises(ValueError, match=r"but it chose \[0\]"):
        model.generate(RAGGED, ["speech"], settings={"speech": BEST}, choose=lambda d, c: [0])


def test_it_goes_with_every_kind_of_schedule() -> None:
    model = zipped()
    with torch.no_grad():
        for head in model.handover.values():
            head[1].weight.zero_()
            head[1].bias.copy_(torch.tensor([0.0, 5.0, -5.0]))  # always text, never done
    row = seeded(model, RAGGED[0], "auto", max_segments=2, settings=dict.fromkeys(model.names, BEST))
    assert [len(s.candidates or []) for s in row] == [0, 0, 3, 3]


def test_the_tokens_of_several_samples_are_no_stream() -> None:
    model = zipped()
    with pytest.raises(ValueError, match="'text': the tokens of 3 samples cannot be streamed"):
        list(model.stream(RAGGED[0], ["text"], settings={"text": BEST}))


def test_samples_of_proposed_tokens() -> None:
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens goes with greedy search and a single sample only"):
        zipped().generate(RAGGED[:1], "text", prompt_lookup_num_tokens=2, **BEST)


def test_targets_in_what_is_given_are_not_scored() -> None:
    model = zipped("mamba")  # which reads everything again
    given = [doc(("text", [7, 8]), ("speech", [5]), target=True)]
    row = seeded(model, given, ["text"], settings={"text": {**limits(model, 5)["text"], "output_scores": True}})[0]
    assert len(row[-1].logprobs) <= len(row[-1].ids) + 1
    torch.testing.assert_close(
        row[-1].logprobs,
        forward_logprobs(model, row, ended=len(row[-1].logprobs) > len(row[-1].ids)),
        rtol=1e-3,
        atol=1e-4,
    )

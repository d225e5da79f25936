"""Documents drawn from rows: which task, which twins, and two rows end to end."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import pytest
from tiny_recipes import workshop
from torch.utils.data import DataLoader

from zipper_lm.codecs.codec import load_codec
from zipper_lm.codecs.pixels import PixelCodec
from zipper_lm.data.collation import Specials, collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.encoding import Joined
from zipper_lm.data.mixture import TaskMixture, join_rows, joiners
from zipper_lm.data.sources.readers import read_rows

ROWS = [{"speech": f"{i}.wav", "text": f"text {i // 2}"} for i in range(7)]  # pairs say the same, the last is alone


def values(document):
    return [(s.modality, s.value) for s in document]


def test_first_row_that_lacks_a_modality():
    with pytest.raises(ValueError, match="the row has no 'image'"):
        TaskMixture(ROWS, {"image->text": 1})


def test_mixture_follows_the_weights():
    rows = [{"speech": "a.wav", "text": "a"}] * 2000
    mixture = TaskMixture(rows, {"speech->text": 3, "text->speech": 1, "speech->text->speech": 0})
    counts = Counter(tuple(document.modalities) for document in mixture)
    assert set(counts) == {("speech", "text"), ("text", "speech")}
    assert abs(counts["speech", "text"] / 2000 - 0.75) < 0.04  # four standard deviations


def test_draws_depend_on_seed_epoch_and_index_alone():
    weights = {"speech->text": 1, "text->speech": 1}
    rows = ROWS * 10
    mixture, again = TaskMixture(rows, weights, seed=3), TaskMixture(rows, weights, seed=3)
    first = [d.modalities for d in mixture]
    assert [again[i].modalities for i in reversed(range(len(rows)))] == first[::-1]
    assert mixture[-1].modalities == first[-1]
    mixture.set_epoch(1)
    second = [d.modalities for d in mixture]
    assert second != first
    mixture.set_epoch(0)
    assert [d.modalities for d in mixture] == first
    assert [d.modalities for d in TaskMixture(rows, weights, seed=4)] != first
    with pytest.raises(IndexError):
        mixture[len(rows)]


def test_twins_are_other_rows_with_the_same_text():
    mixture = TaskMixture(ROWS, {"speech->text->speech": 1})
    for i, document in enumerate(mixture):
        twin = i if i == 6 else i ^ 1
        assert values(document) == [("speech", f"{i}.wav"), ("text", f"text {i // 2}"), ("speech", f"{twin}.wav")]
        assert [s.target for s in document] == [False, True, True]


def test_twins_vary_between_epochs():
    rows = [{"speech": f"{i}.wav", "text": "same"} for i in range(20)]
    mixture = TaskMixture(rows, {"speech->text->speech": 1})
    seen = set()
    for epoch in range(10):
        mixture.set_epoch(epoch)
        seen.add(mixture[0][2].value)
    assert len(seen) > 3
    assert "0.wav" not in seen


def test_rows_without_equal_strings_are_no_twins():
    mixture = TaskMixture([{"speech": b"RIFF", "text": "a"}] * 2, {"text->speech->text": 1})
    assert values(mixture[0]) == [("text", "a"), ("speech", b"RIFF"), ("text", "a")]
    only_text = TaskMixture([{"text": "a"}, {"text": "b"}], {"text->text": 1})
    assert values(only_text[0]) == [("text", "a"), ("text", "a")]


def test_twins_through_readers():
    mixture = TaskMixture(
        read_rows([{"audio": r["speech"], "sentence": r["text"]} for r in ROWS]), {"speech->text->speech": 1}
    )
    assert [s.value for s in mixture[2]] == ["2.wav", "text 1", "3.wav"]


def test_interleaving_joins_two_rows():
    mixture = TaskMixture(ROWS, {"speech->text": 1}, interleave=1.0)
    for i, document in enumerate(mixture):
        assert document.modalities == ["speech", "text", "speech", "text"]
        assert [s.target for s in document] == [False, True, False, True]
        assert document[0].value == f"{i}.wav"
        assert document[2].value != document[0].value
    some = TaskMixture(ROWS * 100, {"speech->text": 1}, interleave=0.25)
    share = sum(len(d) == 4 for d in some) / len(some)
    assert abs(share - 0.25) < 0.07
    assert len(TaskMixture(ROWS[:1], {"speech->text": 1}, interleave=1.0)[0]) == 2


def test_whole_documents_pass_unchanged():
    whole = Document([Segment("text", "a"), Segment("speech", "a.wav", target=True)])
    assert TaskMixture([whole], {})[0] is whole
    mixed = TaskMixture([whole, ROWS[0], ROWS[1]], {"speech->text->speech": 1}, interleave=1.0)
    assert mixed[0] is whole
    assert mixed[1][2].value == "1.wav"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"speech->text": 0}}, "at least one task a weight above zero"),
        ({"weights": {}}, "at least one task a weight above zero"),
        ({"weights": {"speech->text": -1}}, "weight of 'speech->text' must be a finite number from 0, got -1"),
        ({"weights": {"speech->text": math.nan}}, "must be a finite number"),
        ({"weights": {"speech->text": math.inf}}, "must be a finite number"),
        ({"weights": {"speech->text": "1"}}, "must be a finite number"),
        ({"weights": {"speech->text": True}}, "must be a finite number"),
        ({"weights": {"speech->video": 1}, "towers": ["speech", "text", "image"]}, "unknown modality 'video'"),
        ({"rows": []}, "there are no rows"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"interleave": 1.5}, "interleave must be between 0 and 1, got 1.5"),
        ({"interleave": math.nan}, "interleave must be between 0 and 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TaskMixture(**({"rows": ROWS, "weights": {"speech->text": 1}} | change))


def test_row_among_documents_needs_a_task():
    whole = Document([Segment("text", "a", target=True)])
    with pytest.raises(ValueError, match="at least one task"):
        TaskMixture([whole, ROWS[0]], {})


def test_workers_that_outlive_an_epoch_see_the_new_one():
    mixture = TaskMixture(ROWS * 4, {"speech->text": 1, "text->speech": 1})
    loader = DataLoader(mixture, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        assert [d.modalities for d in loader] == [d.modalities for d in mixture]


# Two rows end to end


@cache
def codecs():
    return {name: load_codec(workshop() / name) for name in ("text", "speech")}


def coded_row(number, text):
    ids = codecs()["text"].encode([text])[0]
    return {"speech": Segment("speech", ids=[number, number + 1]), "text": Segment("text", value=text, ids=ids)}


def test_text_is_encoded_anew_and_sound_follows_sound():
    how = joiners(codecs(), ["speech", "text"])
    joined = join_rows(coded_row(3, "one two"), coded_row(5, "six"), how)
    assert joined["speech"] == Segment("speech", ids=[3, 4, 5, 6])
    assert joined["text"].value == "one two six"
    assert joined["text"].ids == codecs()["text"].encode(["one two six"])[0]


def test_a_word_may_be_spelled_otherwise_behind_a_space():
    """Tokenizers such as GPT-2's have other ids for a word with a space before it than for one at the start."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from zipper_lm.codecs.text import TextCodec

    bare = Tokenizer(models.WordLevel({"<s>": 0, "one": 1, "▁one": 2, "▁two": 3, "two": 4}, unk_token="<s>"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<s>", unk_token="<s>"))
    parts = [Segment("text", value=text, ids=codec.encode([text])[0]) for text in ("one", "two")]
    assert [p.ids for p in parts] == [[1], [4]]
    assert joiners({"text": codec}, ["text"])["text"](*parts).ids == [1, 3]


def test_pictures_are_refused():
    with pytest.raises(ValueError, match="'image' cannot be joined end to end"):
        joiners({"image": PixelCodec.make(height=2, width=2, levels=4)}, ["image"])
    with pytest.raises(ValueError, match="'other' cannot be joined"):
        joiners({}, ["other"])


CODED = [coded_row(2 * n, text) for n, text in enumerate(["one", "two", "six", "one six"])]


def lengths(mixture):
    return [len(document.last("speech").ids) for document in mixture]


def test_a_share_of_rows_is_joined():
    mixture = TaskMixture(CODED * 100, {"speech->text": 1}, join=0.25, how=joiners(codecs(), ["speech", "text"]))
    found = lengths(mixture)
    assert set(found) == {2, 4}
    assert abs(found.count(4) / len(found) - 0.25) < 0.07
    assert lengths(mixture) == found, "drawn by seed, epoch and index alone"
    mixture.set_epoch(1)
    assert lengths(mixture) != found
    for document in mixture:
        assert document[1].ids == codecs()["text"].encode([document[1].value])[0]


def test_joined_in_one_task_only():
    """Longer rows help a model to read and keep one that learns to speak from starting: a share for each task."""
    tasks = {"speech->text": 1, "text->speech": 1}
    how = joiners(codecs(), ["speech", "text"])
    one, both = (TaskMixture(CODED * 100, tasks, join=j, how=how) for j in ({"speech->text": 0.5}, 0.5))
    targets = [(document[-1].modality, len(document[0].ids or []), document) for document in one]
    plain = {len(row["speech"].ids or []) for row in CODED} | {len(row["text"].ids or []) for row in CODED}
    heard = [length for target, length, _ in targets if target == "text"]
    assert max(heard) > max(plain)
    assert {length for target, length, _ in targets if target == "speech"} <= plain
    # Where both may be joined, those of the first task are the same.
    same = [(a, b) for (target, _, a), b in zip(targets, both, strict=True) if target == "text"]
    assert all(a == b for a, b in same)
    for join, message in (({"text": 0.5}, "join names"), ({"speech->text": 2}, "join of 'speech->text' must be")):
        with pytest.raises(ValueError, match=message):
            TaskMixture(CODED, tasks, join=join, how=how)


def test_what_is_joined_is_never_a_row_with_itself():
    mixture = TaskMixture(CODED, {"speech->text": 1}, join=0.99, how=joiners(codecs(), ["speech", "text"]))
    for epoch in range(20):
        mixture.set_epoch(epoch)
        for document in mixture:
            ids = document.last("speech").ids
            assert len(ids) == 2 or ids[0] != ids[2]
    assert lengths(TaskMixture(CODED[:1], {"speech->text": 1}, join=0.99, how={})) == [2]


def test_without_join_the_draws_are_as_they_were():
    """A recipe that does not join has the documents that it had before there was `join`."""
    tasks = {"speech->text": 1, "text->speech": 1}
    plain = TaskMixture(CODED * 5, tasks, seed=3, interleave=0.5)
    assert [len(d) for d in plain][:8] == [4, 4, 4, 2, 2, 2, 2, 2]


def test_joining_and_interleaving_go_together():
    how = joiners(codecs(), ["speech", "text"])
    mixture = TaskMixture(CODED, {"speech->text": 1}, interleave=1.0, join=0.99, how=how)
    document = mixture[0]
    assert document.modalities == ["speech", "text"] * 2
    assert [len(s.ids) for s in document if s.modality == "speech"] == [4, 4]


def test_documents_are_not_joined():
    whole = Document([Segment("text", "a", ids=[5], target=True)])
    mixture = TaskMixture([CODED[0], whole], {"speech->text": 1}, join=0.99, how=joiners(codecs(), ["speech", "text"]))
    assert lengths(mixture[n] for n in (0,)) == [2]
    assert mixture[1] is whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"join": 1.5}, "join of .* must be between 0 and 1, got 1.5"),
        ({"join": 0.5, "weights": {"speech->text->speech": 1}}, "join cannot be used with 'speech->text->speech'"),
    ],
)
def test_bad_settings_of_join(change, message):
    with pytest.raises(ValueError, match=message):
        TaskMixture(**({"rows": CODED, "weights": {"speech->text": 1}, "how": {}} | change))


# Lengths


SAID = ["one", "two", "six", "one six"]
WHOLE = Document([Segment("text", "a", ids=[5]), Segment("speech", ids=[3] * 9, target=True), Segment("text", ids=[6])])
SETTINGS = [
    ({"speech->text": 1, "text->speech": 1}, {}),
    ({"speech->text": 1, "->text": 3, "->speech": 2}, {}),
    ({"speech->text->speech": 1, "text->speech": 1}, {}),
    ({"speech->text": 1, "->text": 1}, {"interleave": 0.4}),
    ({"speech->text": 1, "->text": 1}, {"join": {"speech->text": 0.5}}),
    ({"speech->text": 1, "text->speech->text": 1}, {"join": {"speech->text": 0.5}, "interleave": 0.4}),
    ({"text->text": 1}, {"interleave": 1.0}),
]


def uneven(count):
    """Rows of lengths of their own, some of which say the same."""
    return [
        {"speech": Segment("speech", ids=[3] * (n % 17)), "text": coded_row(0, SAID[n % 4])["text"]}
        for n in range(count)
    ]


def collated(mixture):
    specials = {name: Specials(0, 1, 2) for name in ("text", "speech")}
    streams = [collate([document], specials).values() for document in mixture]
    return [max(int((stream["segments"] >= 0).sum()) for stream in found) for found in streams]


@pytest.mark.parametrize(("tasks", "settings"), SETTINGS)
@pytest.mark.parametrize("rows", [[*uneven(40), WHOLE], uneven(1), Joined(uneven(20), [WHOLE], uneven(9))])
def test_lengths_are_those_of_the_batch(rows, tasks, settings):
    """Grouping took a tower's longest segment for its stream, and the first epoch's draw for that of every epoch."""
    mixture = TaskMixture(rows, tasks, seed=5, how=joiners(codecs(), ["speech", "text"]), **settings)
    for epoch in (0, 3):
        mixture.set_epoch(epoch)
        assert mixture.lengths().tolist() == collated(mixture)


@pytest.mark.parametrize(("tasks", "settings"), SETTINGS)
def test_the_draw_of_all_rows_is_that_of_each(tasks, settings):
    mixture = TaskMixture(uneven(80), tasks, seed=5, how=joiners(codecs(), ["speech", "text"]), **settings)
    numbers, alone = mixture._drawn()
    for index in range(80):
        first, *further = mixture._draw(index)
        if alone[index]:
            assert not further
            assert first.partner is None
            assert not any(first.twins.values())
            assert sorted(first.task.modalities) == sorted(mixture.tasks[numbers[index]].modalities)


def test_lengths_of_whole_documents_need_no_task():
    mixture = TaskMixture([WHOLE, WHOLE], {}, interleave=0.5)
    assert mixture.lengths().tolist() == [11, 11] == collated(mixture)

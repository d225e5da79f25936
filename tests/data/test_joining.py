"""Two rows end to end."""

from __future__ import annotations

import pytest
from tiny_recipes import workshop

from zipper_lm.codecs.codec import load_codec
from zipper_lm.codecs.pixels import PixelCodec
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.joining import join_rows, joiners
from zipper_lm.data.tasks import TaskMixture


def codecs():
    return {name: load_codec(workshop() / name) for name in ("text", "speech")}


def row(number, text):
    ids = codecs()["text"].encode([text])[0]
    return {"speech": Segment("speech", ids=[number, number + 1]), "text": Segment("text", value=text, ids=ids)}


def test_text_is_encoded_anew_and_sound_follows_sound():
    how = joiners(codecs(), ["speech", "text"])
    joined = join_rows(row(3, "one two"), row(5, "six"), how)
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


ROWS = [row(2 * n, text) for n, text in enumerate(["one", "two", "six", "one six"])]


def lengths(mixture):
    return [len(document.last("speech").ids) for document in mixture]


def test_a_share_of_rows_is_joined():
    mixture = TaskMixture(ROWS * 100, {"speech->text": 1}, join=0.25, how=joiners(codecs(), ["speech", "text"]))
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
    one, both = (TaskMixture(ROWS * 100, tasks, join=j, how=how) for j in ({"speech->text": 0.5}, 0.5))
    targets = [(document[-1].modality, len(document[0].ids or []), document) for document in one]
    plain = {len(row["speech"].ids or []) for row in ROWS} | {len(row["text"].ids or []) for row in ROWS}
    heard = [length for target, length, _ in targets if target == "text"]
    assert max(heard) > max(plain)
    assert {length for target, length, _ in targets if target == "speech"} <= plain
    # Where both may be joined, those of the first task are the same.
    same = [(a, b) for (target, _, a), b in zip(targets, both, strict=True) if target == "text"]
    assert all(a == b for a, b in same)
    for join, message in (({"text": 0.5}, "join names"), ({"speech->text": 2}, "join of 'speech->text' must be")):
        with pytest.raises(ValueError, match=message):
            TaskMixture(ROWS, tasks, join=join, how=how)


def test_what_is_joined_is_never_a_row_with_itself():
    mixture = TaskMixture(ROWS, {"speech->text": 1}, join=0.99, how=joiners(codecs(), ["speech", "text"]))
    for epoch in range(20):
        mixture.set_epoch(epoch)
        for document in mixture:
            ids = document.last("speech").ids
            assert len(ids) == 2 or ids[0] != ids[2]
    assert lengths(TaskMixture(ROWS[:1], {"speech->text": 1}, join=0.99, how={})) == [2]


def test_without_join_the_draws_are_as_they_were():
    """A recipe that does not join has the documents that it had before there was `join`."""
    tasks = {"speech->text": 1, "text->speech": 1}
    plain = TaskMixture(ROWS * 5, tasks, seed=3, interleave=0.5)
    assert [len(d) for d in plain][:8] == [4, 4, 4, 2, 2, 2, 2, 2]


def test_joining_and_interleaving_go_together():
    how = joiners(codecs(), ["speech", "text"])
    mixture = TaskMixture(ROWS, {"speech->text": 1}, interleave=1.0, join=0.99, how=how)
    document = mixture[0]
    assert document.modalities == ["speech", "text"] * 2
    assert [len(s.ids) for s in document if s.modality == "speech"] == [4, 4]


def test_documents_are_not_joined():
    whole = Document([Segment("text", "a", ids=[5], target=True)])
    mixture = TaskMixture([ROWS[0], whole], {"speech->text": 1}, join=0.99, how=joiners(codecs(), ["speech", "text"]))
    assert lengths(mixture[n] for n in (0,)) == [2]
    assert mixture[1] is whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"join": 1.5}, "join of .* must be between 0 and 1, got 1.5"),
        ({"join": 0.5, "weights": {"speech->text->speech": 1}}, "join cannot be used with 'speech->text->speech'"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TaskMixture(**({"rows": ROWS, "weights": {"speech->text": 1}, "how": {}} | change))

"""The demo's splits: disjoint where they must be, balanced, the same every time."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from zipper_lm.demo.corpus import ACCENT, DIGITS, SPEEDS, WORDS, DemoCorpus, Utterance, commands, demo_corpus, render

OWN = ("test", "validation", "judge")  # splits that share neither sentences nor speakers with any other


@pytest.fixture(scope="module")
def corpus() -> DemoCorpus:
    return demo_corpus(0)


@cache
def small_corpus(seed: int) -> DemoCorpus:
    return demo_corpus(seed, unaligned_text=3000, unaligned_speech=500, judge=500)


def texts(corpus: DemoCorpus, split: str) -> list[str]:
    return [getattr(item, "text", item) for item in getattr(corpus, split)]


def variants(corpus: DemoCorpus, split: str) -> set[str]:
    return {u.voice.variant for u in getattr(corpus, split) if isinstance(u, Utterance)}


SPLITS = ("unaligned_text", "unaligned_speech", "judge", "train", "validation", "test")


@pytest.mark.parametrize(("one", "other"), [p for p in combinations(SPLITS, 2) if set(p) & set(OWN)])
@pytest.mark.parametrize("seed", [0, 7])
def test_held_out_sentences_and_speakers_are_held_out(one: str, other: str, seed: int) -> None:
    drawn = small_corpus(seed)
    assert not set(texts(drawn, one)) & set(texts(drawn, other))
    assert not variants(drawn, one) & variants(drawn, other)


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_is_half_digits_half_commands(corpus: DemoCorpus, split: str) -> None:
    sentences = texts(corpus, split)
    digits = [s for s in sentences if set(s.split()) <= set(DIGITS)]
    assert abs(len(digits) - len(sentences) / 2) <= 1
    assert {2, 3, 4, 5} <= {len(s.split()) for s in digits} <= {1, 2, 3, 4, 5}


def test_sizes_and_distinctness(corpus: DemoCorpus) -> None:
    """Of a thousand voices 52 had the accent and speed of the rest: the speech tower knew its sounds by heart."""
    assert [len(getattr(corpus, s)) for s in SPLITS] == [20_000, 4_000, 4_000, 1_200, 60, 100]
    for split in ("validation", "test"):
        assert len(set(texts(corpus, split))) == len(texts(corpus, split))
    assert len(variants(corpus, "test")) >= 8
    assert len({u.voice for u in corpus.train}) >= 300


@pytest.mark.parametrize("split", [s for s in SPLITS if s != "judge"])
def test_the_judge_knows_more_than_is_fused(corpus: DemoCorpus, split: str) -> None:
    """All of the grammar in all accents is more than the demo's minutes teach."""
    speakers = [u.voice for u in getattr(corpus, split) if isinstance(u, Utterance)]
    assert {word for s in texts(corpus, split) for word in s.split()} <= WORDS
    assert {voice.language for voice in speakers} <= {ACCENT}
    assert {voice.speed for voice in speakers} <= set(SPEEDS)
    assert len({word for s in texts(corpus, "judge") for word in s.split()}) > 2 * len(WORDS)
    assert len({u.voice.language for u in corpus.judge}) > 4


def test_train_knows_every_word_of_the_test(corpus: DemoCorpus) -> None:
    known = {word for sentence in texts(corpus, "train") for word in sentence.split()}
    assert {word for sentence in texts(corpus, "test") for word in sentence.split()} <= known


def test_grammar_is_small_in_words_and_large_in_sentences() -> None:
    sentences = [s for group in commands() for s in group]
    assert len(set(sentences)) == len(sentences) > 2000
    words = {word for s in sentences for word in s.split()} | set(DIGITS)
    assert 60 <= len(words) <= 120
    assert "add bread and milk to my list" in sentences
    assert "add milk and milk to my list" not in sentences


def test_same_seed_same_corpus_and_one_size_changes_no_other_split(corpus: DemoCorpus) -> None:
    again = small_corpus(0)
    assert (again.test, again.validation, again.train) == (corpus.test, corpus.validation, corpus.train)
    assert len(again.judge) == 500
    assert small_corpus(7).test != corpus.test


def test_a_split_larger_than_its_pool_repeats_sentences_but_keeps_to_its_pool(corpus: DemoCorpus) -> None:
    large = texts(demo_corpus(0, test=2000, unaligned_text=2), "test")
    assert len(large) == 2000
    assert not set(large) & set(texts(corpus, "unaligned_text"))


def test_sound_is_rendered_lazily_in_order_with_progress(corpus: DemoCorpus) -> None:
    pytest.importorskip("espeakng_loader")
    heard: list[tuple[int, int]] = []
    waves = render(corpus.test[:3], lambda done, total: heard.append((done, total)))
    assert heard == []
    first, *rest = waves
    assert heard == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(first, corpus.test[0].render())
    assert all(wave.dtype == np.float32 for wave in rest)


def test_sizes_below_two_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train .*2.*1"):
        demo_corpus(train=1)


def test_every_train_sentence_is_read_by_several_voices(corpus: DemoCorpus) -> None:
    read = demo_corpus(0, train_readings=3).train
    sentences = texts(corpus, "train")
    assert [u.text for u in read] == 3 * sentences
    voices = [{u.voice for u in read[i :: len(sentences)]} for i in range(len(sentences))]
    assert sum(map(len, voices)) > 2.9 * len(sentences)
    assert read[: len(sentences)] == corpus.train
    with pytest.raises(ValueError, match="train_readings must be at least 1"):
        demo_corpus(0, train_readings=0)

"""Error rates: counted by hand, over the corpus, with an interval."""

import numpy as np
import pytest

from zipper_lm.evaluation.word_error_rate import (
    bootstrap_interval,
    normalise,
    normaliser_of,
    paired_interval,
    word_error_rate,
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  Three, ONE\tfour!\n", "three one four"),
        ("don’t 'shout'", "don't shout"),
        ("forty-five_six", "forty five six"),
        ("Élan — naïve", "élan naïve"),
        ("...", ""),
        ("हिन्दी में, बात।", "हिन्दी में बात"),
        ("می\u200cخواهم", "میخواهم"),
        ("បាន\u200bទៅ", "បាន ទៅ"),
        ("i ❤\ufe0f you 1\ufe0f\u20e3", "i you 1"),
        ("☺\ufe0f", ""),
    ],
)
def test_normalise(text: str, clean: str) -> None:
    assert normalise(text) == clean


def test_rates_and_counts_by_hand() -> None:
    rates = word_error_rate(["one two three", "four", "five six"], ["one too three", "", "five six seven"])
    assert (rates.substitutions, rates.deletions, rates.insertions) == (1, 1, 1)
    assert (rates.words, rates.utterances) == (6, 3)
    assert rates.wer == pytest.approx(100 * 3 / 6)
    # characters: w->o, "four" missing, " seven" added, of 13 + 4 + 8
    assert rates.cer == pytest.approx(100 * (1 + 4 + 6) / 25)


def test_rates_are_over_the_corpus_not_a_mean_of_utterances() -> None:
    assert word_error_rate(["one", "one two three four"], ["two", "one two three four"]).wer == pytest.approx(20)


def test_case_and_punctuation_do_not_count() -> None:
    rates = word_error_rate(["Turn on the light."], ["turn ON the light"])
    assert (rates.wer, rates.cer) == (0, 0)


def test_vowel_signs_count() -> None:
    """Marks were cut out of words as punctuation is: in scripts that write vowels as marks, wrong words were right."""
    rates = word_error_rate(["वह की बात"], ["वह को बात"])
    assert (rates.wer, rates.words) == (pytest.approx(100 / 3), 3)
    assert rates.cer > 0


def test_interval_holds_the_rate_is_seeded_and_narrows_with_data() -> None:
    references, hypotheses = ["one two"] * 20, ["one two"] * 15 + ["one"] * 5
    low, high = bootstrap_interval(references, hypotheses, seed=1)
    assert 0 <= low < word_error_rate(references, hypotheses).wer < high
    assert (low, high) == bootstrap_interval(references, hypotheses, seed=1)
    wide, narrow = (bootstrap_interval(references * n, hypotheses * n) for n in (1, 20))
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2
    assert bootstrap_interval(["one"], ["one"]) == (0, 0)


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([], [], "references must hold at least one"),
        (["one"], [], "got 1 and 0"),
        (["one", " . "], ["one", "two"], r"references\[1\]"),
    ],
)
def test_what_has_no_rate_is_refused(references: list[str], hypotheses: list[str], message: str) -> None:
    for function in (word_error_rate, bootstrap_interval):
        with pytest.raises(ValueError, match=message):
            function(references, hypotheses)


def test_settings_of_the_interval_are_checked() -> None:
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(["one"], ["one"], level=95)
    with pytest.raises(ValueError, match="samples"):
        bootstrap_interval(["one"], ["one"], samples=0)


def test_paired_interval_sees_what_two_intervals_do_not():
    """Two systems with the same hard utterances: their own intervals overlap, the paired one is clear of zero."""
    references = ["one two three four"] * 60
    hard = ["nine nine nine nine"] * 20
    ours = hard + ["one two three four"] * 40
    theirs = hard + ["one two three nine"] * 20 + ["one two three four"] * 20
    difference, low, high = paired_interval(references, [ours], [theirs])
    assert difference == pytest.approx(100 * -20 / 240)
    assert low < difference < high < 0
    assert bootstrap_interval(references, ours)[1] > bootstrap_interval(references, theirs)[0]
    assert paired_interval(references, [theirs], [theirs]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same length"):
        paired_interval(references, [ours[1:]], [theirs])
    with pytest.raises(ValueError, match="same number of seeds"):
        paired_interval(references, [ours, ours], [theirs])


def test_the_same_answers_again_are_no_new_evidence():
    """Seeds that answer alike do not narrow the interval: their utterances used to be drawn as if they were others."""
    references = ["one two"] * 40
    ours, theirs = ["one two"] * 30 + ["one nine"] * 10, ["one two"] * 22 + ["nine two"] * 18
    once, thrice = (paired_interval(references, [ours] * n, [theirs] * n) for n in (1, 3))
    assert thrice == pytest.approx(once, abs=1.0)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds: int) -> None:
    """Two or three seeds, drawn with replacement, gave intervals that held the truth in two cases of three."""
    rng = np.random.default_rng(0)
    said = ["one", "two", "three", "four", "five"]
    references = [" ".join(said)] * 40
    held = 0
    for _ in range(100):
        rates = 0.3 + 0.09 * rng.standard_normal((2, seeds))  # both systems are alike, their seeds are not
        wrong = rng.random((2, seeds, 40, 5)) < rates[:, :, None, None]
        ours, theirs = ([[" ".join(np.where(row, "no", said)) for row in run] for run in x] for x in wrong)
        _, low, high = paired_interval(references, ours, theirs, samples=200)
        held += low <= 0 <= high
    assert held >= 92


def test_seeds_that_differ_widen_the_interval():
    references = ["one two"] * 40
    good, bad = ["one two"] * 40, ["nine nine"] * 40
    steady = paired_interval(references, [["one two"] * 20 + ["nine nine"] * 20] * 2, [bad] * 2)
    unsteady = paired_interval(references, [good, bad], [bad] * 2)
    assert unsteady[0] == steady[0]
    assert unsteady[2] - unsteady[1] > 2 * (steady[2] - steady[1])


def test_the_fields_english_normaliser() -> None:
    clean = normaliser_of("whisper-english")
    assert clean("Mr. Smith, um, didn't pay $5.20 for [noise] twenty-one!") == "mister smith did not pay $5.20 for 21"
    assert clean("...") == clean("um") == ""
    assert clean("colour") != clean("color"), "it has no table of spellings here"
    said, heard = ["Mister Smith can't come at twenty past."], ["Mr. Smith can not come at 20 past"]
    assert word_error_rate(said, heard).wer > 40
    assert word_error_rate(said, heard, clean).wer == 0
    assert bootstrap_interval(said, heard, clean=clean) == (0, 0)
    assert paired_interval(said, [heard], [said], clean=clean) == (0, 0, 0)
    with pytest.raises(ValueError, match="holds no words"):
        word_error_rate(["um"], ["um"], clean)
    with pytest.raises(ValueError, match=r"normaliser must be one of \['plain', 'whisper-english'\], got 'english'"):
        normaliser_of("english")

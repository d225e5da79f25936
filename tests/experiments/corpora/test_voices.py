"""Synthetic voices: distinct, deterministic, at 16 kHz."""

import sys

import numpy as np
import pytest

from zipper_lm.experiments.corpora.voices import SAMPLE_RATE, VARIANTS, Voice, synthesise, voices

pytest.importorskip("espeakng_loader")
TEXT = "three one four"


def test_voices_are_distinct_and_depend_on_the_seed() -> None:
    many = voices(300, seed=3)
    assert len(set(many)) == len({v.name for v in many}) == 300
    assert many == voices(300, seed=3)
    assert many != voices(300, seed=4)
    assert len({v.variant for v in voices(len(VARIANTS))}) == len(VARIANTS)


def test_same_text_voice_and_seed_give_the_same_samples_whatever_was_said_before() -> None:
    klatt, other = Voice(variant="klatt2"), Voice(language="en-029", variant="iven")
    first = {seed: synthesise(TEXT, other, seed) for seed in (None, 1)}
    synthesise("seven seven", klatt)
    for seed, wave in first.items():
        np.testing.assert_array_equal(wave, synthesise(TEXT, other, seed))


@pytest.mark.parametrize("voice", voices(len(VARIANTS), seed=1), ids=lambda v: v.variant)
def test_every_variant_speaks_sound_of_plausible_length(voice: Voice) -> None:
    wave = synthesise(TEXT, voice)
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert np.abs(wave).max() <= 1
    assert np.sqrt(np.mean(wave**2)) > 0.005
    assert 0.6 < len(wave) / SAMPLE_RATE < 2.5


def test_voice_settings_are_heard() -> None:
    slow, quick = (synthesise(TEXT, Voice(variant="m1", speed=s)) for s in (120, 240))
    assert len(slow) > 1.5 * len(quick)
    low, high = (fundamental(synthesise(TEXT, Voice(variant="m3", pitch=p))) for p in (20, 80))
    assert high > 1.2 * low


def test_a_seed_makes_utterances_of_one_speaker_differ() -> None:
    voice = Voice(variant="f2")
    a, b = synthesise(TEXT, voice, seed=1), synthesise(TEXT, voice, seed=2)
    assert len(a) != len(b)
    assert np.any(a[: SAMPLE_RATE // 50])  # low noise even before the speech
    assert not np.any(synthesise(TEXT, voice)[: SAMPLE_RATE // 50])


def fundamental(wave: np.ndarray) -> float:
    """Median pitch in Hz, by autocorrelation of 60 ms frames."""
    size = SAMPLE_RATE * 60 // 1000
    pitches = []
    for start in range(0, len(wave) - size, size):
        frame = wave[start : start + size]
        if np.sqrt(np.mean(frame**2)) > 0.03:
            correlation = np.correlate(frame, frame, "full")[size - 1 :]
            lags = slice(SAMPLE_RATE // 400, SAMPLE_RATE // 60)
            pitches.append(SAMPLE_RATE / (lags.start + int(np.argmax(correlation[lags]))))
    return float(np.median(pitches))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pitch": 100}, r"voice\.pitch .*100"),
        ({"speed": 20}, r"voice\.speed .*20"),
        ({"pitch_range": -1}, r"voice\.pitch_range .*-1"),
        ({"language": ""}, r"voice\.language"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Voice(**settings)


@pytest.mark.parametrize("text", ["", "  \n", "..."])
def test_text_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="text"):
        synthesise(text, Voice())


def test_unknown_languages_and_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="elvish"):
        synthesise(TEXT, Voice(language="elvish"))
    with pytest.raises(ValueError, match="nobody"):
        synthesise(TEXT, Voice(variant="nobody"))
    with pytest.raises(ValueError, match="count"):
        voices(0)
    with pytest.raises(ValueError, match="variants"):
        voices(1, variants=())


def test_a_missing_wheel_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"zipper-lm\[demo\]"):
        synthesise(TEXT, Voice())

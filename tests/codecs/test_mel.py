"""Log-mel spectrograms and their inversion."""

import math

import torch

from zipper_lm.codecs import mel


def chirp(seconds=1.0):
    time = torch.arange(int(seconds * 16_000)) / 16_000
    return 0.3 * torch.sin(2 * math.pi * (200 * time + 900 * time**2)) + 0.1 * torch.sin(700 * time)


def test_frames_are_10_ms_and_begun_ones_count():
    assert mel.log_mel(torch.zeros(1)).shape == (1, 80)
    assert mel.log_mel(torch.zeros(1600)).shape == (10, 80)
    assert mel.log_mel(torch.zeros(1601)).shape == (11, 80)


def test_pieces_are_the_whole():
    wave = chirp(1.013)
    whole = mel.log_mel(wave)
    for most in (1, 7, 50, 102, 1000):
        pieces = list(mel.log_mel_pieces(wave, most))
        assert max(map(len, pieces)) <= most
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)


def test_silence_is_the_floor():
    assert torch.equal(mel.log_mel(torch.zeros(800)), torch.full((5, 80), mel.FLOOR))


def test_a_higher_tone_lies_in_a_higher_band():
    time = torch.arange(16_000) / 16_000
    peaks = [int(mel.log_mel(torch.sin(2 * math.pi * f * time))[50].argmax()) for f in (150, 400, 1500, 5000)]
    assert peaks == sorted(set(peaks))


def test_magnitudes_fit_the_mel_bands():
    wanted = mel.log_mel(chirp())
    bands = (mel._filters().T @ mel.mel_to_magnitude(wanted)).T.clamp_min(math.exp(mel.FLOOR)).log()
    loud = wanted > wanted.max() - 5
    assert (bands - wanted)[loud].abs().mean() < 0.1


def test_sound_comes_back_with_the_same_spectrogram():
    wanted = mel.log_mel(chirp())
    wave = mel.mel_to_wave(wanted)
    assert wave.shape == (16_000,)
    assert wave.dtype == torch.float32
    loud = wanted > wanted.max() - 4
    assert (mel.log_mel(wave) - wanted)[loud].abs().mean() < 0.35
    assert torch.equal(wave, mel.mel_to_wave(wanted))


def test_more_rounds_come_nearer():
    wanted = mel.log_mel(chirp())
    error = [float((mel.log_mel(mel.mel_to_wave(wanted, n)) - wanted).abs().mean()) for n in (1, 32)]
    assert error[1] < error[0]


def test_loudness_is_brought_to_one_level():
    wave = chirp()
    loud, quiet = mel.normalise_loudness(wave), mel.normalise_loudness(0.01 * wave)
    torch.testing.assert_close(loud, quiet)
    assert mel.normalise_loudness(torch.zeros(500)).abs().max() == 0
    assert mel.normalise_loudness(torch.full((500,), 1e-6)).abs().max() < 1e-2

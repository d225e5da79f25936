"""Log-mel spectrogram and the way back to sound.

Shapes: T samples, N frames of `HOP` samples (N = ceil(T / HOP)), F = N_FFT / 2 + 1 frequencies, M = `BANDS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from zipper_lm.codecs.audio import SAMPLING_RATE

HOP = 160  # 10 ms
WINDOW = 400
N_FFT = 512
BANDS = 80
PIECE = 12_000
"""Frames (120 s) that are computed at once: spectra take ten times the memory of their sound."""
FLOOR = math.log(1e-4)
"""Lowest log-mel value: 80 dB below a band of magnitude one. Below it there is only noise."""

_LOUD = 0.9  # quantile of the frames' energy that stands for an utterance's loudness
_SPEECH_LEVEL = 0.1  # root mean square that this quantile is brought to
_SILENCE = 1e-4  # quieter than this is not amplified


def log_mel(wave: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of mel magnitudes, float32 [N, M], of a wave float32 [T] at 16 kHz."""
    return torch.cat(list(log_mel_pieces(wave, PIECE)))


def log_mel_pieces(wave: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """What `log_mel` gives, at most so many frames at a time."""
    frames = max(1, math.ceil(wave.shape[-1] / HOP))
    edge = (N_FFT - HOP) // 2
    padded = torch.nn.functional.pad(wave, (edge, edge + frames * HOP - wave.shape[-1]))
    for first in range(0, frames, most):
        last = min(frames, first + most)
        heard = padded[first * HOP : (last - 1) * HOP + N_FFT]
        magnitude = torch.stft(heard, N_FFT, HOP, WINDOW, _window(), center=False, return_complex=True).abs()  # [F, N]
        yield (_filters().T @ magnitude).T.clamp_min(math.exp(FLOOR)).log()


def normalise_loudness(wave: torch.Tensor) -> torch.Tensor:
    """Scale a wave [T] so that its loud frames have one level, whoever spoke and however near."""
    frames = torch.nn.functional.pad(wave, (0, -wave.shape[-1] % HOP)).reshape(-1, HOP)
    level = frames.square().mean(1).sqrt().quantile(_LOUD)
    return wave * (_SPEECH_LEVEL / level.clamp_min(_SILENCE))


def mel_to_wave(mel: torch.Tensor, iterations: int = 32, seed: int = 0) -> torch.Tensor:
    """Sound of a log-mel spectrogram [N, M]: float32 [N * HOP].

    Magnitudes by the pseudo-inverse of the mel filters, phases by the fast Griffin-Lim algorithm (Perraudin,
    Balazs and Søndergaard 2013, "A fast Griffin-Lim algorithm").

    Args:
        mel: log-mel spectrogram as from `log_mel`.
        iterations: rounds of Griffin-Lim.
        seed: of the random first phases.
    """
    magnitude = mel_to_magnitude(mel)
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(magnitude.shape, generator=generator)
    momentum = 0.99  # the paper's alpha
    guess = torch.polar(magnitude, angle)
    previous = torch.zeros_like(guess)
    for _ in range(iterations):
        consistent = _stft(_istft(guess))
        accelerated = consistent + momentum * (consistent - previous)
        previous = consistent
        guess = magnitude * accelerated / accelerated.abs().clamp_min(1e-12)
    return _istft(guess)


def mel_to_sound(mel: torch.Tensor) -> np.ndarray:
    """What `mel_to_wave` gives, quieter where it would leave [-1, 1]: float32 [N * HOP]; no frames are no sound."""
    if not len(mel):
        return np.zeros(0, dtype=np.float32)
    wave = mel_to_wave(mel)
    return (wave / wave.abs().max().clamp_min(1.0)).numpy()


def mel_to_magnitude(mel: torch.Tensor, steps: int = 20) -> torch.Tensor:
    """Non-negative spectral magnitudes [F, N] whose mel bands come near `mel` [N, M].

    Multiplicative updates for least squares (Lee and Seung 2000) from the clamped pseudo-inverse.
    """
    filters = _filters()  # [F, M]
    target = (mel.exp() - math.exp(FLOOR)).clamp_min(0.0).T  # [M, N]
    magnitude = (_inverse() @ target).clamp_min(1e-5)
    wanted = filters @ target
    for _ in range(steps):
        magnitude = magnitude * wanted / (filters @ (filters.T @ magnitude)).clamp_min(1e-8)
    return magnitude


def _stft(wave: torch.Tensor) -> torch.Tensor:
    edge = (N_FFT - HOP) // 2
    padded = torch.nn.functional.pad(wave, (edge, edge))
    return torch.stft(padded, N_FFT, HOP, WINDOW, _window(), center=False, return_complex=True)


def _istft(spectrum: torch.Tensor) -> torch.Tensor:
    """Least-squares inverse of `_stft` by overlap-add; torch.istft refuses edges where windows fade out."""
    frames = spectrum.shape[-1]
    pieces = torch.fft.irfft(spectrum.T.contiguous(), n=N_FFT).T * _window_padded()[:, None]  # [N_FFT, N]
    edge = (N_FFT - HOP) // 2
    return (_overlap_add(pieces) / _overlap(frames))[edge : edge + frames * HOP]


def _overlap_add(pieces: torch.Tensor) -> torch.Tensor:
    length = (pieces.shape[-1] - 1) * HOP + N_FFT
    return torch.nn.functional.fold(pieces[None], (1, length), (1, N_FFT), stride=(1, HOP)).reshape(length)


@lru_cache(maxsize=8)
def _overlap(frames: int) -> torch.Tensor:
    """Sum of the squared windows over each sample."""
    return _overlap_add(_window_padded().square()[:, None].expand(-1, frames)).clamp_min(1e-3)


@lru_cache(maxsize=1)
def _window() -> torch.Tensor:
    return torch.hann_window(WINDOW)


@lru_cache(maxsize=1)
def _window_padded() -> torch.Tensor:
    side = (N_FFT - WINDOW) // 2
    return torch.nn.functional.pad(_window(), (side, N_FFT - WINDOW - side))


@lru_cache(maxsize=1)
def _filters() -> torch.Tensor:
    """Mel filters [F, M], each of unit sum: a band is a weighted mean of magnitudes."""
    bank = mel_filter_bank(N_FFT // 2 + 1, BANDS, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, mel_scale="slaney")
    bank = bank / np.maximum(bank.sum(axis=0, keepdims=True), 1e-8)
    return torch.from_numpy(np.ascontiguousarray(bank, dtype=np.float32))


@lru_cache(maxsize=1)
def _inverse() -> torch.Tensor:
    return torch.linalg.pinv(_filters().T)

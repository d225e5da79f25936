"""Flite's voices (Black and Lenzo 2001), by its program, which Debian has as the package of that name."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zipper_lm.codecs.audio import read_audio
from zipper_lm.experiments.corpora.voices import as_recorded, without_quiet

VOICES = ("slt", "rms", "awb", "kal16")
"""Those of 16 kHz that are in the program: three of recorded speakers, and one of diphones."""
_STRETCH = (0.85, 1.15)  # of durations, from one utterance to another
_SECONDS = 60.0  # within which one utterance is spoken, or flite hangs


@dataclass(frozen=True, kw_only=True)
class FliteVoice:
    """One speaker.

    Args:
        speaker: one of `VOICES`.
    """

    speaker: str

    def __post_init__(self) -> None:
        if self.speaker not in VOICES:
            raise ValueError(f"voice.speaker must be one of {', '.join(VOICES)}, got {self.speaker!r}")

    @property
    def name(self) -> str:
        """Readable and unique, such as ``"flite slt"``."""
        return f"flite {self.speaker}"


def check_flite() -> None:
    """Raise `ValueError` where there is no such program."""
    if shutil.which("flite") is None:
        raise ValueError("--flite: there is no program 'flite' here; Debian and Ubuntu have it as the package flite")


def synthesise(text: str, voice: FliteVoice, seed: int) -> np.ndarray:
    """Speak `text`: float32 mono ``[samples]`` at 16 kHz within -1..1.

    Args:
        text: what to say.
        voice: who says it.
        seed: how this utterance differs from the speaker's others: durations +-15 %, and as `as_recorded`.

    Raises:
        ValueError: `text` says nothing, or flite fails.
    """
    rng = np.random.default_rng(seed)
    stretch = f"duration_stretch={rng.uniform(*_STRETCH):.3f}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spoken.wav"
        command = ["flite", "-voice", voice.speaker, "--setf", stretch, "-t", text, "-o", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"flite was not done with {text!r} as {voice.speaker} after {_SECONDS:g} s") from error
        if done.returncode or not file.is_file():
            raise ValueError(f"flite cannot say {text!r} as {voice.speaker}: {done.stderr.strip()[-200:]}")
        wave = read_audio(file)
    spoken = without_quiet(wave)
    if not len(spoken):
        raise ValueError(f"text {text!r} holds nothing that flite can say")
    return as_recorded(spoken, rng)

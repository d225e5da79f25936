"""Synthetic speakers: espeak-ng in process, from the library and data in the wheel `espeakng-loader`.

- espeak-ng keeps state between utterances (phase of the glottal pulse, filter memories) that its own
  initialisation does not clear, so that the same call gives other samples the second time. Each utterance is
  therefore spoken by a freshly loaded copy of the library: some milliseconds, and the samples depend on text,
  voice and seed only.
- A voice is language x variant x pitch x range x speed. The *variant* (formants, glottis) is the speaker;
  splits that must not share a speaker should not share a variant: see `VARIANTS` and `voices`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soxr

SAMPLE_RATE = 16_000

LANGUAGES = (
    "en-us",
    "en",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-029",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-us-nyc",
)
"""English accents of espeak-ng 1.52."""

VARIANTS = (
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo"),
    *("Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Nguyen", "RicishayMax", "RicishayMax2"),
    *("RicishayMax3", "Storm", "Tweaky", "adam", "anika", "announcer", "antonio", "aunty", "belinda"),
    *("benjamin", "boris", "david", "ed", "edward", "edward2", "f1", "f2", "f3", "f4", "f5"),
    *("grandma", "grandpa", "gustave", "ian", "iven", "iven2", "iven3", "iven4", "john", "kaukovalta"),
    *("klatt", "klatt2", "klatt3", "klatt6", "linda", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8"),
    *("marcelo", "max", "michel", "miguel", "mike2", "norbert", "pablo", "paul", "pedro", "quincy", "rob"),
    *("robert", "sandro", "shelby", "steph", "steph2", "steph3", "travis", "victor", "zac"),
)
"""Voice variants of espeak-ng 1.52 without its whispers, croaks and robots, and without "Reed" and "caleb",
whose breath differs from call to call."""

CLEAR_LANGUAGES = ("en-us", "en", "en-gb-x-rp")
CLEAR_VARIANTS = (
    *("Alex", "Diogo", "Henrique", "Hugo", "Mario", "Michael", "Mike", "adam", "benjamin", "edward"),
    *("f2", "f3", "grandma", "grandpa", "john", "klatt2", "klatt6", "m1", "m2", "m3", "m4", "m5"),
    *("m6", "m7", "m8", "max", "michel", "miguel", "mike2", "pedro", "quincy", "rob", "robert"),
    *("sandro", "steph", "steph2", "steph3", "victor"),
)
"""Accents and variants that a recogniser of real speech understands: Whisper tiny.en mishears at most a fifth of the
words of each (`benchmarks/voices.py`, docs/runs/voices.json). Of some of the others it mishears four fifths."""

_ALIASES = {"en-gb": "en"}  # the plain British voice is called "en" in espeak-ng
_PITCH, _RANGE, _SPEED = (0, 99), (0, 99), (80, 450)
_SYNCHRONOUS, _DONT_EXIT, _UTF8 = (
    2,
    0x8000,
    1,
)  # AUDIO_OUTPUT_SYNCHRONOUS, espeakINITIALIZE_DONT_EXIT, CHARS_UTF8
_RATE_PARAMETER, _PITCH_PARAMETER, _RANGE_PARAMETER = 1, 3, 4  # espeak_PARAMETER
_PAD_SECONDS = 0.1
_QUIET = 100 / 32768


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One synthetic speaker.

    Args:
        language: accent, an espeak-ng language such as ``"en-us"`` (see `LANGUAGES`).
        variant: espeak-ng voice variant such as ``"f3"`` (see `VARIANTS`), or ``""`` for the language's own.
        pitch: base pitch, 0 to 99 (espeak-ng's scale; 50 is the variant's own).
        pitch_range: liveliness of the melody, 0 to 99 (50 is the variant's own).
        speed: words per minute, 80 to 450.
    """

    language: str = "en-us"
    variant: str = ""
    pitch: int = 50
    pitch_range: int = 50
    speed: int = 160

    def __post_init__(self) -> None:
        if not self.language:
            raise ValueError("voice.language must be a non-empty string")
        for name, (low, high) in (("pitch", _PITCH), ("pitch_range", _RANGE), ("speed", _SPEED)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"voice.{name} must lie in {low} to {high}, got {value}")

    @property
    def name(self) -> str:
        """Readable and unique, such as ``"en-us+f3 p50 r50 s160"``."""
        return f"{self.espeak_name} p{self.pitch} r{self.pitch_range} s{self.speed}"

    @property
    def espeak_name(self) -> str:
        """What espeak-ng calls language and variant together, such as ``"en-us+f3"``."""
        language = _ALIASES.get(self.language, self.language)
        return f"{language}+{self.variant}" if self.variant else language


def voices(
    count: int,
    seed: int = 0,
    variants: tuple[str, ...] = VARIANTS,
    languages: tuple[str, ...] = LANGUAGES,
) -> list[Voice]:
    """Many distinct voices, spread evenly over `variants` and accents, with random pitch, range and speed.

    Args:
        count: how many, at least 1.
        seed: the same seed gives the same list.
        variants: speakers to draw from.
        languages: accents to draw from.

    Raises:
        ValueError: `count` is below 1, or `variants` or `languages` is empty.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not variants:
        raise ValueError("variants must name at least one espeak-ng variant, got none")
    if not languages:
        raise ValueError("languages must name at least one accent of espeak-ng, got none")
    rng = np.random.default_rng(seed)
    chosen: dict[Voice, None] = {}
    while len(chosen) < count:
        accents = rng.permutation(len(languages))
        for number, index in enumerate(rng.permutation(len(variants))):
            voice = Voice(
                language=languages[accents[number % len(languages)]],
                variant=variants[index],
                pitch=int(rng.integers(30, 71)),
                pitch_range=int(rng.integers(30, 71)),
                speed=int(rng.integers(135, 191)),
            )
            chosen.setdefault(voice)
    return list(chosen)[:count]


def synthesise(text: str, voice: Voice, seed: int | None = None) -> np.ndarray:
    """Speak `text`: float32 mono ``[samples]`` at 16 kHz within -1..1, 0.1 s of quiet at both ends.

    Args:
        text: what to say.
        voice: who says it.
        seed: `None` speaks plainly. With a seed the utterance differs a little from the speaker's others, as
            real ones do: speed +-8 %, pitch +-4 points, quiet at the ends 0.05 to 0.2 s, level -12 to 0 dB,
            and white noise 35 to 55 dB below the speech.

    Same text, voice and seed give the same samples.

    Raises:
        ImportError: `espeakng-loader` is not installed.
        ValueError: `text` says nothing, or espeak-ng does not know the voice.
    """
    if not text.strip():
        raise ValueError(f"text must hold something to say, got {text!r}")
    if seed is None:
        return _padded(_spoken(text, voice), _PAD_SECONDS, _PAD_SECONDS)
    rng = np.random.default_rng(seed)
    speed = int(np.clip(round(voice.speed * rng.uniform(0.92, 1.08)), *_SPEED))
    pitch = int(np.clip(voice.pitch + rng.integers(-4, 5), *_PITCH))
    said = Voice(
        language=voice.language,
        variant=voice.variant,
        pitch=pitch,
        pitch_range=voice.pitch_range,
        speed=speed,
    )
    return as_recorded(_spoken(text, said), rng)


def as_recorded(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Speech ``[samples]`` at 16 kHz in another recording: quiet at the ends, level, and noise as of `synthesise`."""
    loudness = float(np.sqrt(np.mean(wave**2)))
    wave = _padded(wave, *rng.uniform(0.05, 0.2, size=2))
    noise = rng.standard_normal(len(wave)) * loudness * 10 ** (-rng.uniform(35, 55) / 20)
    return np.clip((wave + noise) * 10 ** (-rng.uniform(0, 12) / 20), -1, 1).astype(np.float32)


def without_quiet(wave: np.ndarray) -> np.ndarray:
    """Samples, float, from the first that can be heard to the last; none if none can."""
    loud = np.flatnonzero(np.abs(wave) > _QUIET)
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave[:0]


def _padded(wave: np.ndarray, before: float, after: float) -> np.ndarray:
    """Quiet of so many seconds around the speech."""
    return np.pad(wave, (int(before * SAMPLE_RATE), int(after * SAMPLE_RATE))).astype(np.float32)


def _spoken(text: str, voice: Voice) -> np.ndarray:
    """espeak-ng's samples at 16 kHz without the quiet at the ends."""
    pcm, rate = _speak(text, voice)
    loud = without_quiet(pcm)
    if not len(loud):
        raise ValueError(f"text {text!r} holds nothing that espeak-ng can say as {voice.name!r}")
    return np.clip(soxr.resample(loud, rate, SAMPLE_RATE), -1, 1)


_lock = threading.Lock()  # espeak-ng is one process-wide speaker
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _speak(text: str, voice: Voice) -> tuple[np.ndarray, int]:
    """Samples ``[n]`` float32 as espeak-ng made them, and their rate in Hz."""
    loader = espeak()
    data_folder = loader.get_data_path()
    if voice.variant and not Path(data_folder, "voices", "!v", voice.variant).is_file():
        raise ValueError(f"voice.variant {voice.variant!r} is not known to espeak-ng; see VARIANTS")
    pieces: list[np.ndarray] = []

    @_Callback
    def collect(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    with _lock:
        library = ctypes.CDLL(loader.get_library_path())
        try:
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_folder.encode(), _DONT_EXIT)
            if rate <= 0:
                raise ValueError(f"espeak-ng cannot read its data in {loader.get_data_path()!r} (code {rate})")
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            library.espeak_SetSynthCallback(collect)
            if library.espeak_SetVoiceByName(voice.espeak_name.encode()) != 0:
                raise ValueError(f"voice.language {voice.espeak_name!r} is not known to espeak-ng")
            library.espeak_SetParameter(_RATE_PARAMETER, voice.speed, 0)
            library.espeak_SetParameter(_PITCH_PARAMETER, voice.pitch, 0)
            library.espeak_SetParameter(_RANGE_PARAMETER, voice.pitch_range, 0)
            data = text.encode()
            library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, _UTF8, None, None)
            library.espeak_Terminate()
        finally:
            _unload(library)
    wave = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int16)
    return wave.astype(np.float32) / 32768, int(rate)


def _unload(library: ctypes.CDLL) -> None:
    """Drop the library from memory, so that the next load starts from clean state."""
    import _ctypes

    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
    else:
        _ctypes.dlclose(library._handle)


def espeak() -> ModuleType:
    """The wheel that holds the library. Raises `ImportError` naming the extra."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("synthetic voices need espeak-ng: pip install 'zipper-lm[demo]'") from error
    return espeakng_loader

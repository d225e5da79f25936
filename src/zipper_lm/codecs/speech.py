"""Speech codec fitted on the user's own sound in seconds: k-means units of cepstra, and a way back.

Encoding: loudness brought to one level, log-mel frames (10 ms), the first `cepstra` cepstral coefficients of each
(large ones scaled down), `frames_per_token` of them stacked (or averaged) to one vector, nearest of `units` centroids.
Few cepstra hold what is said and little of who says it: the pitch of the voice, which log-mel bands resolve, splits a
sound into many units. Decoding: each unit's mean log-mel frames, or, if one was trained, a small convolutional
network that also sees the neighbouring units (`zipper_lm.codecs.mel_decoder`); then Griffin-Lim, or a published
vocoder, turns the log-mel frames into sound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from safetensors.torch import load_file, save
from scipy.fft import dct
from torch import nn

from zipper_lm.codecs.audio import SAMPLING_RATE, read_sound
from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.kmeans import fit_centroids, means, nearest
from zipper_lm.codecs.mel import (
    BANDS,
    FLOOR,
    HOP,
    PIECE,
    log_mel,
    log_mel_pieces,
    mel_to_sound,
    normalise_loudness,
)
from zipper_lm.codecs.mel_decoder import (
    DECODER_FOLDER,
    MelDecoder,
    MelDecoderConfig,
    check_training,
    fit_mel_decoder,
    laid_out,
)
from zipper_lm.codecs.mel_vocoder import MelVocoder
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import HUB_ARGUMENTS
from zipper_lm.utils.weights import check_shapes, on_meta, shapes_of, stored_shapes

WEIGHTS_FILE = "codec.safetensors"
_LEAST_SPREAD = 1e-2  # of a cepstral coefficient in log-mel units: a constant one tells nothing apart
_CENTER, _SCALE = FLOOR / 2, -FLOOR / 2  # an un-quantiser sees and writes log-mel values near [-1, 1]


@dataclass(kw_only=True, frozen=True)
class SpeechCodecConfig:
    """What a speech codec's `codec.json` holds.

    Args:
        units: number of centroids, at least 2.
        frames_per_token: 10 ms frames to one token; 4 gives 25 tokens a second.
        reduce: ``"stack"`` puts a token's frames side by side, ``"mean"`` averages them.
        cepstra: coefficients of each frame that units are told apart by, 1 to 80.
        width: channels of the un-quantiser that older codecs may have, 0 for none.

    Raises:
        ValueError: on a value out of range.
    """

    units: int = 1024
    frames_per_token: int = 4
    reduce: Literal["stack", "mean"] = "stack"
    cepstra: int = 20
    width: int = 128

    def __post_init__(self) -> None:
        for name, least in (("units", 2), ("frames_per_token", 1), ("cepstra", 1), ("width", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"speech codec: {name} must be a whole number of at least {least}, got {value!r}")
        if self.reduce not in ("stack", "mean"):
            raise ValueError(f"speech codec: reduce must be 'stack' or 'mean', got {self.reduce!r}")
        if self.cepstra > BANDS:
            raise ValueError(f"speech codec: cepstra must be at most {BANDS}, got {self.cepstra}")

    @property
    def frames_kept(self) -> int:
        """Frames that a unit tells apart: all of a token's, or their mean."""
        return self.frames_per_token if self.reduce == "stack" else 1

    @property
    def dimension(self) -> int:
        """Length of a unit's log-mel frames, laid end to end."""
        return BANDS * self.frames_kept


class Unquantiser(nn.Module):
    """What older codecs may have in place of a decoder: convolutions over tokens, then over frames. None is trained."""

    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__()
        self.frames_per_token = config.frames_per_token
        width = config.width
        self.embedding = nn.Linear(config.dimension, width)
        self.token_blocks = nn.ModuleList(_Block(width, dilation) for dilation in (1, 2, 1))
        narrow = max(1, width // 2)  # frames are several times as many as tokens
        self.spread = nn.Linear(width, config.frames_per_token * narrow)
        self.frame_blocks = nn.ModuleList(_Block(narrow, dilation) for dilation in (1, 2))
        self.head = nn.Linear(narrow, BANDS)

    def forward(self, vectors: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Scaled units [batch, tokens, dimension] and frames [batch, frames, BANDS] -> frames alike."""
        h = self.embedding(vectors)
        for block in self.token_blocks:
            h = block(h)
        h = self.spread(h).reshape(h.shape[0], plain.shape[1], -1)
        for block in self.frame_blocks:
            h = block(h)
        return plain + self.head(h)


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.out = nn.Linear(width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.out(nn.functional.gelu(self.conv(self.norm(h).transpose(1, 2)).transpose(1, 2)))


class SpeechCodec:
    """Sound at 16 kHz <-> units. Make one with `fit` or `from_pretrained`.

    Args:
        config: sizes.
        centroids: float [units, frames kept * cepstra], scaled cepstra: the nearest one is a sound's unit.
        scale: float [cepstra], what a cepstral coefficient is multiplied by.
        mels: float [units, config.dimension], log-mel frames that a unit stands for.
        unquantiser: of an older codec. decoder: trained network; with neither, decoding is look-up in `mels`.

    Raises:
        ValueError: if a tensor's shape does not fit `config`, or there are both networks.
    """

    kind: ClassVar[str] = "speech"

    def __init__(
        self,
        config: SpeechCodecConfig,
        centroids: torch.Tensor,
        scale: torch.Tensor,
        mels: torch.Tensor,
        unquantiser: Unquantiser | None = None,
        decoder: MelDecoder | None = None,
    ) -> None:
        if unquantiser is not None and decoder is not None:
            raise ValueError("speech codec: it has an un-quantiser and a decoder, but can use only one")
        shapes = _shapes(config)
        for name, given in (("centroids", centroids), ("scale", scale), ("mels", mels)):
            if tuple(given.shape) != shapes[name]:
                raise ValueError(f"speech codec: {name} has shape {tuple(given.shape)}, expected {shapes[name]}")
        self.config = config
        self.centroids = centroids.half().float()  # as stored, so that a saved codec is the same codec
        self.scale = scale.float()
        self.mels = mels.half().float()
        self.unquantiser = None if unquantiser is None else unquantiser.half().float().eval().requires_grad_(False)
        self.decoder = decoder

    @property
    def vocab_size(self) -> int:
        """Units and the three special ids."""
        return self.config.units + 3

    @property
    def bos_id(self) -> int:
        """First id after the units."""
        return self.config.units

    @property
    def eos_id(self) -> int:
        """Second id after the units."""
        return self.config.units + 1

    @property
    def pad_id(self) -> int:
        """Third id after the units."""
        return self.config.units + 2

    @property
    def rate(self) -> float:
        """Tokens per second of sound."""
        return SAMPLING_RATE / HOP / self.config.frames_per_token

    @property
    def unit_vectors(self) -> tuple[range, torch.Tensor]:
        """Ids of the units, and their centroids, float32 [units, frames kept * cepstra]."""
        return range(self.config.units), self.centroids

    @property
    def looked_up(self) -> Self | None:
        """The same units without the decoder; `None` where there is none."""
        if self.decoder is None:
            return None
        plain = copy.copy(self)
        plain.decoder = None
        return plain

    @torch.inference_mode()
    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Sounds (whatever `read_audio` reads, of any length) to units, one for every begun ``1 / rate`` seconds.

        A long sound is read in pieces, which give the units that it gives as a whole.

        Raises:
            ValueError: if a sound cannot be read; see `read_audio`.
        """
        most = math.ceil(PIECE / self.config.frames_per_token) * self.config.frames_per_token
        waves = (_whole_tokens(value, self.config) for value in values)
        return [[unit for frames in log_mel_pieces(wave, most) for unit in self._units(frames)] for wave in waves]

    @torch.inference_mode()
    def decode(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Units to sounds, float32 [time] at 16 kHz, ``1 / rate`` seconds per unit, in [-1, 1].

        Raises:
            ValueError: if an id is not in ``[0, units)``, special ids included.
        """
        rows = [self._checked(number, row) for number, row in enumerate(ids)]
        speak = mel_to_sound
        if self.decoder is not None and self.decoder.vocoder is not None:
            speak = self.decoder.vocoder
        return [speak(self.decode_mel(row)) for row in rows]

    def decode_mel(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-mel spectrogram, float32 [len(ids) * frames_per_token, 80], that `decode` turns to sound; with a vocoder
        of its bands, and of its kind."""
        row = torch.tensor(self._checked(0, ids), dtype=torch.long)
        vectors = self.mels[row]
        plain = laid_out(vectors, self.config.frames_per_token)
        if self.decoder is not None:
            return self.decoder.frames(row, plain)
        if self.unquantiser is None or not len(row):
            return plain
        with torch.inference_mode():
            scaled = self.unquantiser(_to_unit(vectors)[None], _to_unit(plain)[None])[0]
        return (scaled * _SCALE + _CENTER).clamp_min(FLOOR)

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` and `codec.safetensors` (half precision) into the folder `path`; a decoder beside them."""
        tensors = {"centroids": self.centroids.half(), "scale": self.scale, "mels": self.mels.half()}
        if self.unquantiser is not None:
            tensors |= {f"unquantiser.{k}": v.half() for k, v in self.unquantiser.state_dict().items()}
        with files_into(path, last=CODEC_FILE) as folder:
            # not save_file: it makes files that only their owner can read
            (folder / WEIGHTS_FILE).write_bytes(save({k: v.contiguous() for k, v in tensors.items()}))
            decoder = {} if self.decoder is None else {"decoder": True}  # one may lie there from a codec before
            if self.decoder is not None:
                self.decoder.save(folder / DECODER_FOLDER)
            write_json(folder / CODEC_FILE, {"kind": self.kind, **asdict(self.config), **decoder})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SpeechCodec:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: if a file is missing or damaged, or the tensors do not fit the configuration.
        """
        file, weights = Path(path) / CODEC_FILE, Path(path) / WEIGHTS_FILE
        fields = read_codec_file(path, cls.kind)
        decodes = fields.pop("decoder", False)
        try:
            config = SpeechCodecConfig(**fields)
        except TypeError as error:
            raise ValueError(f"{file}: {error}") from error
        if not weights.is_file():
            raise ValueError(f"speech codec: no {WEIGHTS_FILE} in {path}")
        there, needed = stored_shapes(weights), _shapes(config)
        if config.width:
            needed |= shapes_of(on_meta(str(file), lambda: Unquantiser(config), len(there)), "unquantiser.")
        check_shapes(str(weights), there, needed)
        tensors = {k: v.float() for k, v in load_file(weights).items()}
        unquantiser = Unquantiser(config) if config.width else None
        if unquantiser is not None:
            state = {k.removeprefix("unquantiser."): v for k, v in tensors.items() if k.startswith("unquantiser.")}
            unquantiser.load_state_dict(state)
        decoder = None
        if decodes:
            folder = Path(path) / DECODER_FOLDER
            decoder = MelDecoder.load(folder, units=config.units, frames=config.frames_per_token)
        return cls(config, tensors["centroids"], tensors["scale"], tensors["mels"], unquantiser, decoder)

    @classmethod
    def make(
        cls,
        values: Iterable[Any] = (),
        *,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        vocoder: str | None = None,
        vocoder_revision: str | None = None,
        **options: Any,
    ) -> SpeechCodec:
        """As a recipe asks for it: fitted on the `values`.

        Args:
            values: sounds. seed: of the fit. options: of `fit`; `cache_dir`, `token`, `local_files_only` for the Hub.
            vocoder: folder or Hub id; see `MelVocoder.load`. vocoder_revision: on the Hub.

        Raises:
            ValueError: as `fit`, if a `source` is given that holds no codec, or the vocoder cannot be loaded.
        """
        if source is not None:
            raise ValueError(f"codec.source: no {CODEC_FILE} in {source}")
        hub = {name: options.pop(name) for name in HUB_ARGUMENTS if name in options}
        if vocoder is None and (unused := [*hub, *["vocoder_revision"] * (vocoder_revision is not None)]):
            raise ValueError(f"codec.options: {unused} have no effect without a vocoder")
        if vocoder is not None and not options.get("refine_steps"):
            raise ValueError("codec.options: a vocoder speaks what a decoder writes: give refine_steps, too")
        speaks = None if vocoder is None else MelVocoder.load(vocoder, revision=vocoder_revision, **hub)
        return cls.fit(values, seed=seed, vocoder=speaks, **options)

    @classmethod
    def fit(
        cls,
        waves: Iterable[Any],
        units: int = 1024,
        frames_per_token: int = 4,
        reduce: Literal["stack", "mean"] = "stack",
        cepstra: int = 20,
        whitening: float = 0.5,
        refine_steps: int = 0,
        width: int = 160,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
        vocoder: MelVocoder | None = None,
    ) -> SpeechCodec:
        """Fit units on sounds (k-means, Sculley 2010), and train a decoder on them if asked to.

        Args:
            waves: sounds, whatever `read_audio` reads.
            units: number of centroids.
            frames_per_token: 10 ms frames to one token.
            reduce: how they become one vector, ``"stack"`` or ``"mean"``.
            cepstra: coefficients of each frame that units are told apart by, 1 to 80. All 80 also tell pitches
                apart, which splits what is said into more units than anything learns from.
            whitening: how far the spreads of the coefficients are evened out before distances are taken, 0 (not at
                all) to 1 (all alike): each is multiplied by its standard deviation to the power of ``-whitening``.
            refine_steps: training steps of the decoder; 0 for none: decoding is look-up. Thousands are needed: with
                hundreds the judge of the demo understands copies no better.
            width: channels of the decoder.
            seed: of k-means and of the training.
            progress: called as ``progress(step, refine_steps, loss)`` after every step of the decoder.
            vocoder: that speaks what the decoder writes, in place of Griffin-Lim.

        Raises:
            ValueError: if a sound cannot be read, a setting is out of range, or there is too little sound.
        """
        check_training(refine_steps, width)
        if not 0.0 <= whitening <= 1.0:
            raise ValueError(f"speech codec: whitening must be in [0, 1], got {whitening}")
        config = SpeechCodecConfig(
            units=units,
            frames_per_token=frames_per_token,
            reduce=reduce,
            cepstra=cepstra,
            width=0,
        )
        if vocoder is not None and not refine_steps:
            raise ValueError("speech codec: a vocoder speaks what a decoder writes: refine_steps must be at least 1")
        frames, goals = _frames_and_goals(waves, config, vocoder)
        vectors = torch.cat([_cepstra(f, config) for f in frames] or [torch.zeros(0, 1)])
        total = len(vectors)
        if total < units:
            seconds = units * frames_per_token * HOP / SAMPLING_RATE
            raise ValueError(
                f"speech codec: {total} vectors are too few for units={units}: "
                f"at least {units} ({seconds:.0f} s of sound) are needed"
            )
        spread = vectors.reshape(-1, config.cepstra).std(0)
        scale = spread.clamp_min(_LEAST_SPREAD) ** -whitening
        vectors = vectors * scale.repeat(config.frames_kept)
        centroids = fit_centroids(vectors, units, seed).half().float()
        ids = nearest(vectors, centroids)
        codec = cls(config, centroids, scale, means(torch.cat([_stacked(f, config) for f in frames]), ids, units))
        if refine_steps:
            rows = ids.split([len(f) // frames_per_token for f in frames])
            codec.decoder = codec._trained(rows, goals, refine_steps, width, seed, progress, vocoder)
        return codec

    def fit_decoder(
        self,
        waves: Iterable[Any],
        steps: int,
        width: int = 160,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
        vocoder: MelVocoder | None = None,
    ) -> None:
        """Train a decoder for the units that there are, in place of the one that there is: no id changes.

        Args:
            waves: sounds, whatever `read_audio` reads: those that the units were fitted on, or others of such voices.
            steps: at least 1. width, seed, progress, vocoder: as of `fit`.

        Raises:
            ValueError: if a sound cannot be read, there is none, or a setting is out of range.
        """
        check_training(steps, width)
        if not steps:
            raise ValueError("speech codec: steps must be at least 1, got 0")
        frames, goals = _frames_and_goals(waves, self.config, vocoder)
        if not frames:
            raise ValueError("speech codec: no sounds to train a decoder on")
        rows = [torch.tensor(self._units(f), dtype=torch.long) for f in frames]
        self.decoder, self.unquantiser = self._trained(rows, goals, steps, width, seed, progress, vocoder), None
        self.config = replace(self.config, width=0)

    def _trained(
        self,
        rows: Sequence[torch.Tensor],
        frames: Sequence[torch.Tensor],
        steps: int,
        width: int,
        seed: int,
        progress: Callable[[int, int, float], None] | None,
        vocoder: MelVocoder | None,
    ) -> MelDecoder:
        sizes = MelDecoderConfig(units=self.config.units, frames=self.config.frames_per_token, width=width)
        how: dict[str, Any] = {"steps": steps, "seed": seed, "progress": progress, "vocoder": vocoder}
        return fit_mel_decoder(rows, frames, self.mels, sizes, **how)

    def _units(self, frames: torch.Tensor) -> list[int]:
        """Of log-mel frames [frames, BANDS]."""
        scale = self.scale.repeat(self.config.frames_kept)
        return nearest(_cepstra(frames, self.config) * scale, self.centroids).tolist()

    def _checked(self, number: int, ids: Sequence[int]) -> list[int]:
        row = [int(i) for i in ids]
        for i in row:
            if not 0 <= i < self.config.units:
                raise ValueError(f"speech ids, row {number}: id {i} is not in [0, {self.config.units})")
        return row


def _shapes(config: SpeechCodecConfig) -> dict[str, tuple[int, ...]]:
    """Of a codec's own tensors."""
    return {
        "centroids": (config.units, config.frames_kept * config.cepstra),
        "scale": (config.cepstra,),
        "mels": (config.units, config.dimension),
    }


def _frames_and_goals(
    waves: Iterable[Any], config: SpeechCodecConfig, vocoder: MelVocoder | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each sound the log-mel frames that units are made of, and those that a decoder learns to write."""
    frames, goals = [], []
    for value in waves:
        wave = _whole_tokens(value, config)
        frames.append(log_mel(wave))
        goals.append(frames[-1] if vocoder is None else vocoder.frames(wave, len(frames[-1])))
    return frames, goals


def _whole_tokens(value: Any, config: SpeechCodecConfig) -> torch.Tensor:
    """A sound at one level, silence appended to a whole token."""
    wave = normalise_loudness(torch.from_numpy(read_sound(value)))
    return nn.functional.pad(wave, (0, -wave.shape[0] % (HOP * config.frames_per_token)))


def _stacked(frames: torch.Tensor, config: SpeechCodecConfig) -> torch.Tensor:
    """Frames [frames, width] to vectors, one a token: [tokens, frames_kept * width]."""
    tokens = frames.reshape(-1, config.frames_per_token, frames.shape[1])
    return (tokens if config.reduce == "stack" else tokens.mean(1)).flatten(1)


def _cepstra(frames: torch.Tensor, config: SpeechCodecConfig) -> torch.Tensor:
    """Log-mel frames [frames, BANDS] to vectors of cepstra (orthonormal DCT-II over the bands; Davis and Mermelstein
    1980), one a token: [tokens, frames_kept * cepstra]."""
    coefficients = torch.from_numpy(dct(frames.numpy(), norm="ortho", axis=1)[:, : config.cepstra])
    return _stacked(coefficients, config)


def _to_unit(mel: torch.Tensor) -> torch.Tensor:
    return (mel - _CENTER) / _SCALE

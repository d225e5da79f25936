"""Pre-trained speech encoders that units are made of: waves or log-mel frames in, one vector for so many samples out.

Two kinds, told apart by what they take: waves (HuBERT, WavLM, wav2vec 2.0), or log-mel frames of a window of fixed
length (Whisper). A window of Whisper may be shorter than the 30 s that it was trained on: then the first rows of its
position table are all that it has. A sound longer than a window is cut into pieces that overlap, and of each piece the
middle is kept: no vector is of an edge, but for those of the sound's own.

Letters: B pieces, T features of a piece, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from zipper_lm.codecs.audio import SAMPLING_RATE

OVERLAP = 1.0
"""Seconds at either end of a piece that serve the rest of it as context, where the sound goes on."""
LEAST_WINDOW = 3 * OVERLAP
BATCH = 16
"""Pieces of log-mel encoders that are run together: all are of one length, so that none depends on another."""
_LONGEST_PIECE, _SHORT_WINDOW = 120.0, 10.0  # seconds, where no window is named: of waves, and of log-mel frames


class SpeechEncoder(Protocol):
    """A model with what it needs to read sound at 16 kHz."""

    model: PreTrainedModel
    stride: int
    """Samples from one feature to the next."""
    field: int
    """Samples that one feature is computed of, before attention."""
    window: int
    """Features of the longest piece."""
    batch: int
    """Pieces that are run together."""

    @property
    def width(self) -> int:
        """Numbers in a feature."""

    @property
    def depth(self) -> int:
        """Number of layers."""

    def to(self, device: torch.device | str) -> None:
        """Take what is not the model's own to a device."""

    def read(self, pieces: Sequence[np.ndarray], layer: int) -> Tensor:
        """Hidden states after `layer`, float32 [B, T, D], of waves of one length."""


class WaveEncoder:
    """An encoder that takes waves, with convolutions that its config tells.

    Args:
        model: with `conv_stride` and `conv_kernel` in its config. normalize: whether each sound is brought to zero mean
            and unit variance first. window: seconds of the longest piece.
    """

    batch = 1  # of other lengths each: and so these stay the units that they were

    def __init__(self, model: PreTrainedModel, *, normalize: bool = False, window: float | None = None) -> None:
        self.model, self.normalize = model, normalize
        self.stride, self.field = math.prod(model.config.conv_stride), 1
        for kernel, stride in zip(reversed(model.config.conv_kernel), reversed(model.config.conv_stride)):
            self.field = (self.field - 1) * stride + kernel
        self.window = _features(window, self.stride, _LONGEST_PIECE, math.inf)

    @property
    def width(self) -> int:
        """Numbers in a feature."""
        return int(self.model.config.hidden_size)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return int(self.model.config.num_hidden_layers)

    def to(self, device: torch.device | str) -> None:
        """There is nothing."""

    def read(self, pieces: Sequence[np.ndarray], layer: int) -> Tensor:
        """See `SpeechEncoder`."""
        prepare = Wav2Vec2FeatureExtractor(do_normalize=self.normalize)
        values = prepare(list(pieces), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_values
        found = _hidden(self.model, values, layer)
        if found.shape[1] != (told := _count(len(pieces[0]), self)):
            raise ValueError(
                f"hubert-units: {type(self.model).__name__} gives {found.shape[1]} features after layer {layer} where "
                f"its convolutions give {told}: encoders that change the rate between layers (SEW) are not taken"
            )
        return found


class MelEncoder:
    """A Whisper encoder.

    Args:
        model: takes log-mel frames, has a table of positions.
        window: seconds of a piece, to which each is filled up with silence.
    """

    batch = BATCH

    def __init__(self, model: PreTrainedModel, *, window: float | None = None) -> None:
        self.model = model
        self.prepare = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
        own: Any = model
        self.stride = self.field = self.prepare.hop_length * own.conv1.stride[0] * own.conv2.stride[0]
        most = model.config.max_source_positions
        self.window = _features(window, self.stride, _SHORT_WINDOW, most)
        self.cut: Any = _cut(own, self.window)

    @property
    def width(self) -> int:
        """Numbers in a feature."""
        return int(self.model.config.d_model)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return int(self.model.config.encoder_layers)

    def to(self, device: torch.device | str) -> None:
        """See `SpeechEncoder`."""
        self.cut.to(device)

    def read(self, pieces: Sequence[np.ndarray], layer: int) -> Tensor:
        """See `SpeechEncoder`."""
        length = self.window * self.stride
        mels = self.prepare(list(pieces), sampling_rate=SAMPLING_RATE, max_length=length, return_tensors="pt")
        return _hidden(self.cut, mels.input_features, layer)


def speech_encoder(model: PreTrainedModel, *, normalize: bool = False, window: float | None = None) -> SpeechEncoder:
    """The encoder of its kind around a model.

    Args:
        model: as `EncoderModel` loads it. normalize: of waves. window: seconds of the longest piece; by default 120 of
            waves, and 10 of log-mel frames or as many as there are positions.

    Raises:
        ValueError: if the model reads no sound, or `window` is out of range.
    """
    if hasattr(model.config, "conv_stride") and hasattr(model.config, "conv_kernel"):
        return WaveEncoder(model, normalize=normalize, window=window)
    if not isinstance(model, WhisperEncoder):
        raise ValueError(
            f"hubert-units: {type(model).__name__} takes no waves and no log-mel frames; an encoder such as HuBERT, "
            "WavLM, wav2vec 2.0 or Whisper is needed"
        )
    if normalize:
        raise ValueError("hubert-units: normalize=true is for encoders that take waves; Whisper takes log-mel frames")
    return MelEncoder(model, window=window)


@torch.inference_mode()
def features(waves: Sequence[np.ndarray], encoder: SpeechEncoder, layer: int, pool: int = 1) -> list[Tensor]:
    """Features, float32 [units * pool, D] each, of waves float32 [time] at 16 kHz.

    Silence is appended to whole units. Pieces of several waves are run together where the encoder allows it.

    Args:
        waves: any number. encoder: whose. layer: after which; 0 is what enters the first. pool: features to a unit.
    """
    padded = [_padded(wave, encoder, pool) for wave in waves]
    cuts = [list(_cuts(_count(len(wave), encoder), encoder)) for wave in padded]
    pieces = [_piece(wave, begin, end, encoder) for wave, found in zip(padded, cuts) for begin, end, _, _ in found]
    read: list[Tensor] = []
    for start in range(0, len(pieces), encoder.batch):
        read += encoder.read(pieces[start : start + encoder.batch], layer)
    rows, rest = [], iter(read)
    for found in cuts:
        kept = [next(rest)[first - begin : last - begin] for begin, _, first, last in found]
        rows.append(kept[0] if len(kept) == 1 else torch.cat(kept))
    return rows


def pooled(row: Tensor, pool: int) -> Tensor:
    """The mean of every `pool` features: [units * pool, D] to [units, D]."""
    return row if pool == 1 else row.unflatten(0, (-1, pool)).mean(1)


def pool_of(rate: float | None, encoder: SpeechEncoder) -> int:
    """Of how many features one unit is the mean, to give `rate` units a second (8.3 stands for 50 / 6).

    Raises:
        ValueError: if none does.
    """
    own = SAMPLING_RATE / encoder.stride
    if rate is None:
        return 1
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"hubert-units: rate must be a positive number of units a second, got {rate!r}")
    pool = round(own / rate) if rate > own / encoder.window else 0
    if pool < 1 or abs(own / pool - rate) > 0.01 * rate:
        wanted = min(max(own / rate, 1.0), encoder.window - 1)
        near = " and ".join(f"{own / n:.4g}" for n in dict.fromkeys((math.floor(wanted), math.ceil(wanted))))
        raise ValueError(
            f"hubert-units: rate={rate:g} must divide the encoder's {own:g} features a second; {near} would be nearest"
        )
    return pool


class EncoderModel:
    """Loads an encoder alone, or out of a model that has a decoder behind it, of which then no weight is read."""

    @staticmethod
    def from_config(config: Any, **how: Any) -> Any:
        """A new one."""
        return WhisperEncoder(config) if _whisper(config) else AutoModel.from_config(config, **how)

    @staticmethod
    def from_pretrained(source: str, **how: Any) -> Any:
        """A stored one, as transformers' method of this name."""
        hub = {name: value for name, value in how.items() if name not in ("dtype", "output_loading_info")}
        if not _whisper(config := AutoConfig.from_pretrained(source, **hub)):
            return AutoModel.from_pretrained(source, **how)
        mapping = {r"^(model\.)?encoder\.": ""}
        return WhisperEncoder.from_pretrained(source, config=config, key_mapping=mapping, **how)


def _whisper(config: Any) -> bool:
    return bool(config.model_type == "whisper")


def _cut(model: Any, positions: int) -> PreTrainedModel:
    """The encoder for shorter windows: it shares all tensors but the table of positions, of which it has a part."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared[id(model.config)] = copy.copy(model.config)
    cut = copy.deepcopy(model, shared)
    cut.config.max_source_positions = positions
    cut.embed_positions = nn.Embedding.from_pretrained(model.embed_positions.weight[:positions])
    return cut


def _features(window: float | None, stride: int, default: float, positions: float) -> int:
    """Features in a window of so many seconds."""
    most = positions * stride / SAMPLING_RATE
    if window is None:
        window = min(default, most)
    elif isinstance(window, bool) or not isinstance(window, int | float) or not LEAST_WINDOW <= window <= most:
        raise ValueError(f"hubert-units: window must be from {LEAST_WINDOW:g} to {most:g} seconds, got {window!r}")
    return int(window * SAMPLING_RATE / stride)


def _padded(wave: np.ndarray, encoder: SpeechEncoder, pool: int) -> np.ndarray:
    """With silence, so that features come out in whole units."""
    wave = np.pad(wave, (0, max(0, encoder.field - len(wave))))
    if encoder.field == encoder.stride:
        wave = np.pad(wave, (0, -len(wave) % encoder.stride))
    return np.pad(wave, (0, -_count(len(wave), encoder) % pool * encoder.stride))


def _count(samples: int, encoder: SpeechEncoder) -> int:
    return (samples - encoder.field) // encoder.stride + 1


def _cuts(count: int, encoder: SpeechEncoder) -> Iterator[tuple[int, int, int, int]]:
    """Of `count` features the pieces: begin and end, and the first and last that is kept (as ends of ranges)."""
    context = int(OVERLAP * SAMPLING_RATE / encoder.stride)
    begin = 0
    while True:
        end = min(count, begin + encoder.window)
        last = count if end == count else end - context
        yield begin, end, begin + (context if begin else 0), last
        if end == count:
            return
        begin = last - context


def _piece(wave: np.ndarray, begin: int, end: int, encoder: SpeechEncoder) -> np.ndarray:
    """The samples of a piece; the last has all that is left, as a first convolution may normalise over time."""
    last = len(wave) if end == _count(len(wave), encoder) else (end - 1) * encoder.stride + encoder.field
    return wave[begin * encoder.stride : last]


def _hidden(model: PreTrainedModel, values: Tensor, layer: int) -> Tensor:
    return model(values.to(model.device), output_hidden_states=True).hidden_states[layer].cpu()

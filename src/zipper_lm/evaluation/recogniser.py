"""A small independent recogniser that judges generated speech.

- It shares no code, features or weights with the speech codec or any tower: own log-mel, own network.
- Characters by CTC (Graves et al. 2006), greedy decoding, no language model and no word list, so that it writes
  what it hears and not what would be likely.
- All augmentation (tempo, vocal tract length, smearing, noise, masks as in SpecAugment, arXiv 1904.08779) is done
  on its own features, in batches; it makes the judge tolerate synthetic sound without ever having heard any codec.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from transformers.audio_utils import mel_filter_bank

from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.weights import check_shapes, on_meta, shapes_of, stored_shapes

SAMPLE_RATE = 16_000
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_WINDOW, _HOP, _FFT = 400, 160, 512  # 25 ms, 10 ms
_STRIDE = 3  # frames per step of the network
_DYNAMICS = 1e-6  # mel power below the utterance's maximum that still counts: 60 dB
_LONGEST_SECONDS = 120  # to learn from, and to hear at once
_MIDDLE, _SIDE = 2000, 100  # steps of a piece of what is longer: 60 s, with 3 s on either side that is not written


@dataclass(kw_only=True)
class RecogniserConfig:
    """Shape of a `Recogniser`.

    Args:
        characters: what it can write; the CTC blank is added as id 0.
        n_mels: mel bands, 0 to 8 kHz.
        channels: width of the convolutions.
        dilations: one residual convolution (kernel 5, 33 Hz) each.
        hidden: width of each direction of the recurrent layer.
        dropout: 0 to below 1.
    """

    characters: str
    n_mels: int = 64
    channels: int = 128
    dilations: tuple[int, ...] = (1, 2, 4, 1)
    hidden: int = 128
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise ValueError(f"characters must be distinct and at least one, got {self.characters!r}")
        for name in ("n_mels", "channels", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.dilations = tuple(self.dilations)
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations must be one or more numbers of at least 1, got {self.dilations}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in 0 to below 1, got {self.dropout}")


class Recogniser(nn.Module):
    """Log-mel at 100 Hz, a convolution to 33 Hz, residual ones, a bidirectional GRU, one CTC output per step.

    Example:
        >>> judge = Recogniser.fit(waves, texts)  # doctest: +SKIP
        >>> judge.transcribe(generated)  # doctest: +SKIP
    """

    mel_filters: Tensor
    window: Tensor

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        self.config = config
        filters = mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=config.n_mels,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            mel_scale="htk",
        )
        self.register_buffer("mel_filters", torch.tensor(filters, dtype=torch.float32), persistent=False)
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        width = config.channels
        # 25 Hz is too coarse for fast speech: up to 22 letters a second, and blanks between double ones.
        self.first = _Convolution(config.n_mels, width, kernel=7, stride=_STRIDE)
        self.blocks = nn.ModuleList(_Convolution(width, width, dilation=d) for d in config.dilations)
        self.dropout = nn.Dropout(config.dropout)
        # Letters do not sit at fixed places in a sound; a recurrent layer can keep count of what is spelt already.
        self.recurrent = nn.GRU(width, config.hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * config.hidden, len(config.characters) + 1)

    # -- fitting ------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        waves: Sequence[np.ndarray],
        texts: Sequence[str],
        *,
        epochs: int = 8,
        batch_size: int = 16,
        learning_rate: float = 3e-3,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
        config: RecogniserConfig | None = None,
    ) -> Recogniser:
        """Fit a new judge, on CPU, in fp32; its weights are then rounded to fp16, as they are stored.

        Args:
            waves: mono sound at 16 kHz, one float array ``[samples]`` per utterance.
            texts: what is said in each.
            epochs: passes over the data, each augmented anew.
            batch_size: utterances per step.
            learning_rate: peak of a one-cycle schedule (AdamW).
            seed: of weights, order and augmentation; the caller's random state is left alone.
            progress: called with (step, steps, loss) after each step.
            config: shape; by default about 0.6 M parameters and the characters of the texts.

        Raises:
            ValueError: nothing to fit on, lengths differ, a text is empty, or a wave is not usable.
        """
        if not len(waves):
            raise ValueError("waves must hold at least one utterance, got none")
        if len(waves) != len(texts):
            raise ValueError(f"waves and texts must have the same length, got {len(waves)} and {len(texts)}")
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        clean = [normalise(text) for text in texts]
        for number, text in enumerate(clean):
            if not text:
                raise ValueError(f"texts[{number}] holds no words: {texts[number]!r}")
        if config is None:
            config = RecogniserConfig(characters="".join(sorted(set("".join(clean)))))
        unknown = set("".join(clean)) - set(config.characters)
        if unknown:
            raise ValueError(f"texts hold characters that config.characters lacks: {sorted(unknown)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            judge = cls(config)
            judge._train(_checked(waves, _LONGEST_SECONDS), clean, epochs, batch_size, learning_rate, progress)
        for parameter in judge.parameters():
            parameter.data = parameter.data.half().float()
        return judge.eval()

    def _train(
        self,
        waves: Sequence[Tensor],
        texts: Sequence[str],
        epochs: int,
        batch_size: int,
        learning_rate: float,
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        ids = {character: number for number, character in enumerate(self.config.characters, start=1)}
        targets = [torch.tensor([ids[c] for c in text]) for text in texts]
        with torch.no_grad():
            features = [self.features(wave) for wave in waves]
        steps = epochs * -(-len(waves) // batch_size)
        optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=learning_rate, total_steps=steps + 1, pct_start=0.15
        )
        self.train()
        step = 0
        for _ in range(epochs):
            for batch in _batches([len(f) for f in features], batch_size):
                padded, lengths = _augment(*_pad([features[i] for i in batch]))
                labels = [targets[i] for i in batch]
                log_probs, out_lengths = self(_standardise(padded, lengths), lengths)
                loss = F.ctc_loss(
                    log_probs.transpose(0, 1),
                    torch.cat(labels),
                    out_lengths,
                    torch.tensor([len(label) for label in labels]),
                    zero_infinity=True,  # a tempo-warped utterance may be too short for its text
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                step += 1
                if progress is not None:
                    progress(step, steps, loss.item())

    # -- hearing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def transcribe(self, waves: Sequence[np.ndarray], batch_size: int = 32) -> list[str]:
        """What is said in each wave: mono float ``[samples]`` at 16 kHz to lower-case words, maybe none.

        A wave of no or constant samples has no words: a generator that produced nothing must be judged, not crash.

        Raises:
            ValueError: a wave is not one-dimensional, or has NaN or infinite samples.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.eval()
        device = self.head.weight.device
        cuts = [list(_pieces(wave)) for wave in _checked(waves)]
        pieces = [piece for found in cuts for piece, _ in found]
        kept = [steps for found in cuts for _, steps in found]
        paths = [torch.zeros(0, dtype=torch.long)] * len(pieces)
        audible = [i for i, w in enumerate(pieces) if len(w) >= _WINDOW and bool((w != w[0]).any())]
        audible.sort(key=lambda i: len(pieces[i]))
        for start in range(0, len(audible), batch_size):
            batch = audible[start : start + batch_size]
            features, lengths = _pad([self.features(pieces[i].to(device)) for i in batch])
            log_probs, out_lengths = self(_standardise(features, lengths), lengths)
            for i, best, length in zip(batch, log_probs.argmax(-1).cpu(), out_lengths):
                paths[i] = best[: int(length)][kept[i]]
        heard, rest = [], iter(paths)
        for found in cuts:
            path = torch.cat([next(rest) for _ in found]).unique_consecutive().tolist()
            heard.append(normalise("".join(self.config.characters[k - 1] for k in path if k)))
        return heard

    def features(self, wave: Tensor) -> Tensor:
        """Log-mel power ``[frames, n_mels]`` at 100 Hz of a wave ``[samples]``, floored 60 dB below its maximum."""
        wave = wave - wave.mean()
        spectrum = torch.stft(
            F.pad(wave, (_FFT // 2, _FFT // 2)),
            _FFT,
            _HOP,
            _WINDOW,
            window=self.window,
            center=False,
            return_complex=True,
        )
        mel = spectrum.abs().square().T @ self.mel_filters
        peak = mel.max().clamp(min=1e-10)
        return (mel / peak).clamp(min=_DYNAMICS).log()

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features ``[batch, frames, n_mels]`` to log-probabilities ``[batch, steps, characters + 1]``.

        Args:
            features: zero beyond each utterance's length.
            lengths: frames of each, int64 ``[batch]``.

        Returns:
            log-probabilities at 33 Hz and the number of valid steps of each.
        """
        lengths = (lengths + _STRIDE - 1) // _STRIDE
        hidden = self.first(features, lengths)
        for block in self.blocks:
            hidden = hidden + self.dropout(block(hidden, lengths))
        packed = pack_padded_sequence(hidden, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.head(self.dropout(hidden)).log_softmax(-1), lengths

    def letters(self) -> frozenset[str]:
        """What it can write."""
        return frozenset(self.config.characters)

    def digest(self) -> str:
        """SHA-256, as hex, of all that decides what it says."""
        digest = hashlib.sha256(json.dumps(asdict(self.config)).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # -- storing ------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (fp16) into the folder `path`."""
        weights = {name: tensor.half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with files_into(path, last=CONFIG_FILE) as folder:
            save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            write_json(folder / CONFIG_FILE, {"kind": "recogniser", **asdict(self.config)})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Recogniser:
        """Read what `save_pretrained` wrote, in fp32 on CPU.

        Raises:
            ValueError: a file is missing, of another kind, or its tensors do not fit.
        """
        folder = Path(path)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"recogniser: no {name} in {folder}")
        settings = read_mapping(folder / CONFIG_FILE)
        kind = settings.pop("kind", None)
        if kind != "recogniser":
            raise ValueError(f"recogniser: {folder / CONFIG_FILE} has kind {kind!r}, not 'recogniser'")
        there = stored_shapes(folder / WEIGHTS_FILE)
        try:
            config = RecogniserConfig(**settings)
        except TypeError as error:
            raise ValueError(f"recogniser: {folder / CONFIG_FILE}: {error}") from error
        # Of the mel filters nothing is stored, so their number is held against the first convolution before all else.
        if (bands := there.get("first.convolution.weight", ())[1:2]) != (config.n_mels,):
            raise ValueError(f"recogniser: {folder}: n_mels is {config.n_mels}, the weights are for {bands}")
        needed = shapes_of(on_meta(f"recogniser: {folder}", lambda: cls(config), 4 * len(there)))
        check_shapes(f"recogniser: {folder} does not hold a recogniser's weights", there, needed)
        judge = cls(config)
        judge.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS_FILE).items()})
        return judge.eval()


class _Convolution(nn.Module):
    """Convolution over time, layer norm over channels, GELU; zero beyond each length, as its input must be."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 5, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.convolution = nn.Conv1d(inputs, outputs, kernel, stride, padding, dilation)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """``[batch, steps, inputs]`` to ``[batch, ceil(steps / stride), outputs]``; `lengths` are the outputs'."""
        hidden = self.convolution(hidden.transpose(1, 2)).transpose(1, 2)
        return F.gelu(self.norm(hidden)) * _mask(hidden, lengths)


def _pieces(wave: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """What is heard at once of a wave: all, or pieces that overlap; and of each the steps that are written. Each piece
    is brought to the loudness of speech by itself, so that a minute of faint noise in a long sound is not silent."""
    if len(wave) <= _LONGEST_SECONDS * SAMPLE_RATE:
        yield wave, slice(None)
        return
    step = _HOP * _STRIDE
    for begin in range(0, len(wave) // step + 1, _MIDDLE):
        first, last = max(0, begin - _SIDE), begin + _MIDDLE
        yield wave[first * step : (last + _SIDE) * step], slice(begin - first, last - first)


def _checked(waves: Sequence[np.ndarray], longest: float = math.inf) -> list[Tensor]:
    """Waves as fp32 tensors. Raises `ValueError` for the first that is not usable."""
    checked = []
    for number, wave in enumerate(waves):
        tensor = torch.as_tensor(np.asarray(wave, dtype=np.float32))
        if tensor.ndim != 1:
            raise ValueError(f"waves[{number}] must have one dimension, got shape {tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"waves[{number}] has NaN or infinite samples")
        if len(tensor) > longest * SAMPLE_RATE:
            raise ValueError(f"waves[{number}] must last at most {longest:g} s, got {len(tensor) / SAMPLE_RATE:.0f} s")
        checked.append(tensor)
    return checked


def _pad(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack ragged ``[frames, bands]``, zero beyond each length."""
    return pad_sequence(list(features), batch_first=True), torch.tensor([len(f) for f in features])


def _mask(hidden: Tensor, lengths: Tensor) -> Tensor:
    """1 at valid steps, else 0: ``[batch, steps, 1]``."""
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    return (steps < lengths.to(hidden.device)[:, None])[..., None].to(hidden.dtype)


def _standardise(features: Tensor, lengths: Tensor) -> Tensor:
    """Zero mean and unit variance per utterance and band over valid frames, zero beyond them."""
    mask = _mask(features, lengths)
    count = lengths.to(features.device)[:, None, None]
    mean = (features * mask).sum(1, keepdim=True) / count
    centred = (features - mean) * mask
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / (deviation + 0.5)


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """One epoch in random order, with utterances of similar length together."""
    jittered = torch.tensor(lengths) * (0.9 + 0.2 * torch.rand(len(lengths)))
    batches = jittered.argsort().split(batch_size)
    for number in torch.randperm(len(batches)).tolist():
        yield batches[number].tolist()


def _augment(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Vary log-mel power ``[batch, frames, bands]``, every utterance by its own amounts.

    Tempo +-15 %, frequency axis +-12 % (vocal tract length and pitch), smearing over time and frequency, spectral
    tilt, noise 25 to 60 dB below the mean, and one short mask along either axis. Louder noise and longer masks erase
    fricatives, and the judge then learns to guess them.
    """
    batch, frames, bands = features.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1)

    tempo, tract = uniform(0.85, 1.15), uniform(0.88, 1.12)
    new_lengths = (lengths / tempo.flatten()).long().clamp(min=1)
    new_frames = int(new_lengths.max())
    time = torch.arange(new_frames)[None, :, None] * tempo
    band = torch.arange(bands)[None, None, :] * tract
    grid = torch.stack(torch.broadcast_tensors(band / (bands - 1) * 2 - 1, time / max(frames - 1, 1) * 2 - 1), dim=-1)
    varied = F.grid_sample(features[:, None], grid, padding_mode="border", align_corners=True)[:, 0]

    width = uniform(0, 1)  # share of the neighbours' mean: vocoded sound is smeared
    smooth = F.avg_pool2d(varied[:, None], (5, 3), stride=1, padding=(2, 1), count_include_pad=False)[:, 0]
    varied = torch.lerp(varied, smooth, width * (torch.rand(batch, 1, 1) < 0.5))
    varied = varied + uniform(-1.5, 1.5) * torch.linspace(-1, 1, bands)

    level = varied.logsumexp((1, 2), keepdim=True) - np.log(new_frames * bands)
    noise = level - uniform(25, 60) * np.log(10) / 10 + uniform(-2, 2) * torch.linspace(-1, 1, bands)
    varied = torch.logaddexp(varied, noise + 0.5 * torch.randn_like(varied))

    quiet = varied.mean(1, keepdim=True)
    for axis, longest in ((1, 6), (2, 8)):
        size = varied.shape[axis]
        extent = uniform(0, longest)
        first = torch.rand(batch, 1, 1) * (size - extent)
        place = torch.arange(size).view(1, -1, 1) if axis == 1 else torch.arange(size).view(1, 1, -1)
        varied = torch.where((place >= first) & (place < first + extent), quiet, varied)
    return varied * _mask(varied, new_lengths), new_lengths

"""Learned way back from units to log-mel frames: a small convolutional network that sees each unit with its neighbours.

It is trained in minutes on the sound that a codec is fitted on, and corrects what look-up gives: each unit's mean
frames. Untrained it gives these unchanged. What a unit sounds like depends on who speaks, which units shall not tell; a
network that is not told either draws the mean of all who say it. So in training it is told whose voice it is, by the
mean and spread of the bands over the sound. Speaking, it has the mean voice, for which it needs to be told nothing.

Its frames become sound by Griffin-Lim, or by a published vocoder: then they are of the vocoder's own kind, and the
decoder has a table of its own of what look-up gives of these.

Letters: B rows of T units, N frames (T times those of a unit), M bands, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zipper_lm.codecs.kmeans import means
from zipper_lm.codecs.mel import BANDS, FLOOR, mel_to_sound
from zipper_lm.codecs.mel_vocoder import MelVocoder
from zipper_lm.codecs.network_folder import read_config, read_weights, write_network
from zipper_lm.utils.progress import run_bar
from zipper_lm.utils.schedules import one_cycle

DECODER_FOLDER = "decoder"
"""Where a codec's folder keeps it: no id depends on it."""
_VOCODER_FOLDER = "vocoder"
_AUDIBLE = 1 - 7.0 / -FLOOR  # of the way from the lowest to the highest value: frames that a voice is measured by
_ROWS, _CROP = 16, 40  # of a training step: units of each row
_RATE = 3e-3
_LOUDEST = 1e3  # of a log-mel value: no sound is as loud, nor as quiet


@dataclass(kw_only=True, frozen=True)
class MelDecoderConfig:
    """Sizes.

    Args:
        units: how many there are. frames: of 10 ms, to a unit. width: channels.
        dilations: of the convolutions over three units each; they add up to the neighbours seen on either side.
        bands: of a frame. low, high: values of a frame that the network sees as -1 and 1; none is lower.
        vocoder: whether a vocoder speaks the frames; then they are of its kind.

    Raises:
        ValueError: on a value out of range.
    """

    units: int
    frames: int
    width: int = 160
    dilations: tuple[int, ...] = (1, 2, 4, 1)
    bands: int = BANDS
    low: float = FLOOR
    high: float = 0.0
    vocoder: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilations", tuple(self.dilations))  # JSON has lists only
        sizes = {name: getattr(self, name) for name in ("units", "frames", "width", "bands")}
        for name, value in (sizes | {f"dilations[{i}]": d for i, d in enumerate(self.dilations)}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"decoder: {name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(self.vocoder, bool):
            raise ValueError(f"decoder: vocoder must be true or false, got {self.vocoder!r}")
        ends = [self.low, self.high]
        if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends) or not (
            -_LOUDEST < self.low < self.high < _LOUDEST
        ):
            raise ValueError(f"decoder: low and high must be rising numbers within {_LOUDEST:g} of 0, got {ends}")
        if not self.vocoder and (self.bands, *ends) != (BANDS, FLOOR, 0.0):
            raise ValueError(f"decoder: bands={self.bands}, low={self.low:g} and high={self.high:g} need a vocoder")

    @property
    def middle(self) -> float:
        """Value that the network sees as 0."""
        return (self.low + self.high) / 2

    @property
    def reach(self) -> float:
        """From there to what it sees as 1."""
        return (self.high - self.low) / 2


class MelDecoder(nn.Module):
    """Units to log-mel frames.

    Args:
        config: sizes. vocoder: speaks the frames, if the config says that one does.
    """

    mels: Tensor
    """With a vocoder, what look-up gives: float32 [units, frames * M]."""

    def __init__(self, config: MelDecoderConfig, vocoder: MelVocoder | None = None) -> None:
        super().__init__()
        self.config, self.vocoder = config, vocoder
        if config.vocoder:
            self.register_buffer("mels", torch.zeros(config.units, config.frames * config.bands))
        self.embedding = nn.Embedding(config.units, config.width)
        self.blocks = nn.ModuleList(_Block(config.width, dilation) for dilation in config.dilations)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.frames * config.bands)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, units: Tensor, plain: Tensor, voice: Tensor | None = None) -> Tensor:
        """Frames [B, N, M] of units [B, T], scaled as `plain` [B, N, M], which look-up gives.

        Args:
            units: long. plain: float32. voice: float32 [B, T, W], what is known of it; `None` for the mean of all.
        """
        h = self.embedding(units)
        if voice is not None:
            h = h + voice
        for block in self.blocks:
            h = block(h)
        return plain + self.head(self.norm(h)).reshape(plain.shape)

    @torch.inference_mode()
    def frames(self, units: Tensor, plain: Tensor) -> Tensor:
        """Log-mel frames, float32 [N, M], of a row of units, long [T].

        Args:
            units: the row. plain: what look-up gives in the codec; a decoder with a vocoder has its own.
        """
        own = laid_out(self.mels[units], self.config.frames, self.config.bands) if self.config.vocoder else plain
        if not len(units):
            return own
        scaled = self(units[None], ((own - self.config.middle) / self.config.reach)[None])[0]
        return (scaled * self.config.reach + self.config.middle).clamp_min(self.config.low)

    def sound(self, units: Tensor, plain: Tensor) -> np.ndarray:
        """Sound of these frames, float32 [N * 160] at 16 kHz, in [-1, 1]."""
        mel = self.frames(units, plain)
        return mel_to_sound(mel) if self.vocoder is None else self.vocoder(mel)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (half precision), and a vocoder into the folder `vocoder`."""
        write_network(folder, self.config, {name: tensor.half() for name, tensor in self.state_dict().items()})
        if self.vocoder is not None:
            self.vocoder.save(folder / _VOCODER_FOLDER)

    @classmethod
    def load(cls, folder: Path, *, units: int, frames: int) -> MelDecoder:
        """Read what `save` wrote.

        Args:
            folder: see there. units, frames: of the codec that it belongs to.

        Raises:
            ValueError: if a file is missing or damaged, the weights are not as its config says, or it is another
                codec's.
        """
        config = read_config(folder, MelDecoderConfig, units=units, frames=frames)
        tensors = read_weights(folder, lambda: cls(config))
        vocoder = MelVocoder.load(folder / _VOCODER_FOLDER) if config.vocoder else None
        if vocoder is not None and vocoder.bands != config.bands:
            raise ValueError(f"{folder}: bands={config.bands}, but the vocoder takes {vocoder.bands}")
        network = cls(config, vocoder)
        network.load_state_dict(tensors)
        return network.eval().requires_grad_(False)


def laid_out(mels: Tensor, frames: int, bands: int = BANDS) -> Tensor:
    """Units' own frames, float32 [..., T, D], as frames [..., T * frames, M]: D is that of all frames, or of one."""
    if mels.shape[-1] == bands:
        return mels.repeat_interleave(frames, -2)
    return mels.reshape(*mels.shape[:-2], -1, bands)


def check_training(steps: int, width: int) -> None:
    """Raise `ValueError` unless a decoder of this width can be trained for so many steps, of which 0 are none."""
    for name, value, least in (("refine_steps", steps, 0), ("width", width, 1 if steps else 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"codec.options: {name} must be a whole number of at least {least}, got {value!r}")


def fit_mel_decoder(
    rows: Sequence[Tensor],
    frames: Sequence[Tensor],
    mels: Tensor,
    config: MelDecoderConfig,
    *,
    steps: int,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    vocoder: MelVocoder | None = None,
) -> MelDecoder:
    """Train a decoder; L1 loss on log-mel frames. Of many hours a part is used, as much as so many steps see.

    Args:
        rows: units of each sound, long [T]. frames: its log-mel frames, float32 [N, M], of the vocoder's kind.
        mels: float32 [units, frames * M], or [units, M] where all of a unit's frames are alike: what look-up gives;
            with a vocoder it is made of the frames.
        config: sizes. steps: of the optimizer, each of 16 stretches of 40 units.
        seed: of weights and order. progress: called as ``progress(step, steps, loss)``. vocoder: speaks the frames.
    """
    if vocoder is not None:
        low, high = min(float(f.min()) for f in frames), max(float(f.max()) for f in frames)
        config = replace(config, bands=vocoder.bands, low=low, high=max(high, low + 1.0), vocoder=True)
        each = torch.cat(list(frames)).reshape(-1, config.frames * config.bands)
        mels = means(each, torch.cat(list(rows)), config.units)
    drawn = torch.Generator().manual_seed(seed)
    sounds = _enough(rows, steps, drawn)
    units = torch.cat([rows[i] for i in sounds])
    wanted = torch.cat([frames[i] for i in sounds])
    audible = config.low + _AUDIBLE * (config.high - config.low)
    voices, owner = _voices([frames[i] for i in sounds], audible), torch.arange(len(sounds))
    owner = owner.repeat_interleave(torch.tensor([len(rows[i]) for i in sounds]))
    crop = min(_CROP, len(units))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, told = MelDecoder(config, vocoder), nn.Linear(voices.shape[1], config.width, bias=False)
    if vocoder is not None:
        network.mels.copy_(mels)
    parameters = [*network.parameters(), *told.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01)
    schedule = one_cycle(optimizer, _RATE, steps)
    within, each = torch.arange(crop), torch.arange(crop * config.frames)
    with torch.enable_grad(), run_bar("decoder of units") as advance:
        advance(0, steps)
        for step in range(1, steps + 1):
            start = torch.randint(len(units) - crop + 1, (_ROWS, 1), generator=drawn)
            places = start + within
            given = units[places]
            plain = (laid_out(mels[given], config.frames, config.bands) - config.middle) / config.reach
            goal = (wanted[start * config.frames + each] - config.middle) / config.reach
            loss = nn.functional.l1_loss(network(given, plain, told(voices[owner[places]])), goal)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(step, steps, loss.item())
            if progress is not None:
                progress(step, steps, loss.item())
    return network.half().float().eval().requires_grad_(False)  # as it is stored


class _Block(nn.Module):
    """A gated convolution (Dauphin et al. 2017, arXiv 1612.08083) beside the identity."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.out(nn.functional.glu(self.conv(self.norm(h).transpose(1, 2)), 1).transpose(1, 2))


def _enough(rows: Sequence[Tensor], steps: int, drawn: torch.Generator) -> list[int]:
    """Numbers of the sounds, in random order, that have as many units as are looked at."""
    order = torch.randperm(len(rows), generator=drawn).tolist()
    total, most = 0, steps * _ROWS * _CROP
    for count, number in enumerate(order, 1):
        total += len(rows[number])
        if total >= most:
            return order[:count]
    return order


def _voices(frames: Sequence[Tensor], audible: float) -> Tensor:
    """Mean and spread of the bands of each sound's frames above the mean `audible`, brought to mean zero and variance
    one over the sounds: float32 [sounds, 2 * M]."""
    found = []
    for each in frames:
        heard = each[each.mean(1) > audible]
        heard = heard if len(heard) > 1 else each
        found.append(torch.cat([heard.mean(0), heard.std(0, correction=0)]))
    voices = torch.stack(found)
    return (voices - voices.mean(0)) / voices.std(0, correction=0).clamp_min(1e-3)

"""What of an encoder's features tells what is said: few numbers a unit, learned with the texts of some sounds.

K-means keeps what varies most, and in features of speech much of that is who speaks, how loud, and where in the window.
So a small network is trained first to keep what spells: a head with more context must spell each sound's text from its
output, by CTC (Graves et al. 2006), through noise, so that what lies near means the same. The head is thrown away and
the output made units of. So it is with the tokens of CosyVoice (arXiv 2407.05407), which are quantised inside of a
recogniser; there the whole recogniser is trained, here the encoder stays as it is.

Letters: B sounds of T units, P features to a unit, D width of a feature, S numbers a unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zipper_lm.codecs.network_folder import read_config, read_weights, write_network
from zipper_lm.utils.letters import BLANK, CLASSES, fits, letters_of
from zipper_lm.utils.progress import run_bar
from zipper_lm.utils.schedules import one_cycle

PROJECTION_FOLDER = "projection"
"""Where a codec's folder keeps it."""
_NOISE = 0.3  # beside a spread of one
_BATCH, _RATE = 32, 2e-3
LONGEST = 30.0
"""Seconds of the longest sound that it is learned from: a step has many of them side by side."""
_PLACES = 50  # a second, at least, that a head spells at: speech has up to twenty letters


@dataclass(frozen=True, kw_only=True)
class SpellingProjectionConfig:
    """Sizes.

    Args:
        features: numbers in a feature. pool: features to a unit. size: numbers a unit becomes.
        width: channels. kernel: units that one is made of, its neighbours on either side among them; odd.

    Raises:
        ValueError: on a value out of range.
    """

    features: int
    pool: int = 1
    size: int = 32
    width: int = 256
    kernel: int = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"projection: {name} must be a whole number of at least 1, got {value!r}")
        if self.kernel % 2 == 0:
            raise ValueError(f"projection: kernel must be odd, got {self.kernel}")


class SpellingProjection(nn.Module):
    """Features to few numbers a unit, with mean zero and variance one over these numbers.

    Args:
        config: sizes.
    """

    def __init__(self, config: SpellingProjectionConfig) -> None:
        super().__init__()
        self.config = config
        entering = config.features * config.pool
        # without a bias, so that zeros behind a shorter sound of a batch are what the convolution pads with
        self.norm = nn.LayerNorm(entering, bias=False)
        self.conv = nn.Conv1d(entering, config.width, config.kernel, padding=config.kernel // 2)
        self.out = nn.Linear(config.width, config.size)

    def forward(self, features: Tensor) -> Tensor:
        """Float32 [B, T * P, D] to float32 [B, T, S]."""
        units = features.unflatten(1, (-1, self.config.pool)).flatten(2)
        seen = F.gelu(self.conv(self.norm(units).transpose(1, 2)).transpose(1, 2))
        return F.layer_norm(self.out(seen), (self.config.size,))

    @torch.inference_mode()
    def units(self, features: Tensor) -> Tensor:
        """What of one sound's features, float32 [T * P, D], units are made of: float32 [T, S]."""
        found: Tensor = self(features[None])[0]
        return found

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        write_network(folder, self.config, self.state_dict())

    @classmethod
    def load(cls, folder: Path, *, features: int, pool: int) -> SpellingProjection:
        """Read what `save` wrote.

        Args:
            folder: see there. features, pool: of the codec that it belongs to.

        Raises:
            ValueError: if a file is missing or damaged, the weights are not as its config says, or it is another
                codec's.
        """
        config = read_config(folder, SpellingProjectionConfig, features=features, pool=pool)
        tensors = read_weights(folder, lambda: cls(config))
        network = cls(config)
        network.load_state_dict(tensors)
        return network.eval().requires_grad_(False)


class _Speller(nn.Module):
    """Spells from a projection's output, in training alone: convolutions beside the identity, some places a unit.

    Args:
        size: numbers a unit. width: channels. places: a unit.
    """

    def __init__(self, size: int, width: int, places: int) -> None:
        super().__init__()
        self.places = places
        self.enter = nn.Linear(size, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(3))
        self.head = nn.Linear(width, places * CLASSES)

    def forward(self, seen: Tensor) -> Tensor:
        """Float32 [B, T, S] to log-probabilities [B, T * places, classes]."""
        h = self.enter(seen)
        for norm, conv in zip(self.norms, self.convs):
            h = h + F.gelu(conv(norm(h).transpose(1, 2)).transpose(1, 2))
        return self.head(self.norms[-1](h)).unflatten(2, (self.places, -1)).flatten(1, 2).log_softmax(-1)


def check_spelling(steps: int) -> None:
    """Raise `ValueError` unless a projection can be trained for so many steps, of which 0 are none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"codec.options: spelling_steps must be a whole number of at least 0, got {steps!r}")


def fit_spelling_projection(
    features: Sequence[Tensor],
    texts: Sequence[str | None],
    pool: int,
    rate: float,
    *,
    steps: int,
    seed: int = 0,
) -> SpellingProjection:
    """Train a projection.

    Args:
        features: of each sound, float32 [T * P, D].
        texts: what is said in each, `None` if that is not known. Those of more than 30 s are left out.
        pool: features to a unit. rate: units a second. steps: of the optimizer, each of 32 sounds of like length.
        seed: of weights, order and noise.

    Raises:
        ValueError: if no text is left that its sound has time for, or the loss becomes infinite or no number.
    """
    places = max(1, round(_PLACES / rate))
    spelled = [[] if text is None else letters_of(text) for text in texts]
    units = [len(row) // pool for row in features]
    short = [i for i, count in enumerate(units) if spelled[i] and count <= LONGEST * rate]
    kept = [i for i in short if fits(spelled[i], units[i] * places)]
    if not kept:
        raise ValueError(
            f"codec.options: spelling_steps={steps} needs sounds with texts that they have time for; of "
            f"{len(features)} sounds {sum(map(bool, spelled))} have texts, {len(short)} of these last at most "
            f"{LONGEST:g} s, and none of those is as long as its letters take"
        )
    drawn = torch.Generator().manual_seed(seed)
    config = SpellingProjectionConfig(features=features[0].shape[1], pool=pool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, speller = SpellingProjection(config), _Speller(config.size, config.width, places)
    parameters = [*network.parameters(), *speller.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01)
    schedule = one_cycle(optimizer, _RATE, steps)
    batches = _batches(kept, units, drawn)
    with torch.enable_grad(), run_bar("what of the features spells") as advance:
        advance(0, steps)
        for step in range(1, steps + 1):
            rows = next(batches)
            letters = [torch.tensor(spelled[i]) for i in rows]
            lengths = torch.tensor([units[i] * places for i in rows])
            seen = network(pad_sequence([features[i] for i in rows], batch_first=True))
            said = speller(seen + _NOISE * torch.randn(seen.shape, generator=drawn))
            counts = torch.tensor([len(row) for row in letters])
            loss = F.ctc_loss(said.transpose(0, 1), torch.cat(letters), lengths, counts, BLANK, "sum") / counts.sum()
            if not torch.isfinite(loss):
                raise ValueError(
                    f"codec.options: spelling_steps={steps}: the loss is {loss.item()} at step {step}: this layer's "
                    "features hold numbers that nothing can be learned from; take another layer"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(step, steps, loss.item())
    return network.eval().requires_grad_(False)


def _batches(rows: Sequence[int], lengths: Sequence[int], drawn: torch.Generator) -> Iterator[list[int]]:
    """Batches of like length, without end, each pass in another order."""
    ordered = sorted(rows, key=lambda i: lengths[i])
    batches = [ordered[i : i + _BATCH] for i in range(0, len(ordered), _BATCH)]
    while True:
        for number in torch.randperm(len(batches), generator=drawn).tolist():
            yield batches[number]

"""Joint CTC: what a zip remembers of a source must spell the text that is written from it.

The loss is connectionist temporal classification (Graves et al. 2006) beside that of attention, as Kim, Hori and
Watanabe have it (arXiv 1609.06773, section 2.3): there on a recogniser's encoder, here on the memory that each zip
layer of a pair keeps of the source's segment, through a linear head of its own, before any query looks at it. Heads
spell the text in the bytes of its small letters (UTF-8), so that there is nothing to fit and no language is left out.
They exist in training only: no model and no generation has them. Where a source has fewer tokens than the text has
letters, as codecs of few tokens a second do, each token is laid out over some places, at each of which a letter may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from zipper_lm.data.collation import Batch, collate
from zipper_lm.data.document import Document
from zipper_lm.fusion.loss import share
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import rows_that_see
from zipper_lm.training.beside import Pair, padded, segment_pairs, summed_ctc
from zipper_lm.utils.host import send
from zipper_lm.utils.letters import BLANK, CLASSES, fits, letters_of, text_of
from zipper_lm.utils.processes import several

HEADS_FILE = "ctc.safetensors"
"""In a training's checkpoint, what joint CTC spells with."""
TRIED = 64
"""Documents that are looked at before training: of these at least half of the texts must fit."""
MOST_PLACES = 8
"""A token's, at most."""


@dataclass(frozen=True)
class Spelled:
    """A text, and where it is to be spelled.

    Attributes:
        row: of the batch. read: int64 ``[time]``, where the source's tokens stand. letters: bytes of the text, from 1.
        places: at which each token spells.
    """

    row: int
    read: Tensor
    letters: list[int]
    places: int = 1

    @classmethod
    def of(cls, text: str, row: int, read: Tensor, places: int = 1) -> Spelled:
        """A text in the bytes of its small letters."""
        return cls(row, read, letters_of(text), places)

    @property
    def fits(self) -> bool:
        """Whether there is a place for each letter, and one between two that are the same."""
        return fits(self.letters, len(self.read) * self.places)


def places_for(texts: Sequence[Spelled]) -> int | None:
    """The fewest places a token at which at least half of some texts fit; `None` where `MOST_PLACES` are too few."""
    for places in range(1, MOST_PLACES + 1):
        if 2 * sum(replace(each, places=places).fits for each in texts) >= len(texts):
            return places
    return None


class Ctc(nn.Module):
    """The loss, and its heads; see `zipper_lm.training.beside.BesideLoss`.

    Args:
        model: whose zips it is for. weights: of pairs.
        documents: of the training, which tell how many letters there are to a token.

    Raises:
        ValueError: for a reader without a codec, or whose codec makes no text, and for a pair of whose texts less than
            half have at most `MOST_PLACES` letters for each token of the source's segment.
    """

    name = "ctc"

    def __init__(self, model: ZippedTowers, weights: Mapping[Pair, float], documents: Iterable[Document] = ()) -> None:
        super().__init__()
        self.weights: Mapping[Pair, float] = dict(weights)
        codecs = model.processor.codecs if model.processor is not None else {}
        if lacking := sorted({reader for reader, _ in weights} - set(codecs)):
            raise ValueError(f"training.ctc spells what is written, but {lacking} have no codecs")
        self._decode: dict[str, Callable[[Any], list[Any]]] = {reader: codecs[reader].decode for reader, _ in weights}
        self.places: dict[Pair, int] = dict.fromkeys(weights, 1)
        if looked_at := list(documents):
            batch = collate(looked_at, model.specials)
            self.places = {pair: self._places(batch, pair) for pair in weights}
        self.heads = nn.ModuleList(
            nn.ModuleList(
                nn.Linear(model.tower(pair[0]).hidden_size, CLASSES * self.places[pair])
                for _ in model.layer_pairs[pair]
            )
            for pair in weights
        )

    def decode(self, reader: str, ids: list[list[int]]) -> list[str]:
        """The texts of what a reader writes."""
        return self._decode[reader](ids) if ids else []

    def heads_of(self, pair: Pair) -> Sequence[nn.Module]:
        """What spells from each zip layer of a pair."""
        return list(self.heads[list(self.weights).index(pair)])  # type: ignore[call-overload]

    def spelled(self, batch: Batch, pair: Pair) -> list[Spelled]:
        """The texts of a batch that a pair's reader writes from its source."""
        found = segment_pairs(batch, pair)
        texts = self.decode(pair[0], [each.labels.tolist() for each in found])
        places = self.places[pair]
        return [Spelled.of(text, each.row, each.read, places) for each, text in zip(found, texts, strict=True)]

    def served(self, batch: Batch, pair: Pair) -> list[Spelled]:
        """Those that are counted: of some letters, and not of too many."""
        return [each for each in self.spelled(batch, pair) if each.letters and each.fits]

    def counts(self, batch: Batch) -> dict[Pair, Tensor]:
        """The letters that are spelled."""
        return {p: torch.tensor(sum(len(e.letters) for e in self.served(batch, p))) for p in self.weights}

    @contextmanager
    def watch(self, model: ZippedTowers, batch: Batch, counts: Mapping[Pair, Tensor]) -> Iterator[list[Tensor]]:
        """A cost of each zip layer: the mean of all its letters', over the layers of its pair."""
        costs: list[Tensor] = []
        with ExitStack() as hooks:
            for pair, weight in self.weights.items():
                if not (texts := self.served(batch, pair)):
                    continue
                rows = rows_that_see(batch[pair[0]], batch[pair[1]])
                number = {row: n for n, row in enumerate([] if rows is None else rows.tolist())}
                here = [replace(each, row=number.get(each.row, each.row)) for each in texts]
                heads = self.heads_of(pair)
                for k, head in enumerate(heads):
                    watch = _Watch(costs, head, weight / len(heads), counts[pair], here)
                    remembers = model.zip_layer(*pair, k).memory_projection
                    hooks.callback(remembers.register_forward_hook(watch).remove)
            yield costs

    def _places(self, batch: Batch, pair: Pair) -> int:
        """A token's, so that most texts of a batch fit; raise `ValueError` where there are none that are enough."""
        reader, source = pair
        named = f"training.ctc: '{source}->{reader}'"
        found = segment_pairs(batch, pair)
        if any(not isinstance(said, str) for said in self._decode[reader]([f.labels.tolist() for f in found[:1]])):
            raise ValueError(f"{named} writes what is no text, and cannot be spelled")
        texts = [each for each in self.spelled(batch, pair) if each.letters]
        if (places := places_for(texts)) is None:
            raise ValueError(
                f"{named}: most of {len(texts)} texts have more than {MOST_PLACES} letters for each token that they "
                "are written from, so that it cannot spell them; take a codec with more tokens a second"
            )
        return places


class TowerCtc(nn.Module):
    """The same for a tower that is pre-trained alone: what some of its layers hold of a row spells the row's text.

    Several layers are spelled from, as Lee and Watanabe have it (arXiv 2102.03216); each is normalised first. A step is
    far cheaper than one beside the tower that will write the text.

    Args:
        width: of the tower. layers: indices of those that are spelled from. places: at which each token spells.
    """

    def __init__(self, width: int, layers: Sequence[int], places: int = 1) -> None:
        super().__init__()
        self.layers, self.places = list(layers), places
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES * places)) for _ in layers
        )

    def forward(self, states: Sequence[Tensor], texts: Sequence[Spelled], letters: int) -> Tensor:
        """The mean cost of a letter, in nats, over the layers.

        Args:
            states: of each layer ``[rows, time, width]``, before the first one the embeddings. texts: that fit.
            letters: by which the sum is divided, those of a step.
        """
        costs = [ctc(states[layer + 1], head, texts) for layer, head in zip(self.layers, self.heads)]
        return torch.stack(costs).sum() / (len(costs) * max(1, letters))

    def spell(self, states: Sequence[Tensor], texts: Sequence[Spelled]) -> list[str]:
        """What stands where texts are to be spelled: of each place the likeliest letter, by the last of the layers.

        Args:
            states: as of `forward`. texts: where; their letters are not looked at.
        """
        said = []
        for each in texts:
            logits = self.heads[-1](states[self.layers[-1] + 1][each.row, each.read.to(states[-1].device)].float())
            letters = logits.unflatten(-1, (self.places, -1)).flatten(0, 1).argmax(-1).unique_consecutive()
            said.append(text_of(letters[letters != BLANK].tolist()))
        return said


class HeadsCallback(TrainerCallback):
    """What joint CTC spells with is no part of the model, whose gradients are averaged over processes and cleared."""

    def __init__(self, heads: nn.Module, average: Callable[[Tensor], Tensor]) -> None:
        self.heads, self.average = heads, average

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """All processes have the mean of their gradients."""
        for parameter in self.heads.parameters() if several() else ():
            parameter.grad = self.average(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are used."""
        self.heads.zero_grad()


def ctc(memory: Tensor, head: nn.Module, texts: Sequence[Spelled]) -> Tensor:
    """Summed negative log-probability, in nats, that a head's reading of a memory spells texts.

    Args:
        memory: ``[rows, time, width]``. head: ``[..., width]`` to ``[..., places * classes]``, in a dtype of its own:
            FSDP may compute zips in another. texts: that fit, with as many places a token.
    """
    each_token = texts[0].places
    flat = padded([each.row * memory.shape[1] + each.read for each in texts])
    letters = padded([torch.tensor(each.letters) for each in texts])
    places, letters = send([flat, letters], memory.device)
    read = memory.flatten(0, 1).index_select(0, places.flatten())
    logits = head(read.to(next(head.parameters()).dtype)).unflatten(0, flat.shape)
    times = torch.tensor([len(e.read) * each_token for e in texts])
    spelled = torch.tensor([len(e.letters) for e in texts])
    logits = logits.unflatten(2, (each_token, -1)).flatten(1, 2).float().log_softmax(-1).transpose(0, 1)
    return summed_ctc(logits, letters, times, spelled)


class _Watch:
    """A forward hook of a zip layer's memory projection, which writes its weighted cost down."""

    def __init__(
        self, costs: list[Tensor], head: nn.Module, weight: float, count: Tensor, texts: Sequence[Spelled]
    ) -> None:
        self.costs, self.head, self.weight, self.count, self.texts = costs, head, weight, count, texts

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], memory: Tensor) -> None:
        self.costs.append(self.weight * share(ctc(memory, self.head, self.texts), self.count))

"""Zips as data: who reads whom, at which layers, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, Literal

from zipper_lm.fusion.fields import Stream, check_scale, one_of

Positions = Literal["none", "sinusoid", "rotary"]
Projection = Literal["linear", "relu", "mlp"]
Embeddings = Literal["embeddings"]
EMBEDDINGS = -1
"""In the place of a source's layer: what enters its first layer, before any projection."""
MOST_CONTEXT = 64
"""Neighbours on each side: a zip's first matrix grows with them."""


@dataclass(kw_only=True)
class ZipSpec:
    """One directed zip: how `reader` reads `source`. The default is all pairs, four layers evenly spaced.

    Args:
        reader, source: tower names; ``"*"`` stands for every tower.
        layers: how many layers of each tower, evenly spaced and ending at the last, or the reader's layers by index.
        source_layers: the source's layers, as many as `layers`; `None` means as many, evenly spaced. A state says what
            comes next; which token stands there is plain in the embeddings. ``"embeddings"`` reads those in the place
            of each layer, -1 in a list in the place of one.
        heads: attention heads; `None` means one per 64 of the reader's width, at least 4.
        feed_forward: whether a gated feed-forward follows (Flamingo's block, as in the paper).
        gate_start: start of the gates before tanh. At 0 (Flamingo) the output matrices start random, otherwise at zero:
            either way a fresh zip adds exactly nothing.
        positions: what tells the cross-attention where a token stands in its segment (DESIGN section 3).
        stretch: reader tokens per source token. Places of both are counted in tokens of the coarser stream, so that
            attention starts near the diagonal. `None` is 1; `zipper fuse` measures it on the aligned data.
        projection: from the source's width to the reader's: one matrix, the paper's relu(linear), or a 3-layer MLP.
        context: neighbours on each side that a token of the source offers its reader with itself, of its own segment.
        scale: what the zip adds is multiplied by this: a number, one for each layer, or ``"stream"``, which becomes the
            size of the reader's residual stream after each layer when the model is fused (`zipper_lm.fusion.stream`).
        dropout: on attention weights, in training.
        attention: name in transformers' attention interface, of a function that obeys a bool mask: ``"sdpa"``,
            ``"eager"``, or one that you registered there.
    """

    reader: str = "*"
    source: str = "*"
    layers: int | list[int] = 4
    source_layers: list[int] | Embeddings | None = None
    heads: int | None = None
    feed_forward: bool = False
    gate_start: float = 1.0
    positions: Positions = "sinusoid"
    stretch: float | None = None
    projection: Projection = "relu"
    context: int = 0
    scale: float | list[float] | Stream = 1.0
    dropout: float = 0.0
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        one_of("zip.positions", self.positions, Positions)
        one_of("zip.projection", self.projection, Projection)
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"zip.layers must be at least 1, got {self.layers}")
        if type(self.layers) is not int and not _are_layers(self.layers):
            raise ValueError(f"zip.layers must be a whole number, or a list of such, got {self.layers!r:.60}")
        if self.source_layers not in (None, "embeddings") and not _are_layers(self.source_layers):
            raise ValueError(
                f"zip.source_layers must be 'embeddings' or a list of whole numbers, got {self.source_layers!r:.60}"
            )
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"zip.heads must be at least 1, got {self.heads}")
        if self.stretch is not None and not self.stretch > 0:
            raise ValueError(f"zip.stretch must be above 0, got {self.stretch}")
        if type(self.context) is not int or not 0 <= self.context <= MOST_CONTEXT:
            raise ValueError(f"zip.context must be a whole number from 0 to {MOST_CONTEXT}, got {self.context!r:.60}")
        check_scale("zip.scale", self.scale)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"zip.dropout must be in [0, 1), got {self.dropout}")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Reader's layer and source's layer, of a zip with explicit layers."""
        assert isinstance(self.layers, list)
        assert isinstance(self.source_layers, list)
        return list(zip(self.layers, self.source_layers, strict=True))

    @property
    def scales(self) -> list[float]:
        """Of each layer, of a zip with explicit layers.

        Raises:
            ValueError: if they are not known yet.
        """
        assert isinstance(self.layers, list)
        if self.scale == "stream":
            raise ValueError(f"zip {self.reader}<-{self.source}: scale='stream': needs numbers here; see `fuse`")
        return self.scale if isinstance(self.scale, list) else [self.scale] * len(self.layers)

    def resolve(self, depths: dict[str, int]) -> ZipSpec:
        """This zip with explicit layer lists.

        Args:
            depths: number of layers of each tower.

        Raises:
            ValueError: naming a layer out of range, or lists of different length.
        """
        deep, source_deep = depths[self.reader], depths[self.source]
        name, given = f"zip {self.reader}<-{self.source}", self.source_layers
        if isinstance(self.layers, list):
            layers = list(self.layers)
        elif isinstance(given, list):
            layers = evenly_spaced(len(given), deep)
        else:
            layers = evenly_spaced(min(self.layers, deep, *([source_deep] if given is None else [])), deep)
        if given == "embeddings":
            source_layers = [EMBEDDINGS] * len(layers)
        elif given is not None:
            source_layers = list(given)
        else:
            if len(layers) > source_deep:
                raise ValueError(
                    f"{name}: {len(layers)} layers, but tower {self.source!r} has only {source_deep}; "
                    "name source_layers"
                )
            source_layers = evenly_spaced(len(layers), source_deep)
        for field, chosen, limit in (("layers", layers, deep), ("source_layers", source_layers, source_deep)):
            if outside := [i for i in chosen if not 0 <= i < limit and (i, field) != (EMBEDDINGS, "source_layers")]:
                raise ValueError(f"{name}: {field} {outside} out of range, the tower has layers 0 to {limit - 1}")
            if sorted(chosen) != list(chosen) or (field == "layers" and len(set(chosen)) != len(chosen)):
                raise ValueError(f"{name}: {field} must be in rising order without repeats, got {chosen}")
        if not layers or len(layers) != len(source_layers):
            raise ValueError(f"{name}: {len(layers)} layers but {len(source_layers)} source_layers")
        if isinstance(self.scale, list) and len(self.scale) != len(layers):
            raise ValueError(f"{name}: {len(layers)} layers but {len(self.scale)} numbers in scale")
        return replace(self, layers=layers, source_layers=source_layers)


def evenly_spaced(count: int, depth: int) -> list[int]:
    """`count` layer indices of `depth`, evenly spaced, the last layer among them."""
    return [round((k + 1) * depth / count) - 1 for k in range(count)]


def expand(specs: Sequence[ZipSpec], depths: dict[str, int]) -> list[ZipSpec]:
    """Every directed zip with explicit layers; a later spec replaces an earlier one for the same pair.

    Raises:
        ValueError: for an unknown tower, a tower reading itself, or zips that would wait for each other for ever.
    """
    names = list(depths)
    zips: dict[tuple[str, str], ZipSpec] = {}
    for spec in specs:
        for end, name in (("reader", spec.reader), ("source", spec.source)):
            if name != "*" and name not in names:
                raise ValueError(f"zip.{end} names tower {name!r}; the towers are {names}")
        if spec.reader == spec.source != "*":
            raise ValueError(f"zip.reader and zip.source are both {spec.reader!r}; a tower cannot read itself")
        for reader, source in permutations(names, 2):
            if spec.reader in ("*", reader) and spec.source in ("*", source):
                zips[reader, source] = replace(spec, reader=reader, source=source).resolve(depths)
    check_order(list(zips.values()), depths)
    return list(zips.values())


def check_order(zips: Sequence[ZipSpec], depths: dict[str, int]) -> None:
    """Play the towers' layers in lockstep on paper: a tower may leave layer l only when its sources are there."""
    reached = dict.fromkeys(depths, 0)  # index of the layer a tower stands at, having computed it
    moved = True
    while moved:
        moved = False
        for name, depth in depths.items():
            needs = [(z.source, m) for z in zips if z.reader == name for layer, m in z.pairs if layer == reached[name]]
            if reached[name] < depth and all(reached[s] >= m for s, m in needs):
                reached[name] += 1
                moved = True
    if stuck := {n: r for n, r in reached.items() if r < depths[n]}:
        raise ValueError(f"zip layers cross: towers wait for each other for ever at layers {stuck}")


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int for index in value)

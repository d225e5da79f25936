"""Sequence codec: any other discrete sequence, as symbols of a fixed alphabet, or real numbers in bins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.layout import IdLayout, LaidOut
from zipper_lm.utils.files import files_into, write_json

Spacing = Literal["quantiles", "even"]


@dataclass(frozen=True, kw_only=True)
class SequenceCodecConfig:
    """What the units stand for: symbols, or bins.

    Args:
        alphabet: the symbols, in the order of their units; empty for bins.
        separator: what stands between two symbols in a string; may be empty only if every symbol is one character.
        edges: of the bins, rising, one more than there are bins; empty for symbols.

    Raises:
        ValueError: unless there is either an alphabet of different symbols that the separator keeps apart, or at least
            two edges, finite and rising.
    """

    alphabet: tuple[str, ...] = ()
    separator: str = ""
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphabet", tuple(self.alphabet))  # JSON has lists only
        object.__setattr__(self, "edges", tuple(self.edges))
        if not isinstance(self.separator, str):
            raise ValueError(f"sequence codec: separator must be a string, got {self.separator!r}")
        if bool(self.alphabet) == bool(self.edges):
            raise ValueError("sequence codec: it needs an alphabet or bins, and not both")
        if self.edges:
            if len(self.edges) < 2 or not np.isfinite(self.edges).all() or not (np.diff(self.edges) > 0).all():
                raise ValueError(f"sequence codec: edges must be at least 2, finite and rising, got {self.edges}")
            return
        seen = set()
        for symbol in self.alphabet:
            if not isinstance(symbol, str) or not symbol or symbol in seen:
                raise ValueError(f"sequence codec: symbols must be different strings, got {symbol!r} (quote numbers)")
            if self.separator and self.separator in symbol:
                raise ValueError(f"sequence codec: the symbol {symbol!r} holds the separator {self.separator!r}")
            if not self.separator and len(symbol) > 1:
                raise ValueError(f"sequence codec: the symbol {symbol!r} has several characters; give a separator")
            seen.add(symbol)

    @property
    def units(self) -> int:
        """Number of symbols or bins."""
        return len(self.alphabet) or len(self.edges) - 1


class SequenceCodec(LaidOut):
    """Sequences <-> ids, a token for each symbol or number.

    Over an alphabet, a value is a string or a list of symbols, and comes back as a string: proteins, DNA, events of
    music, moves of a game. Over bins, a value is a series of numbers, and comes back as the centres of their bins; a
    number beyond the outer edges counts as in the outer bin.

    Args:
        config: alphabet or bins.
        layout: where the units lie among the tower's ids; by default they come first, then BOS, EOS and PAD.

    Raises:
        ValueError: if `layout` has another number of units than `config`.
    """

    kind: ClassVar[str] = "sequence"

    def __init__(self, config: SequenceCodecConfig, layout: IdLayout | None = None) -> None:
        self.config, self.layout = config, layout or IdLayout(units=config.units)
        if self.layout.units != config.units:
            raise ValueError(f"sequence codec: {config.units} symbols or bins, but the layout has {self.layout.units}")
        self._unit = {symbol: unit for unit, symbol in enumerate(config.alphabet)}

    @classmethod
    def make(
        cls,
        values: Sequence[Any] = (),
        *,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        alphabet: str | Sequence[str] | None = None,
        separator: str | None = None,
        bins: int | None = None,
        low: float | None = None,
        high: float | None = None,
        spacing: Spacing = "quantiles",
        offset: int = 0,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
    ) -> SequenceCodec:
        """As a recipe asks for it.

        Args:
            values: to learn from, where neither `alphabet` nor `low` and `high` say all.
            alphabet: the symbols: a string of single characters, or a list. Without it, all symbols of the values,
                sorted.
            separator: between symbols in a string; by default none if all have one character, else a space. To learn an
                alphabet from strings with white space in them, it must be given: it may be ``""``.
            bins: number of bins, for series of numbers; fewer where numbers of `values` fall together.
            low, high: outer edges; by default the smallest and the largest number of the values.
            spacing: ``"quantiles"`` of the values (those beyond `low` and `high` count as these), or ``"even"``.
            offset, bos, eos, pad: of `IdLayout`.

        Raises:
            ValueError: on options that exclude each other or have no effect, or too little to learn from.
        """
        if source is not None:
            raise ValueError(f"sequence codec: source {source!r} holds no codec; leave it out to make one by options")
        if bins is not None:
            if alphabet is not None or separator is not None:
                raise ValueError("sequence codec: bins are for numbers; alphabet and separator are for symbols")
            config = SequenceCodecConfig(edges=_edges(values, bins, low, high, spacing))
        else:
            if (low, high, spacing) != (None, None, "quantiles"):
                raise ValueError("sequence codec: low, high and spacing have no effect without bins")
            symbols = _symbols(values, separator) if alphabet is None else list(alphabet)
            if separator is None:
                separator = " " if any(isinstance(s, str) and len(s) > 1 for s in symbols) else ""
            config = SequenceCodecConfig(alphabet=tuple(symbols), separator=separator)
        return cls(config, IdLayout(units=config.units, offset=offset, bos=bos, eos=eos, pad=pad))

    @property
    def rate(self) -> None:
        """`None`: a sequence is counted in symbols, not in seconds."""
        return None

    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Sequences to ids, one a symbol or number; an empty one has none.

        Args:
            values: strings or lists of symbols; or series of numbers: lists, arrays ``[numbers]``, or strings of
                numbers with white space between them.

        Raises:
            ValueError: if a value is none of these, has symbols that the alphabet lacks (they are named), or numbers
                that are not finite.
        """
        rows = []
        for number, value in enumerate(values):
            what = f"sequence {number}"
            if self.config.edges:
                units = np.digitize(_series(value, what), self.config.edges[1:-1]).tolist()
            else:
                symbols = _split(value, self.config.separator, what)
                if missing := sorted({s for s in symbols if s not in self._unit}):
                    raise ValueError(f"{what}: the alphabet lacks {missing[:10]}")
                units = [self._unit[s] for s in symbols]
            rows.append(self.layout.to_ids(units))
        return rows

    def decode(self, ids: Sequence[Sequence[int]]) -> list[Any]:
        """Ids to strings of symbols, or to lists of bin centres.

        Raises:
            ValueError: if an id is no symbol's or bin's, special ids included.
        """
        rows = [self.layout.to_units(row, f"sequence ids, row {number}") for number, row in enumerate(ids)]
        if not self.config.edges:
            return [self.config.separator.join(self.config.alphabet[u] for u in row) for row in rows]
        edges = np.array(self.config.edges)
        centres = (edges[:-1] + edges[1:]) / 2
        return [centres[row].tolist() if row else [] for row in rows]

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` into the folder `path`."""
        said = {"kind": self.kind, **asdict(self.config), "layout": self.layout.settings()}
        with files_into(path, last=CODEC_FILE) as folder:
            write_json(folder / CODEC_FILE, said)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SequenceCodec:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: if the file is missing, of another kind, or does not say what a sequence codec is.
        """
        said = read_codec_file(path, cls.kind)
        try:
            layout, config = said.pop("layout"), SequenceCodecConfig(**said)
            return cls(config, IdLayout(units=config.units, **layout))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: {CODEC_FILE} says no sequence codec ({error})") from error


def _split(value: Any, separator: str | None, what: str) -> list[str]:
    """The symbols of one value."""
    if isinstance(value, str):
        return [s for s in value.split(separator) if s] if separator else list(value)
    if isinstance(value, list | tuple) and all(isinstance(s, str) for s in value):
        return list(value)
    raise ValueError(f"{what}: expected a string or a list of symbols, got {_shown(value)}")


def _symbols(values: Iterable[Any], separator: str | None) -> list[str]:
    """All symbols of the values, sorted."""
    found: set[str] = set()
    for number, value in enumerate(values):
        found.update(_split(value, separator, f"sequence {number}"))
    if separator is None and any(c.isspace() for symbol in found for c in symbol):
        raise ValueError(
            'sequence codec: the values hold white space; give separator: " " if it stands between symbols, or '
            'separator: "" if it is one'
        )
    if not found:
        raise ValueError("sequence codec: no values to learn an alphabet from; give the option alphabet")
    return sorted(found)


def _series(value: Any, what: str) -> np.ndarray:
    """One value's numbers, float64 ``[numbers]``."""
    try:
        series = np.asarray(value.split() if isinstance(value, str) else value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected numbers, got {_shown(value)}") from error
    if series.ndim != 1 or not np.isfinite(series).all():
        raise ValueError(f"{what}: expected one dimension of finite numbers, got {_shown(value)}")
    return series


def _edges(values: Sequence[Any], bins: int, low: float | None, high: float | None, spacing: str) -> tuple[float, ...]:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"sequence codec: bins must be a whole number of at least 1, got {bins!r}")
    if spacing not in get_args(Spacing):
        raise ValueError(f"sequence codec: spacing must be one of {get_args(Spacing)}, got {spacing!r}")
    if spacing == "even" and low is not None and high is not None:
        numbers = np.array([low, high], dtype=np.float64)
    else:
        series = [_series(value, f"sequence {number}") for number, value in enumerate(values)]
        numbers = np.concatenate(series) if series else np.zeros(0)
        if not len(numbers):
            raise ValueError("sequence codec: no values to fit bins on; give spacing: even, low and high")
    outer = (numbers.min() if low is None else low, numbers.max() if high is None else high)
    if not outer[0] < outer[1]:
        raise ValueError(f"sequence codec: bins need low < high, got {outer[0]} and {outer[1]}")
    if spacing == "even":
        edges = np.linspace(*outer, bins + 1)
    else:
        inner = np.quantile(np.clip(numbers, *outer), np.arange(1, bins) / bins)
        edges = np.unique([*outer, *inner])  # ties would make bins without width
    return tuple(float(e) for e in edges)


def _shown(value: Any, limit: int = 60) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= limit else text[: limit - 1] + "…"

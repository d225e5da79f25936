"""Where a codec's units lie among the ids of its tower."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SPECIALS = ("bos", "eos", "pad")
MAX_IDS = 1 << 24
"""More ids than any vocabulary has: a number beyond it, out of a file, would only cost memory."""


@dataclass(frozen=True, kw_only=True)
class IdLayout:
    """Unit ``u`` of a codec is id ``offset + u`` of the tower; special ids lie outside of the units.

    Published checkpoints differ here and in nothing else: one starts its units at 1, one has its padding first, one has
    no BOS. All of that is a setting.

    Args:
        units: number of units.
        offset: id of unit 0.
        bos, eos, pad: special ids; those not given follow the units, in this order, after all that are given. A tower
            without an id of its own for BOS or PAD takes another special id for it: give both the same number.

    Raises:
        ValueError: if an id is negative or lies among the units.
    """

    units: int
    offset: int = 0
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("units", 1), ("offset", 0), *((name, 0) for name in SPECIALS)):
            value = getattr(self, name)
            if name in SPECIALS and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"layout: {name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"layout: {name} must be at least {least}, got {value}")
            if value > MAX_IDS:
                raise ValueError(f"layout: {name} must be at most {MAX_IDS}, got {value}")
        for name in SPECIALS:
            value = getattr(self, name)
            if value is not None and (self.offset <= value < self.offset + self.units):
                raise ValueError(
                    f"layout: {name}={value} must lie outside of the units, which are {self.offset} to "
                    f"{self.offset + self.units - 1}"
                )
        given = [v for v in (self.bos, self.eos, self.pad) if v is not None]
        following = max([self.offset + self.units - 1, *given]) + 1
        for name in SPECIALS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, following)
                following += 1

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.offset + self.units - 1, *self.specials) + 1

    @property
    def specials(self) -> tuple[int, int, int]:
        """BOS, EOS and PAD."""
        assert self.bos is not None
        assert self.eos is not None
        assert self.pad is not None
        return self.bos, self.eos, self.pad

    @property
    def content(self) -> range:
        """The ids of the units."""
        return range(self.offset, self.offset + self.units)

    def settings(self) -> dict[str, int]:
        """What makes this layout again, beside the number of units: offset, bos, eos and pad."""
        return {name: getattr(self, name) for name in ("offset", *SPECIALS)}

    def to_ids(self, units: Iterable[int]) -> list[int]:
        """Units, each in ``[0, units)``, to ids."""
        return [self.offset + int(u) for u in units]

    def to_units(self, ids: Iterable[int], what: str) -> list[int]:
        """Ids to units.

        Raises:
            ValueError: naming `what`, if an id is no unit's.
        """
        units = [int(i) - self.offset for i in ids]
        for unit in units:
            if not 0 <= unit < self.units:
                last = self.offset + self.units - 1
                raise ValueError(f"{what}: id {unit + self.offset} is no unit's: those are {self.offset} to {last}")
        return units


class LaidOut:
    """The ids of a codec that has a `layout` (see `zipper_lm.codecs.codec.Codec`)."""

    layout: IdLayout

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.layout.vocab_size

    @property
    def bos_id(self) -> int:
        """Id that opens every segment."""
        return self.layout.specials[0]

    @property
    def eos_id(self) -> int:
        """Id that ends every segment."""
        return self.layout.specials[1]

    @property
    def pad_id(self) -> int:
        """Id that fills batches."""
        return self.layout.specials[2]

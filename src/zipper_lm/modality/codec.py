"""The codec protocol: raw values of one modality <-> token ids. One file per codec implements it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

CODEC_FILE = "codec.json"
ENTRY_POINTS = "zipper_lm.codecs"
"""Entry point group in which other packages name their codecs: kind = "module:Class"."""


@runtime_checkable
class Codec(Protocol):
    """What a modality needs beside its tower.

    Ids returned by `encode` and taken by `decode` are content only: no BOS, no EOS, no padding. Every id,
    the special ones included, lies in ``[0, vocab_size)``.
    """

    kind: ClassVar[str]
    """Name of the codec's class in its `codec.json`, such as ``"text"``."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ids included: what the tower's vocabulary must hold at least."""

    @property
    def bos_id(self) -> int:
        """Id that opens every segment."""

    @property
    def eos_id(self) -> int:
        """Id that ends every segment."""

    @property
    def pad_id(self) -> int:
        """Id that fills batches; masked everywhere, so it may equal another special id."""

    @property
    def rate(self) -> float | None:
        """Tokens per second of the raw value, or `None` where there is no time."""

    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Raw values to content ids, one list per value. Raises `ValueError` on a value it cannot read."""

    def decode(self, ids: Sequence[Sequence[int]]) -> list[Any]:
        """Content ids to raw values, one per row."""

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` and whatever else (safetensors, tokenizer.json) into the folder `path`."""

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Codec:
        """Read what `save_pretrained` wrote."""


def load_codec(path: str | Path) -> Codec:
    """Load any codec from its folder: one of this package, or one that an installed package names as an entry point.

    Raises:
        ValueError: if the folder has no `codec.json`, or its `kind` is unknown.
    """
    from zipper_lm.modality.pixels import PixelCodec
    from zipper_lm.modality.speech import SpeechCodec
    from zipper_lm.modality.text import TextCodec

    ours: dict[str, type[Codec]] = {c.kind: c for c in (TextCodec, SpeechCodec, PixelCodec)}
    file = Path(path) / CODEC_FILE
    if not file.is_file():
        raise ValueError(f"codec: no {CODEC_FILE} in {path}")
    kind = json.loads(file.read_text(encoding="utf-8")).get("kind")
    if kind in ours:
        return ours[kind].from_pretrained(path)
    others = entry_points(group=ENTRY_POINTS)
    if kind in others.names:
        return others[kind].load().from_pretrained(path)
    raise ValueError(
        f"codec: {file} has kind {kind!r}; known kinds are {sorted({*ours, *others.names})}; "
        "if its class is at hand, pass codecs={name: codec}"
    )

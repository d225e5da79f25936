"""Two rows joined end to end into one: a longer sound, and all that is said in it.

Where pairs are few, a model learns whole rows by heart: which text goes with which sound. Of pairs of rows there are
many more, and in them it has to find the place (measured for recognisers by Lam et al. 2022, arXiv 2210.15398).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from zipper_lm.codecs.codec import Codec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.document import Segment
from zipper_lm.data.sources.table import Row

Joiner = Callable[[Segment, Segment], Segment]
"""Two encoded segments of one modality to one."""


def joiners(codecs: Mapping[str, Codec], modalities: Iterable[str]) -> dict[str, Joiner]:
    """How two segments become one: words behind words with a space between, sound behind sound token by token.

    Args:
        codecs: by modality. modalities: those to be joined.

    Raises:
        ValueError: for a modality that cannot be joined: it has no codec, or neither words nor time, as a picture.
    """
    found: dict[str, Joiner] = {}
    for name in modalities:
        codec = codecs.get(name)
        if isinstance(codec, TextCodec):
            found[name] = partial(_join_text, codec)
        elif codec is not None and codec.rate is not None:
            found[name] = _join_ids
        else:
            raise ValueError(
                f"training.join: two rows of modality {name!r} cannot be joined end to end: its codec has neither "
                "words nor time; leave join out"
            )
    return found


def join_rows(first: Row, second: Row, how: Mapping[str, Joiner]) -> Row:
    """One encoded row of two: every modality of `how` that both have."""
    return {name: join(first[name], second[name]) for name, join in how.items() if name in first and name in second}


def _join_ids(first: Segment, second: Segment) -> Segment:
    return Segment(first.modality, ids=[*(first.ids or []), *(second.ids or [])])


def _join_text(codec: TextCodec, first: Segment, second: Segment) -> Segment:
    """Encoded anew: a word's tokens may depend on the space before it."""
    texts = [s.value if isinstance(s.value, str) else codec.decode([s.ids or []])[0] for s in (first, second)]
    value = " ".join(texts)
    return Segment(first.modality, value=value, ids=codec.encode([value])[0])

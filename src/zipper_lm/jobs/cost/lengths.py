"""Rows as long as a recipe's: of what a step costs nothing else counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from zipper_lm.codecs.codec import Codec
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.encoding import encode_rows, token_counts
from zipper_lm.data.prepared import TRAIN
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.token_ids import TokenIds
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.rows import DataSource
from zipper_lm.jobs.towers import missing_towers, tower_spec
from zipper_lm.models.assemble import codec_of

ENCODED, SAMPLED = 64, 2048
"""Rows that are encoded to learn how long they are; rows of prepared data that are looked at."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row by modality, without BOS and EOS, and how many rows there are; `None`: that is not known."""

    rows: list[dict[str, int]]
    count: int | None


def read_lengths(recipe: FuseRecipe, named: Sequence[str], given: Mapping[str, int]) -> Lengths:
    """How long a recipe's rows are.

    Args:
        recipe: its data is read, and its codecs, where `given` leaves something to be learned.
        named: the modalities of its tasks. given: tokens by modality.

    Raises:
        ValueError: for a modality that is unknown or has no token; if data or a codec is not there, with the way on.
    """
    for name, tokens in given.items():
        if name not in recipe.towers:
            raise ValueError(f"plan: --lengths names {name!r}, but the towers are {list(recipe.towers)}")
        if tokens < 1:
            raise ValueError(f"plan: --lengths {name}={tokens}: must be at least 1")
    if not (unknown := sorted(set(named) - set(given))):
        return Lengths([{name: given[name] for name in named}], None)
    way = f"; say how long rows are: --lengths {','.join(f'{name}=TOKENS' for name in unknown)}"
    try:
        source = DataSource(recipe.data)
        source.check_modalities(unknown)
        opened = source.open(TRAIN, check=False)
        count = len(opened) if isinstance(opened, Sequence) else None
        if source.prepared is not None:
            step = max(1, len(opened) // SAMPLED)  # type: ignore[arg-type]
            rows: Sequence[Any] = opened.select(range(0, len(opened), step))  # type: ignore
        else:
            rows = list(islice(opened, ENCODED))
            codecs = {name: _codec(recipe, name) for name in unknown}
            rows = encode_rows(ZipperProcessor(codecs), rows, unknown)
    except ValueError as error:
        raise ValueError(f"plan: {error}{way}") from error
    found = [{m: tokens for m, (tokens, _) in counts.items()} | dict(given) for counts in token_counts(rows)]
    return Lengths([row for row in found if set(named) <= set(row)], count)


def _codec(recipe: FuseRecipe, name: str) -> Codec:
    tower = recipe.towers[name]
    if name in missing_towers(recipe) and tower.codec is None:
        raise ValueError(f"towers.{name}: its codec is not made yet")
    codec, why = codec_of(tower_spec(tower), tower.codec.make() if tower.codec is not None else None)
    if codec is None:
        raise ValueError(f"towers.{name}: it has no codec: {why}")
    return codec


def make_rows(model: Writer, lengths: Lengths, count: int, seed: int, documents: bool = False) -> list[Any]:
    """So many rows as long as those that were read, which come again where they are fewer.

    Args:
        model: of its towers the ids are. lengths: from `read_lengths`. count: of rows. seed: of their order.
        documents: make whole ones, a segment of each modality, all of them targets.

    Raises:
        ValueError: if there is no row.
    """
    if not lengths.rows:
        raise ValueError("plan: data: no row has all modalities of the tasks")
    chosen = np.random.default_rng(seed).permutation(np.arange(count) % len(lengths.rows))
    free = {name: _plain_id(model, name) for name in model.names}
    made = []
    for tokens in (lengths.rows[number] for number in chosen.tolist()):
        row = {
            n: Segment(n, ids=TokenIds(np.full(t, free[n])), target=documents) for n, t in tokens.items() if n in free
        }
        made.append(Document(row.values()) if documents else row)
    return made


def _plain_id(model: Writer, name: str) -> int:
    """An id that is none of the special ones."""
    return next(n for n in range(4) if n not in model.specials[name])


def join_ids(first: Segment, second: Segment) -> Segment:
    """Two segments end to end, whatever they are of."""
    ids = np.concatenate([np.asarray(first.ids), np.asarray(second.ids)])
    return Segment(first.modality, ids=TokenIds(ids))

"""The prefix of a frozen tower: the layers in which a document gives the same states every time.

They reach up to where the tower first reads another one, or to its input projection if that comes first. Within them
lie states that others read, too. Who knows all these states hands them to `Tower.forward`: the family's own `forward`
runs as ever, with its masks, positions, upper layers, norm and head; only the layers of the prefix do not compute.

Not every family allows that: upper layers may use more of a lower one than its hidden state (keys and values that
layers share, states that are collected). So it is tried (`check_prefix`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from zipper_lm.fusion.interface import FINE, embedding_of, plain_ids, trial
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.tower import Tower
from zipper_lm.utils.shapes import has_values

ROWS, TIME, PADDING = 3, 7, (0, 2, 4)
"""Of the trial: tokens at the right that are padding in each row."""


def prefix_depths(model: ZippedTowers, name: str) -> list[int]:
    """The depths of a tower whose states are kept: of the prefix, the last layer, and those that others read.

    Returns:
        In rising order; none if the tower is not frozen, or its input projection stands at its embeddings.
    """
    if model.config.tower_specs[name].train != "frozen":
        return []
    reads = [layer for (reader, _), pairs in model.layer_pairs.items() if reader == name for layer, _ in pairs]
    place = model.projection_layer(name)
    end = min([model.tower(name).depth, *(layer + 1 for layer in reads), *([] if place is None else [place])])
    read = {m for (_, source), pairs in model.layer_pairs.items() if source == name for _, m in pairs if 0 <= m < end}
    return sorted(read | {end - 1}) if end else []


def known_states(model: ZippedTowers, name: str, stream: Mapping[str, Tensor]) -> dict[int, Tensor] | None:
    """The states that come with a tower's side of a batch, by depth; `None` if there are none.

    Raises:
        ValueError: if they are not those that this model keeps of the tower.
    """
    if (known := stream.get("known")) is None:
        return None
    depths, width = prefix_depths(model, name), model.tower(name).hidden_size
    if tuple(known.shape[2:]) != (len(depths), width):
        raise ValueError(
            f"batch[{name!r}]['known'] has {list(known.shape[2:])} (states, width) of each token, this model keeps "
            f"{[len(depths), width]}, after the layers {depths}"
        )
    return dict(zip(depths, known.unbind(2)))


def prefix_states(tower: Tower, depths: Sequence[int], ids: Tensor) -> Tensor:
    """The states of streams of one length, without what comes after them.

    Args:
        depths: from `prefix_depths`. ids: int64 ``[batch, time]``.

    Returns:
        ``[batch, time, kept, hidden]``, on the tower's device, in the dtype that passes between its layers.
    """
    notes = _Notes(depths, enough=True)
    with trial(tower.backbone), suppress(_Enough):
        tower(ids.to(tower.device), torch.ones_like(ids, device=tower.device), listener=notes)
    return torch.stack([notes.states[depth] for depth in depths], 2)


def check_prefix(tower: Tower, depths: Sequence[int]) -> None:
    """Raise `ValueError` if a backbone does not give the same with the states of `depths` handed to it as without.

    It is tried on a few rows of different length, or of one where the family takes no padding; not without values.
    """
    if not has_values(embedding_of(tower.backbone)):
        return
    ids, mask = plain_ids(tower.backbone, ROWS, TIME), torch.ones(ROWS, TIME, dtype=torch.int64, device=tower.device)
    for row, padding in enumerate(PADDING):
        mask[row, TIME - padding :] = 0
    every = range(tower.depth)
    plain, handed = _Notes(every), _Notes(every)
    kind = type(tower.backbone).__name__
    cannot = f"training.prefix_cache: tower {tower.name!r} cannot be used with it, as {kind} does not go on from states"
    try:
        try:
            expected = _logits(tower, ids, mask, plain)
        except Exception:  # the family takes no padding
            mask = torch.ones_like(mask)
            expected = _logits(tower, ids, mask, plain)
        got = _logits(tower, ids, mask, handed, {depth: plain.states[depth] for depth in depths})
    except Exception as error:  # of any kind: what the family says where a layer has computed nothing
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{cannot} that it is handed: {first}") from error
    pairs = [(expected, got), *((plain.states[d], handed.states[d]) for d in every if d >= depths[-1])]
    seen = mask.bool()
    for before, after in pairs:
        before, after = before[seen].float(), after[seen].float()
        if not (after - before).abs().max() <= FINE * before.abs().max():
            raise ValueError(f"{cannot} that it is handed: its upper layers need more of the lower ones than these")


def _logits(
    tower: Tower, ids: Tensor, mask: Tensor, notes: _Notes, known: Mapping[int, Tensor] | None = None
) -> Tensor:
    with trial(tower.backbone):  # each with the same random state
        return tower(ids, mask, listener=notes, known=known)[0]


class _Enough(Exception):
    """Leaves a forward whose further layers nobody needs."""


class _Notes:
    """A listener that keeps states of some depths, and changes none."""

    def __init__(self, depths: Sequence[int], enough: bool = False) -> None:
        self.depths, self.enough = depths, enough
        self.states: dict[int, Tensor] = {}

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        if depth in self.depths:
            self.states[depth] = hidden_states
        if self.enough and depth == self.depths[-1]:
            raise _Enough
        return hidden_states

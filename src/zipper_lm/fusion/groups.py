"""Which towers a segment is read and written with, where zips were trained apart (`combining`).

A group is the towers of one training. A segment is computed with the towers of those of its tower's groups from which
something comes earlier in the document; where nothing does, with those of the first group that takes part. So in
speech -> text -> image the text is what the text-speech model makes of the speech, and the image what the text-image
model makes of the text: each pair does what it did before. Only a segment that comes after segments of several groups,
such as text after speech and image, is computed with all of them together, which no training has seen.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from zipper_lm.data.collation import Batch, batch_on_host
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import Reading, read, visible_between
from zipper_lm.utils.host import send


def towers_for(model: ZippedTowers, name: str, earlier: Collection[str], involved: Collection[str]) -> set[str]:
    """The towers that a segment of tower `name` is computed with, itself included.

    Args:
        earlier: towers of the segments before it. involved: towers of the whole document, what is to come included.
    """
    own = [set(group) for group in model.config.groups if name in group]
    seen = [group for group in own if group & set(earlier) - {name}]
    first = [group for group in own if len(group & set(involved)) > 1][:1]
    return {name}.union(*(seen or first))


def read_by_group(model: ZippedTowers, batch: Batch, logits: bool = True) -> Reading:
    """`read` for whole documents, each segment computed with the towers of its groups; `logits` as there."""
    names, groups = model.names, [set(group) for group in model.config.groups]
    known = batch_on_host(batch)
    keys = {name: _keys(model, known, name, groups) for name in batch}
    made: dict[str, Tensor] = {}
    finals: dict[str, Tensor] = {}
    for key in sorted({int(k) for found in keys.values() for k in found.unique()}):
        towers = set().union(*(group for g, group in enumerate(groups) if key >> g & 1))
        alone = [n for n in batch if (keys[n] == key).any()] if not towers else []
        for part in [{n} for n in alone] or [towers]:
            members = torch.tensor([n in part for n in names])
            chosen = {
                n: {**stream, "involved": stream["involved"] & members.to(stream["involved"].device)}
                for n, stream in batch.items()
                if n in part
            }
            reading = read(model, Batch(chosen), logits=logits)
            for name in chosen:
                for found, given in ((made, reading.logits), (finals, reading.finals)):
                    if name in given:
                        (here,) = send([(keys[name] == key)[..., None]], given[name].device)
                        found[name] = torch.where(here, given[name], found[name]) if name in found else given[name]
    return Reading(made, finals)


def _keys(model: ZippedTowers, batch: Batch, name: str, groups: list[set[str]]) -> Tensor:
    """int64 ``[batch, time]``: a bit for every group that a token is computed with. `batch` is on the host."""
    stream, names = batch[name], model.names
    segments = stream["segments"]
    key = torch.zeros_like(segments)
    default = torch.zeros_like(segments[:, :1])
    for g, group in reversed(list(enumerate(groups))):
        if name not in group:
            continue
        seen = torch.zeros_like(segments, dtype=torch.bool)
        for source in group & set(batch) - {name}:
            seen |= visible_between(stream, batch[source]).any(-1)
        key |= seen.long() << g
        several = stream["involved"][:, [names.index(n) for n in group]].sum(1, keepdim=True) > 1
        default = torch.where(several, 1 << g, default)
    return torch.where(key > 0, key, default)

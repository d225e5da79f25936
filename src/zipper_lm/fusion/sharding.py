"""Which parts of a zipped model FSDP2 gathers together, and which it leaves alone.

- A layer of a trained tower, a zip layer and an input projection are a unit each: gathered when it is called, let go
  after. What else is trained (embeddings, final norms, heads, handover) is the root's.
- What is frozen is left alone: whole in each process, in its own dtype, never sent. Spread, it would be gathered anew
  in every forward and backward of every batch; so that is done on request only.
- Every process runs every tower and zip in every forward (`ZipperModel.forward` sees to that): what one process would
  leave out, the others would wait for.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import tower_head
from zipper_lm.fusion.zips import InputProjection, ZipLayer


def shard(model: ZippedTowers, *, frozen: bool = False, **how: Any) -> None:
    """Spread a model's parameters over all processes by `torch.distributed.fsdp.fully_shard`, in place. Tensors keep
    their names; an optimizer is made afterwards.

    Args:
        model: the same in all processes. frozen: spread frozen towers, too. how: arguments of `fully_shard`, such as
            `mesh`, `mp_policy`, `reshard_after_forward`.

    Raises:
        ValueError: for a model whose zips were trained apart (`combine`).
    """
    check_shardable(model)
    alone = set() if frozen else {p for p in model.parameters() if not p.requires_grad}
    for unit in units(model):
        fully_shard(unit, ignored_params=alone, **how)
    fully_shard(model, ignored_params=alone, **how)


def units(model: ZippedTowers) -> list[nn.Module]:
    """The modules that are gathered one by one, those of frozen towers too."""
    layers = [layer for name in model.names for layer in model.tower(name).layers]
    return [*layers, *(part for part in model.modules() if isinstance(part, (ZipLayer, InputProjection)))]


def check_shardable(model: ZippedTowers) -> None:
    """Raise `ValueError` for a model that cannot be spread; learn what is learned by trying a whole one.

    Which groups of a combined model a batch is computed with depends on its documents, so that processes would wait for
    each other.
    """
    if model.config.groups:
        raise ValueError("FSDP: a model whose zips were trained apart (combine) cannot be spread over processes")
    for name in model.names:
        tower_head(model.tower(name))  # tried once, before it would be tried in one process alone

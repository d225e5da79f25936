"""What a generated token costs, in multiply-adds, as a function of what there is to look at.

Derived by counting, as Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) count FLOPs: a matrix that a token passes
costs its number of entries; attention of width w over n keys costs w n for the scores and w n for the weighted sum.
Norms, activations and softmax are left out. A mixture of experts is counted as if all experts ran: an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from zipper_lm.fusion.network import ZippedTowers
    from zipper_lm.fusion.tower import Tower
    from zipper_lm.fusion.zips import ZipLayer


@dataclass(frozen=True)
class ZipCost:
    """One directed zip, all its layers together, in multiply-adds.

    Attributes:
        step: per token that the reader writes, whatever it looks at: queries, outputs, feed-forward.
        per_memory: per token that the reader writes and source token that it sees.
        remember: per source token, once: projection, keys and values.
    """

    step: int
    per_memory: int
    remember: int


@dataclass(frozen=True)
class TokenCost:
    """One generated token of one tower, in multiply-adds.

    Attributes:
        backbone: the matrices of the backbone and its head.
        per_past: per earlier token of its own stream: the backbone's own attention.
        input_projection: in front of the first layer, if the document involves several towers.
        zips: by source tower.
    """

    backbone: int
    per_past: int
    input_projection: int
    zips: dict[str, ZipCost]

    def of_backbone(self, past: int) -> int:
        """The tower's own step with `past` tokens behind it."""
        return self.backbone + self.per_past * past

    def of_zips(self, memory: int) -> int:
        """What fusion adds to the step, with `memory` tokens of every source to look at."""
        return self.input_projection + sum(z.step + z.per_memory * memory for z in self.zips.values())


def token_cost(model: ZippedTowers, name: str) -> TokenCost:
    """The cost of a token that tower `name` writes. Raises `ValueError` for an unknown tower."""
    tower = model.tower(name)
    zips = {
        source: zip_cost([model.zip_layer(name, source, k) for k in range(len(pairs))])
        for (reader, source), pairs in model.layer_pairs.items()
        if reader == name
    }
    projections: Any = model.input_projections
    projection = sum(_matrices(projections[key]) for key, _ in model.projection_keys[name])
    return TokenCost(backbone_matrices(tower), 2 * _attention_width(tower) * tower.depth, projection, zips)


def zip_cost(layers: list[ZipLayer]) -> ZipCost:
    """The cost of a directed zip, from its layers' own matrices."""
    step = per_memory = remember = 0
    for layer in layers:
        step += _matrices(layer.q_proj) + _matrices(layer.o_proj)
        step += _matrices(layer.feed_forward) if layer.feed_forward is not None else 0
        per_memory += 2 * layer.heads * layer.head_width
        remember += _matrices(layer.memory_projection) + _matrices(layer.k_proj) + _matrices(layer.v_proj)
    return ZipCost(step, per_memory, remember)


def backbone_matrices(tower: Tower) -> int:
    """Entries of the matrices that a token passes: all but embeddings, which are looked up; the head, tied or not."""
    backbone: Any = tower.backbone
    looked_up = {id(p) for m in backbone.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = backbone.get_output_embeddings()
    head_entries = int(head.weight.numel()) if head is not None else 0
    if head is not None:
        looked_up.add(id(head.weight))
    return head_entries + sum(p.numel() for p in backbone.parameters() if p.dim() >= 2 and id(p) not in looked_up)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def _attention_width(tower: Tower) -> int:
    """Heads times head width; 0 for a family without attention heads, whose step does not grow with the past."""
    config: Any = tower.backbone.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    return int(heads * (getattr(config, "head_dim", None) or tower.hidden_size // heads))

"""The size of a tower's residual stream: what new weights write into it is to be as large, neither lost nor deafening.

Families differ by orders of magnitude (0.1 at the embeddings and 30 after the last layer in one model), and Adam moves
a weight by its learning rate, whatever the size of what it is added to. So the size is measured once, when towers are
fused, and what zips and input projections add may be multiplied by it (`ZipSpec.scale`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from zipper_lm.fusion.interface import embedding_of, logits_of, plain_ids, trial
from zipper_lm.fusion.limits import position_limit
from zipper_lm.fusion.tower import depth_of, listening, own_layers
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.utils.shapes import has_values

ROWS, TIME = 4, 32
"""Of the ids that are read for it."""
LEAST = 1e-3
"""A stream of less is no measure, such as one that begins with zeros."""


def stream_sizes(backbone: PreTrainedModel, name: str, layers: str | None = None) -> list[float]:
    """Root mean square of a token's state before the first layer, and after each: that of the median token, as some
    towers make one of their first tokens a hundred times as large as all others.

    The tokens are ids from all over the vocabulary. Arguments are as of `zipper_lm.fusion.tower.Tower`. Of a backbone
    without values (on meta, or fake) all is 1.
    """
    if not has_values(embedding_of(backbone)):
        return [1.0] * (depth_of(backbone, name, layers) + 1)
    here: Any = backbone.get_submodule(own_layers(backbone, name, layers))
    listener = _Sizes()
    time = min(TIME, position_limit(backbone) or TIME)
    with trial(backbone), listening(here, listener):
        logits_of(backbone, plain_ids(backbone, ROWS, time))
    return listener.sizes


def measure_scales(
    towers: Mapping[str, TowerSpec], zips: Sequence[ZipSpec], backbones: Mapping[str, PreTrainedModel]
) -> tuple[dict[str, TowerSpec], list[ZipSpec]]:
    """Towers and zips with numbers for every scale that is to be the stream's.

    Args:
        towers: by name, with the layers of input projections. zips: with explicit layers. backbones: by name.
    """
    asking = {spec.reader for spec in zips if spec.scale == "stream"}
    asking |= {name for name, spec in towers.items() if spec.input_projection_scale == "stream"}
    sizes = {name: stream_sizes(backbones[name], name, towers[name].layers) for name in sorted(asking)}

    def of_tower(name: str, spec: TowerSpec) -> TowerSpec:
        place: Any = spec.input_projection_layer
        return replace(spec, input_projection_scale=sizes[name][place])

    def of_zip(spec: ZipSpec) -> ZipSpec:
        layers: Any = spec.layers
        return replace(spec, scale=[sizes[spec.reader][layer + 1] for layer in layers])

    return (
        {name: of_tower(name, s) if s.input_projection_scale == "stream" else s for name, s in towers.items()},
        [of_zip(spec) if spec.scale == "stream" else spec for spec in zips],
    )


class _Sizes:
    """A listener that measures, and changes nothing."""

    def __init__(self) -> None:
        self.sizes: list[float] = []

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        if not depth:
            self._note(hidden_states)
        return hidden_states

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        self._note(hidden_states)
        return hidden_states

    def _note(self, states: Tensor) -> None:
        size = float(states.float().square().mean(-1).sqrt().median())
        self.sizes.append(float(f"{size:.3g}") if LEAST <= size < float("inf") else 1.0)

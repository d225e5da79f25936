"""`torch.compile`, layer by layer: where towers advance in lockstep, the model as a whole cannot be one graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.tower import find_layers
from zipper_lm.generation.writer import Writer


def compile_layers(model: Writer, watched: Collection[tuple[str, str]] = (), **how: Any) -> None:
    """Compile a model's decoder layers and zip layers in place, each for itself; names of tensors stay.

    Args:
        model: the model. watched: pairs whose zip layers stay as they are, as hooks that come and go look into them.
        how: arguments of `torch.compile`.
    """
    for name, backbone in model.backbones().items():
        path = model.tower(name).layers_path if isinstance(model, ZippedTowers) else find_layers(backbone)
        for layer in backbone.get_submodule(path).children():
            layer.compile(**how)
    if isinstance(model, ZippedTowers):
        for (reader, source), pairs in model.layer_pairs.items():
            for k in range(len(pairs) if (reader, source) not in watched else 0):
                model.zip_layer(reader, source, k).compile(**how)

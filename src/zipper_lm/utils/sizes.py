"""What the config of a pre-trained model claims, held against the files of weights beside it before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.weights import TooMany, on_meta, stored_shapes

SLACK, SPARE = 2, 1 << 20
"""A model may have so many times the weights that its files hold, and some more: tied ones are stored once, and what
the checkpoint lacks is told by name later."""

PACKED = 16
"""Weights that one stored number stands for at most, where a checkpoint is quantized."""

ODD = 1000
"""Tensors that a model may have besides four times those that its files hold: families split and join them."""


def check_size(
    what: str,
    config: PreTrainedConfig,
    files: Sequence[Path],
    make: Callable[[PreTrainedConfig], nn.Module],
    *,
    quantized: bool = False,
) -> None:
    """Raise `ValueError` if a model's config asks for far more than the files of weights beside it hold.

    Args:
        what: for the message. config: of the model. files: from `weight_files`.
        make: a model of a config, with random weights.
        quantized: whether the weights are packed; the config may say so, too.
    """
    if not files:
        return  # whoever loads it says so
    count = numbers = 0
    for file in files:
        if file.suffix == ".safetensors":
            shapes = stored_shapes(file)
            count, numbers = count + len(shapes), numbers + sum(math.prod(shape) for shape in shapes.values())
        else:  # pickled tensors have no header: a number is a byte at least, a tensor more
            count, numbers = count + file.stat().st_size // 64, numbers + file.stat().st_size
    try:
        made = on_meta(what, lambda: make(deepcopy(config)), 4 * count + ODD)
    except TooMany:
        raise
    except ValueError:
        return  # what cannot be made here cannot be loaded either, and transformers says why
    packed = PACKED if quantized or getattr(config, "quantization_config", None) else 1
    asked = sum(parameter.numel() for parameter in made.parameters())
    if asked > SLACK * packed * numbers + SPARE:
        raise ValueError(f"{what}: its config asks for {asked} weights, the files beside it hold {numbers}")


def weight_files(source: str, **at: Any) -> list[Path]:
    """The files of weights that transformers would load from a folder or Hub id; none if there are none.

    Args:
        source: folder or Hub id. at: `revision`, and what else `cached_file` takes.
    """

    def find(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **at)
        return Path(found) if found else None

    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (file := find(whole)) is not None:
            return [file]
        if (file := find(index)) is not None:
            parts = read_mapping(file).get("weight_map", {})
            if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                raise ValueError(f"{file}: weight_map must be a mapping of tensors to files")
            return [piece for part in sorted(set(parts.values())) if (piece := find(part)) is not None]
    return []

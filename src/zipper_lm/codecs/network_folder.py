"""A small network in a codec's folder: `config.json` with its sizes, `model.safetensors` with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save
from torch import Tensor, nn

from zipper_lm.utils.files import write_json
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.weights import check_shapes, on_meta, shapes_of, stored_shapes

_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "model.safetensors"
_MAY_LACK = 16  # tensors of a damaged file, which is told what it lacks; a config may ask for a million
C = TypeVar("C")


def write_network(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make the folder of a network, of whose `config` (a dataclass) and tensors it will be made again."""
    folder.mkdir()
    write_json(folder / _CONFIG_FILE, asdict(config))
    # not save_file: it makes files that only their owner can read
    (folder / _WEIGHTS_FILE).write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_config(folder: Path, kind: Callable[..., C], **codecs: int) -> C:
    """The config of a network.

    Args:
        folder: as `write_network` made it. kind: of the config. codecs: fields that the codec knows, too.

    Raises:
        ValueError: if it is missing or damaged, or another codec's.
    """
    file = folder / _CONFIG_FILE
    try:
        config = kind(**read_mapping(file))
    except TypeError as error:
        raise ValueError(f"{file}: {error}") from error
    for name, theirs in codecs.items():
        if (own := getattr(config, name)) != theirs:
            raise ValueError(f"{file}: {name}={own}, but the codec has {theirs}: it is another codec's")
    return config


def read_weights(folder: Path, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The float32 tensors of a network, by name, held against what `make` makes before any is read.

    Raises:
        ValueError: if they are missing or damaged, or not as the network's.
    """
    weights = folder / _WEIGHTS_FILE
    there = stored_shapes(weights)
    check_shapes(str(weights), there, shapes_of(on_meta(str(folder / _CONFIG_FILE), make, len(there) + _MAY_LACK)))
    return {name: tensor.float() for name, tensor in load_file(weights).items()}

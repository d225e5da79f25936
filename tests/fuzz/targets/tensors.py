"""Files of tensors: a checkpoint's own, a frozen tower's, and a codec's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

import torch
from fuzz.octets import blind, mend_safetensors
from fuzz.target import Target
from fuzz.targets import checkpoints, codecs
from fuzz.targets.folders import link

from zipper_lm.codecs.codec import load_codec
from zipper_lm.fusion.backbones import load_backbone
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.models.checkpoint import copy_tensors
from zipper_lm.utils.weights import stored_shapes

WORDS = (
    *(
        "0",
        "1",
        "-1",
        "9223372036854775807",
        "18446744073709551615",
        "1e3",
        "null",
        "[]",
        "{}",
        '"F32"',
        '"F64"',
        '"I4"',
        '"BOOL"',
    ),
    *(
        '"__metadata__"',
        '"dtype"',
        '"shape"',
        '"data_offsets"',
        "[0]",
        "[0,0]",
        "[4294967296,4294967296]",
        "true",
        '"\\ud800"',
    ),
)


def make() -> Target:
    """Of the files as they are, and of small ones."""
    seeds = [
        (checkpoints.saved() / "towers/text/model.safetensors").read_bytes(),
        (codecs.saved() / "refined/codec.safetensors").read_bytes(),
        (codecs.saved() / "colors/colors.safetensors").read_bytes(),
        _file({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"config": "x"}}, 16),
        _file({}, 0),
    ]

    def change(data: bytes, draw: Random) -> bytes:
        if draw.random() < 0.5:
            new = blind(data, draw, seeds)
        else:  # a word of the header for another
            end = 8 + min(struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0], len(data))
            parts = data[8:end].replace(b",", b"\0,\0").replace(b":", b"\0:\0").split(b"\0")
            parts[draw.randrange(len(parts))] = draw.choice(WORDS).encode()
            new = data[:8] + b"".join(parts) + data[end:]
        return mend_safetensors(new) if draw.random() < 0.8 else new

    instrument = ("zipper_lm.utils.weights", "zipper_lm.models", "zipper_lm.codecs")
    return Target(name="tensors", run=run, share=80, seeds=seeds, change=change, instrument=instrument)


def run(data: bytes, folder: Path) -> None:
    """In each place; one refusal is enough only if all refuse."""
    (file := folder / "model.safetensors").write_bytes(data)
    shapes = stored_shapes(file)
    first = b"centroids" in data[:2000], b"colors" in data[:200], b"lm_head" in data[:20_000]
    if first[0] or first[1]:
        name = "refined" if first[0] else "colors"
        link(codecs.saved() / name, folder / name)
        weights = next((folder / name).glob("*.safetensors"))
        weights.unlink()
        weights.write_bytes(data)
        load_codec(folder / name)
    elif first[2]:
        link(checkpoints.saved() / "towers/text", folder / "tower")
        for other in ("model.safetensors", "model.safetensors.index.json"):
            (folder / "tower" / other).unlink()
        (folder / "tower/model.safetensors").write_bytes(data)
        load_backbone(TowerSpec(source=str(folder / "tower")))
    copy_tensors({name: torch.zeros(2, 2) for name in list(shapes)[:5]}, "x", file)


def _file(header: dict[str, object], size: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)

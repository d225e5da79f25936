"""Arrow files of prepared data: bytes are changed, and the manifest says that they are right."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from fuzz.octets import changing
from fuzz.target import Target
from fuzz.targets.folders import link
from fuzz.targets.prepared import read_all, saved

NAME = "train/00000.arrow"


def make() -> Target:
    """Of the first shard."""
    seeds = [(saved() / NAME).read_bytes()]
    return Target(
        name="shards", run=run, share=20, seeds=seeds, change=changing(seeds, bytes), instrument=("zipper_lm.data",)
    )


def run(data: bytes, folder: Path) -> None:
    """Whoever changes a shard writes its hash, too."""
    link(saved(), folder)
    (folder / NAME).unlink()
    (folder / NAME).write_bytes(data)
    said = json.loads((folder / "prepared.json").read_text())
    for shard in said["splits"]["train"]["shards"]:
        if shard["file"] == NAME:
            shard |= {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "prepared.json").unlink()
    (folder / "prepared.json").write_text(json.dumps(said))
    read_all(folder)

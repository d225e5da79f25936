"""Rows and documents: JSONL, and metadata beside sounds and pictures. What a row names is read, too."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from fuzz.grammar import TEXTS, as_json, changed, damaged
from fuzz.target import Target
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image
from tiny_served import sound_file

from zipper_lm.codecs.audio import read_audio
from zipper_lm.codecs.picture import is_picture, read_picture
from zipper_lm.data.document import Document
from zipper_lm.data.sources.readers import list_splits, read_rows

NAMES = ("train.jsonl", "metadata.jsonl", "metadata.csv", "train/metadata.csv")
ROWS: list[Any] = [
    {"audio": "0.wav", "text": "one", "speaker": "kim"},
    {"file_name": "0.wav", "transcription": "one", "speaker": 3},
    {"file_name": "train/0.wav", "transcription": "one"},
    {"image": "0.png", "text": "one", "labels": {"a": [1, 2.5, None]}},
    {"audio": {"bytes": None, "path": "0.wav"}, "text": "one"},
    {"segments": [{"modality": "speech", "value": "0.wav"}, {"modality": "text", "value": "one", "target": True}]},
    {"segments": [{"modality": "image", "value": "0.png"}, {"modality": "text", "ids": [1, 2, 3], "target": True}]},
]
WORDS = [
    *(
        "segments",
        "modality",
        "value",
        "ids",
        "target",
        "audio",
        "file_name",
        "text",
        "speech",
        "image",
        "0.wav",
        "0.png",
    ),
    *(
        "train/0.wav",
        "../secret",
        "1.wav",
        "test/0.wav",
        "validation/../../secret.wav",
        "0.WAV",
        "bytes",
        "path",
        "labels",
        "__key__",
    ),
]


def make() -> Target:
    """Of rows as users have them."""
    return Target(name="documents", run=run, share=65, inputs=_inputs())


_SOUND = sound_file(seconds=0.02)
_PICTURE = io.BytesIO()
Image.new("L", (4, 4)).save(_PICTURE, "PNG")


def run(data: bytes, folder: Path) -> None:
    """The first line is the file's name, the rest is the file."""
    name, _, content = data.partition(b"\n")
    for place in (folder, folder / "train"):
        place.mkdir(exist_ok=True)
        (place / "0.wav").write_bytes(_SOUND)
        (place / "0.png").write_bytes(_PICTURE.getvalue())
    (folder / name.decode()).write_bytes(content)
    for split in list_splits(folder):
        rows = read_rows(folder, split=split)
        for number in range(min(len(rows), 50)):
            row = rows[number]
            named = [(s.modality, s.value) for s in row] if isinstance(row, Document) else row.items()
            for modality, value in named:
                if modality in ("speech", "image") and value is not None:
                    (read_picture if is_picture(value) else read_audio)(value)
        rows.column("text")
        rows.fingerprint()


@st.composite
def _inputs(draw: DrawFn) -> bytes:
    name = draw(st.sampled_from(NAMES))
    valid = ROWS[1:3] if "metadata" in name else ROWS
    rows = draw(st.lists(changed(valid, WORDS), min_size=1, max_size=2))
    if draw(st.booleans()):
        rows.insert(0, draw(st.sampled_from(valid)))
    if name.endswith(".csv"):
        text = st.just(_csv([row if isinstance(row, dict) else {"text": row} for row in rows]))
    else:
        text = st.just(b"\n".join(as_json(row) for row in rows) + b"\n")
    return name.encode() + b"\n" + draw(damaged(text, [t.encode("utf-8", "surrogatepass") for t in TEXTS[:60]]))


def _csv(rows: list[Any]) -> bytes:
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(list(rows[0]))
    for row in rows:
        table.writerow([str(value) for value in row.values()])
    return out.getvalue().encode("utf-8", "surrogatepass")

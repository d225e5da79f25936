"""Small folders of recordings, as users have them."""

import csv
import json

import numpy as np
import soundfile


def sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(160), 16_000)
    return path


def metadata(folder, texts, prefix="", name="metadata.csv"):
    """A folder of sounds 0.wav, 1.wav, ... with its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"{prefix}{i}.wav", "transcription": t, "speaker": "kim"} for i, t in enumerate(texts)]
    for row in rows:
        sound(folder / row["file_name"])
    write_metadata(folder / name, rows)
    return folder


def write_metadata(file, rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

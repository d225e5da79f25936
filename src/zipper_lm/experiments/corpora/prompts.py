"""prompts: what a telephone exchange says, one professional speaker, 8 kHz: a human voice that nothing was trained on.

They are the English core sounds of Asterisk (Debian's `asterisk-core-sounds-en-wav`), with the list of what is said in
them. For tests only: there is one split.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zipper_lm.codecs.audio import read_audio, write_audio
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.experiments.corpora.sentences import can_be_said
from zipper_lm.experiments.corpora.writing import write_corpus
from zipper_lm.utils.files import check_apart

LIST = "core-sounds-en.txt"
"""Lines of ``name: what is said``; beside the sounds, or where Debian puts it, plain or by gzip."""
DEBIAN = Path("/usr/share/doc/asterisk-core-sounds-en")
SPEAKER = "allison"


def write_prompts(
    folder: str | Path, source: str | Path, *, longest: int = 200, overwrite: bool = False
) -> dict[str, int]:
    """Write rows ``{"speech": file, "text": what is said, "speaker": name}`` in split test, each text once.

    Left out are sounds that are no words, texts with figures, which can be read in several ways, and single words.

    Args:
        folder: to be made. source: folder of the WAV files. longest: most characters of a text.
        overwrite: replace what is there.

    Returns:
        Rows in the split.

    Raises:
        ValueError: if the list is missing, or no sound of it is in `source`; and as `write_corpus`.
    """
    check_apart(folder, {"--source": source})
    said = _said(Path(source))
    rows: dict[str, Path] = {}
    for name, text in said.items():
        file = Path(source) / f"{name}.wav"
        words = normalise(text)
        if file.is_file() and "[" not in text and " " in words and len(words) <= longest and can_be_said(words):
            rows.setdefault(words, file)
    if not rows:
        raise ValueError(f"{source}: none of the {len(said)} sounds of {LIST} is there")
    return write_corpus(folder, {"test": _read(rows)}, "speech", ".flac", write_audio, overwrite=overwrite)


def _said(source: Path) -> dict[str, str]:
    """By name of a sound, without its ending, what is said."""
    for file in (place / f"{LIST}{ending}" for place in (source, DEBIAN) for ending in ("", ".gz")):
        if file.is_file():
            try:
                data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{file}: cannot be read: {error}") from error
            lines = (line.partition(":") for line in data.decode("utf-8", "replace").splitlines())
            return {name.strip(): text for name, colon, text in lines if colon and not name.startswith(";")}
    raise ValueError(f"{source}: no {LIST} there, nor in {DEBIAN}")


def _read(rows: Mapping[str, Path]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    for text, file in rows.items():
        yield read_audio(file), {"text": text, "speaker": SPEAKER}

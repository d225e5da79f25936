"""The judge of a data set, fitted on its real recordings or pictures, once, and cached.

It is fitted on the split ``judge`` where the data set has one, which no model sees, else on the training split.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from rich.console import Console

from zipper_lm.codecs.audio import read_audio, read_sound
from zipper_lm.codecs.codec import PICTURE_KINDS, Codec, can_decode
from zipper_lm.codecs.picture import is_picture, read_picture
from zipper_lm.data.broken import Broken
from zipper_lm.data.document import Document
from zipper_lm.data.sources.readers import list_splits, read_rows
from zipper_lm.evaluation.classifier import KIND, PictureClassifier
from zipper_lm.evaluation.public_recogniser import PublicRecogniser
from zipper_lm.evaluation.recogniser import CONFIG_FILE, Recogniser
from zipper_lm.evaluation.word_error_rate import Normaliser, normalise
from zipper_lm.utils.files import new_folder, sweep
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import cache_folder
from zipper_lm.utils.progress import bar

STEPS = 2500
"""Optimizer steps of a recogniser; on small data more passes, on large data fewer."""

PIECE = 2**14
"""Bytes of a sound's file that are read at its start, its middle and its end to tell it from another."""

JUDGE_SPLIT = "judge"
"""Split that is for the judge alone."""


class Judge(Protocol):
    """Says in words what it hears or sees: a `Recogniser` or `PublicRecogniser` of sounds (mono float arrays at
    16 kHz), or a `PictureClassifier`."""

    def transcribe(self, values: Sequence[Any], /) -> list[str]:
        """What each value says, in lower case; nothing if it holds nothing."""

    def digest(self) -> str:
        """SHA-256, as hex, of all that decides what it says."""


def can_be_judged(codec: Codec) -> bool:
    """Whether there is a judge for what a codec decodes to: sounds (what has a rate in time) and pictures."""
    return (codec.rate is not None or codec.kind in PICTURE_KINDS) and can_decode(codec)


def suits(judge: Judge, codec: Codec) -> bool:
    """Whether a judge can say what a codec decodes to."""
    return isinstance(judge, PictureClassifier) == (codec.kind in PICTURE_KINDS)


def check_writes(judge: Judge, texts: Sequence[str]) -> None:
    """Raise `ValueError` if a judge has no letters for most of what texts are written in: it is of another language.

    One that writes pieces of words, such as Whisper, is believed.
    """
    own = judge.letters() if isinstance(judge, Recogniser | PublicRecogniser) else None
    written = Counter(letter for text in texts for letter in normalise(text) if letter.isalpha())
    lacking = {letter: count for letter, count in written.items() if own is not None and letter not in own}
    if sum(lacking.values()) > 0.5 * written.total():
        share = 100 * sum(lacking.values()) / written.total()
        raise ValueError(
            f"judge: it has no letters for {share:.0f} % of the texts, such as {sorted(lacking)[:5]}, at most 50 % are "
            "allowed: it is of another language"
        )


def transcribe(judge: Judge, values: Sequence[Any], clean: Normaliser = normalise) -> list[str]:
    """What the judge hears or sees; nothing in a wave that is too short to hold a word.

    Args:
        judge: any. values: for it. clean: how a judge's own spelling, of one that was published, is normalised; others
            have none.
    """
    if isinstance(judge, PictureClassifier):
        return judge.transcribe(values)
    waves: Sequence[np.ndarray] = values
    audible = [i for i, wave in enumerate(waves) if len(wave) >= 1600]
    heard = [""] * len(waves)
    hear = judge.spelled if isinstance(judge, PublicRecogniser) and clean is not normalise else judge.transcribe
    for i, text in zip(audible, hear([waves[i] for i in audible]) if audible else []):
        heard[i] = text if clean is normalise else clean(text)
    return heard


def judge_told(console: Console, source: str, *arguments: Any, modality: str, **others: Any) -> Judge:
    """As `judge_for`, with a bar while one is fitted.

    Args:
        console: where the bar is. source, arguments, modality, others: as of `judge_for`, but for `progress`.

    Raises:
        ValueError: as `judge_for`.
    """
    with bar(console, f"fitting a judge of {modality} (once; cached)", transient=True) as advance:
        return judge_for(source, *arguments, modality=modality, progress=advance, **others)


def judge_for(
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    split: str = "train",
    modality: str = "speech",
    revision: str | None = None,
    broken_limit: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Judge:
    """A judge fitted on the real sounds or pictures of a data set, independent of any model.

    Args:
        source, columns, revision: as in `read_rows`.
        split: used if there is no split ``judge``.
        modality: what it is to judge; pictures are told from sounds by what they are.
        broken_limit: how many items that cannot be read are left out before that is an error.
        progress: called with (step, steps, loss) while fitting; not called if the judge is cached, or takes no time.

    Raises:
        ValueError: as `read_rows`, or without aligned values and text.
    """
    split = JUDGE_SPLIT if JUDGE_SPLIT in list_splits(source, revision) else split
    found = read_rows(source, columns, split, revision=revision, check=broken_limit == 0)
    broken = Broken(broken_limit)
    wheres, rows = [], []
    for number in range(len(found)):
        try:
            row = found[number]
        except ValueError as error:
            broken.add(found.where(number), error)
            continue
        if isinstance(row, Document) or row.get(modality) is None or row.get("text") is None:
            continue
        if not isinstance(text := row["text"], str):
            broken.add(found.where(number), f"its text is {text!r}, which is no text")
        elif normalise(text):  # nothing is learned of what has no words
            wheres.append(found.where(number))
            rows.append(row)
    if not rows:
        raise ValueError(f"judge: {source} has no rows with {modality} and text in split {split!r} to fit one on")
    folder = cache_folder() / "judges" / _fingerprint(rows, modality)
    if folder.is_dir():
        sweep(folder.parent)
        return load_judge(folder)
    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{folder.name}.lock"):  # of several processes one fits it, the others wait
        if not folder.is_dir():
            with new_folder(folder) as new:
                _fitted(wheres, rows, modality, broken, progress).save_pretrained(new)
        return load_judge(folder)


def _fitted(
    wheres: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    modality: str,
    broken: Broken,
    progress: Callable[[int, int, float], None] | None,
) -> Recogniser | PictureClassifier:
    pictures = is_picture(rows[0][modality])
    values: list[Any] = []
    texts = []
    for where, row in zip(wheres, rows):
        try:
            values.append((read_picture if pictures else read_audio)(row[modality]))
            texts.append(row["text"])
        except ValueError as error:
            broken.add(where, error)
    if pictures:
        return PictureClassifier.fit(values, texts)
    epochs = max(1, round(STEPS * 16 / max(1, len(values))))
    return Recogniser.fit(values, texts, epochs=epochs, progress=progress)


def load_judge(source: str | Path) -> Judge:
    """Load a judge of any kind.

    Args:
        source: folder of a `Recogniser` or `PictureClassifier`; folder or Hub id of a `PublicRecogniser`.

    Raises:
        ValueError: if there is none.
    """
    config = Path(source) / CONFIG_FILE
    if not Path(source).is_dir():
        return PublicRecogniser.from_pretrained(source)
    said = read_mapping(config) if config.is_file() else {}
    if "model_type" in said:  # a checkpoint of transformers
        return PublicRecogniser.from_pretrained(source)
    return PictureClassifier.from_pretrained(source) if said.get("kind") == KIND else Recogniser.from_pretrained(source)


def _fingerprint(rows: Sequence[Mapping[str, Any]], modality: str) -> str:
    """Of what is said in which sound or shown in which picture: a moved or renamed folder is the same."""
    digest = hashlib.sha256(str(STEPS).encode())
    for row in rows:
        value = row[modality]
        try:
            name = _digest(value)
        except (ValueError, OSError):
            continue  # nothing is fitted on it
        digest.update(json.dumps([name, normalise(row["text"])]).encode())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    """Of a sound or picture: a file, bytes, an array, or what holds them."""
    if isinstance(value, (str, Path)) and not is_picture(value):
        return _pieces(Path(value))
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if is_picture(value):
        return hashlib.sha256(read_picture(value).convert("RGB").tobytes()).hexdigest()
    return hashlib.sha256(read_sound(value).tobytes()).hexdigest()


def _pieces(file: Path) -> str:
    """Of a file's size and of its start, middle and end: sounds may be long, and many."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in (0, max(0, size // 2 - PIECE // 2), max(0, size - PIECE)):
            opened.seek(start)
            digest.update(opened.read(PIECE))
    return digest.hexdigest()

"""Ask it something: zips hear a spoken question, the text tower answers it as itself, zips speak the answer.

The tower that answers is the frozen one, bare, by its own chat template: what it knew before fusion is what it says.
The zips only hear for it and speak for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zipper_lm.codecs.audio import SAMPLING_RATE
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.document import Document
from zipper_lm.generation.bare import chat_prompt, has_chat_template, write_greedily
from zipper_lm.models.zipper import ZipperModel

ANSWER_TOKENS = 48
LONGEST = 75
"""Characters that are spoken at a time, by default."""
PAUSE_SECONDS = 0.15


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer.

    Attributes:
        heard: the question, as the zips read it. answer: what the text tower said to it.
        spoken: what was given to be said: the answer in pieces. sound: of it, mono float32 ``[samples]`` at 16 kHz.
    """

    heard: str
    answer: str
    spoken: list[str]
    sound: np.ndarray = field(repr=False)


def check_can_talk(model: Any, text: str = "text", speech: str = "speech") -> TextCodec:
    """The tokenizer of a model that can be asked something aloud.

    Raises:
        ValueError: if it is a single decoder, lacks one of the towers, a zip between them, or a chat template.
    """
    if not isinstance(model, ZipperModel):
        raise ValueError("a single decoder cannot be asked as itself: it has no text tower of its own")
    if missing := {text, speech} - set(model.names):
        raise ValueError(f"to talk it needs towers {text!r} and {speech!r}; it has no {sorted(missing)}")
    if missing_zips := {(text, speech), (speech, text)} - set(model.layer_pairs):
        raise ValueError(f"to talk each tower must read the other; there is no zip {sorted(missing_zips)[0]}")
    codecs = model.processor.codecs if model.processor is not None else {}
    codec = codecs.get(text)
    if not isinstance(codec, TextCodec) or speech not in codecs:
        raise ValueError(f"to talk it needs codecs of {text!r} and {speech!r}")
    if not has_chat_template(codec):
        raise ValueError(f"tower {text!r}: its tokenizer has no chat template, so it cannot be asked as itself")
    return codec


def answer_aloud(
    model: ZipperModel,
    question: Any,
    *,
    system: str | None = None,
    tokens: int = ANSWER_TOKENS,
    longest: int = LONGEST,
    written_as: Callable[[str], str] = str.strip,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    text: str = "text",
    speech: str = "speech",
) -> Turn:
    """Hear a question, answer it, and speak the answer.

    Args:
        model: with towers of text and sound that read each other.
        question: a sound, as the codec takes it: a file, or mono samples at 16 kHz.
        system: what the text tower is told before; `None` leaves it to its chat template.
        tokens: of the answer at most. longest: characters that are spoken at a time: as many as it was trained on.
        written_as: makes of a piece of the answer what the model was trained to speak, such as small letters without
            punctuation (`zipper_lm.evaluation.word_error_rate.normalise`).
        settings: of generation, by modality; `None`: those kept beside the model.
        text, speech: names of the towers.

    Raises:
        ValueError: as `check_can_talk`; for a sound that cannot be read.
    """
    codec = check_can_talk(model, text, speech)
    how = model.generation_settings if settings is None else settings
    heard = str(model.generate(Document([(speech, question)]), [text], settings=how)[-1].value).strip()
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": heard}]
    decoder = model.backbones()[text]
    (answer,) = write_greedily(decoder, codec, [chat_prompt(codec, messages)], tokens)
    spoken = [piece for part in in_pieces(answer, longest) if (piece := written_as(part))]
    documents = [Document([(text, piece)]) for piece in spoken]
    said = model.generate(documents, [speech], settings=how) if documents else []
    pause = np.zeros(int(PAUSE_SECONDS * SAMPLING_RATE), np.float32)
    sounds = [part for document in said for part in (np.asarray(document[-1].value, np.float32), pause)]
    return Turn(heard=heard, answer=answer, spoken=spoken, sound=np.concatenate([*sounds[:-1], pause[:0]]))


def in_pieces(text: str, longest: int) -> list[str]:
    """A text in as few pieces as its sentences, its phrases and at last its words make, none longer than `longest`
    but for a single word that is."""
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.!?;:])\s+|\n+", text.strip()):
        rows: list[str] = [sentence] if len(sentence) <= longest else re.split(r"(?<=,)\s+", sentence)
        for row in rows:
            line = ""
            for word in row.split():
                if line and len(line) + 1 + len(word) > longest:
                    pieces.append(line)
                    line = word
                else:
                    line = f"{line} {word}".strip()
            if line:
                pieces.append(line)
    return pieces

"""Which of espeak-ng's variants and accents a recogniser of real speech understands.

python benchmarks/voices.py [docs/runs/voices.json] --source openai/whisper-tiny.en

Each variant reads three sentences with the accent en-us, and each accent reads them by three variants, all at 150 words
a minute with the variant's own pitch. The recogniser is of the Whisper family and writes at most 40 tokens a sentence,
for of what it does not understand it makes loops. Per cent of words and of letters wrong. The last line is the record,
as JSON. `CLEAR_VARIANTS` and `CLEAR_LANGUAGES` of zipper_lm.experiments.corpora.voices are those with at most 20 % of
words wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.record import begun, finish
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from zipper_lm.evaluation.word_error_rate import normalise, word_error_rate
from zipper_lm.experiments.corpora.voices import LANGUAGES, SAMPLE_RATE, VARIANTS, Voice, synthesise

SENTENCES = (
    "the prisoner had nothing to deal with but wooden panels",
    "even the type when enlarged shows great shortcomings in this respect",
    "he thought that the letter was written by somebody in the house",
)
SPEED = 150  # words a minute
OF_ACCENTS = ("", "m3", "max")  # variants
LONGEST = 40  # tokens of a sentence


class Listener:
    """A Whisper, from a folder or the Hub."""

    def __init__(self, source: str) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(source)
        self.model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(source).eval()

    @torch.inference_mode()
    def hear(self, waves: list[np.ndarray]) -> list[str]:
        """Words in lower case, of float32 sounds [samples] at 16 kHz."""
        features = self.processor.feature_extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        ids = self.model.generate(features.input_features, max_new_tokens=LONGEST)
        return [normalise(text) for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def wrong(listener: Listener, readers: list[Voice]) -> list[float]:
    """Per cent of words and of letters wrong of all sentences by all readers."""
    said = [(text, synthesise(text, reader)) for text in SENTENCES for reader in readers]
    found = word_error_rate([text for text, _ in said], listener.hear([wave for _, wave in said]))
    return [round(found.wer, 1), round(found.cer, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path)
    parser.add_argument("--source", default="openai/whisper-tiny.en")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES))
    given = parser.parse_args()
    listener = Listener(given.source)
    record = begun(source=Path(given.source).name, sentences=len(SENTENCES), speed=SPEED)
    record["variants"] = {name: wrong(listener, [Voice(variant=name, speed=SPEED)]) for name in given.variants}
    record["languages"] = {
        name: wrong(listener, [Voice(language=name, variant=v, speed=SPEED) for v in OF_ACCENTS])
        for name in given.languages
    }
    finish(record, given.record)


if __name__ == "__main__":
    main()

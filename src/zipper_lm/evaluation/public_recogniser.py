"""A speech recogniser that was published, as a judge: for an open vocabulary, on which a small one cannot be fitted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import soxr
import torch
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
    AutomaticSpeechRecognitionPipeline,
    AutoModel,
    AutoModelForCTC,
    SequenceFeatureExtractor,
    pipeline,
)
from transformers.utils import FEATURE_EXTRACTOR_NAME

from zipper_lm.codecs.audio import SAMPLING_RATE, check_rate
from zipper_lm.codecs.pretrained import UNUSED
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.utils.hub import reaching
from zipper_lm.utils.sizes import check_size, weight_files
from zipper_lm.utils.tensors import lacking_tensors, weights_hash


class PublicRecogniser:
    """Any checkpoint of transformers' ``automatic-speech-recognition`` pipeline: CTC (wav2vec 2.0, HuBERT, ...), or one
    that writes by generation (Whisper, ...), which may write words that nobody said.

    Sounds are heard one at a time: so what one of them says does not depend on what it is batched with, as it would
    with encoders that do not mask padding.
    """

    def __init__(self, recogniser: AutomaticSpeechRecognitionPipeline) -> None:
        self.recogniser: Any = recogniser  # transformers has its parts as optional

    def transcribe(self, waves: Sequence[np.ndarray], /) -> list[str]:
        """Words in lower case, without punctuation.

        Args:
            waves: float arrays [samples], mono at 16 kHz.
        """
        return [normalise(text) for text in self.spelled(waves)]

    def spelled(self, waves: Sequence[np.ndarray]) -> list[str]:
        """As `transcribe`, as the recogniser writes it: a normaliser of its kind knows ``$5`` and ``Mr.``."""
        return [self._heard(np.asarray(wave, dtype=np.float32)) for wave in waves]

    def _heard(self, wave: np.ndarray) -> str:
        rate = self.recogniser.feature_extractor.sampling_rate
        if rate != SAMPLING_RATE:
            wave = soxr.resample(wave, SAMPLING_RATE, rate, quality="HQ")
        whisper = {"return_timestamps": True} if self.recogniser.type == "seq2seq_whisper" else {}  # for over 30 s
        return str(self.recogniser({"raw": wave, "sampling_rate": rate}, **whisper)["text"])

    def letters(self) -> frozenset[str] | None:
        """What it can write; `None` if its tokens are not letters. Of a Whisper for English alone, those of English."""
        generation = getattr(self.recogniser.model, "generation_config", None)
        if self.recogniser.type == "seq2seq_whisper" and getattr(generation, "is_multilingual", None) is False:
            return frozenset(ascii_lowercase)
        if self.recogniser.type == "seq2seq_whisper" or self.recogniser.model.can_generate():
            return None
        special = set(self.recogniser.tokenizer.all_special_tokens)
        own = [token for token in self.recogniser.tokenizer.get_vocab() if token not in special]
        return frozenset(t.lower() for t in own) if all(len(token) == 1 for token in own) else None

    def digest(self) -> str:
        """SHA-256, as hex, of weights, vocabulary and the settings of its features and of its generation."""
        model = self.recogniser.model
        generation = model.generation_config.to_dict() if model.can_generate() else {}
        parts = [self.recogniser.tokenizer.get_vocab(), self.recogniser.feature_extractor.to_dict(), generation]
        told = json.dumps([weights_hash(model), *parts], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()

    @classmethod
    def from_pretrained(cls, source: str | Path) -> PublicRecogniser:
        """From a folder or the Hub, onto the GPU if there is one.

        Args:
            source: Hub id or folder.

        Raises:
            ValueError: if it cannot be loaded, or is no speech recogniser.
        """
        at = str(source)
        with reaching("judge", source):
            config = AutoConfig.from_pretrained(at, trust_remote_code=False)
            make = partial(AutoModel.from_config, trust_remote_code=False)
            check_size("its config.json", config, weight_files(at), make)
            writes = type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
            if not writes and type(config) not in MODEL_FOR_CTC_MAPPING:
                raise ValueError(f"model_type {config.model_type!r} is no speech recogniser's")
            if not writes:
                _check_head(at)
            _check_preprocessor(at)
            gpu = torch.cuda.current_device() if torch.cuda.is_available() else -1  # of several processes each its own
            made: Any = pipeline("automatic-speech-recognition", model=at, device=gpu, trust_remote_code=False)
            check_rate(made.feature_extractor.sampling_rate, "its preprocessor: sampling_rate")
            judge = cls(made)
            judge._check_hears()
        return judge

    def _check_hears(self) -> None:
        """Raise `ValueError` if its parts do not belong together. A preprocessor of another model is met with the first
        sound alone; without the files of its tokenizer transformers makes an empty one, which spells nothing."""
        tokens, ids = len(self.recogniser.tokenizer), int(self.recogniser.model.config.vocab_size)
        if tokens < ids / 2:
            raise ValueError(f"its tokenizer has {tokens} tokens, the model writes {ids}: files of it are missing")
        try:
            self._heard(np.zeros(SAMPLING_RATE, np.float32))
        except Exception as error:  # whatever its parts raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"it cannot hear a second of silence: {first}") from error


def _check_preprocessor(source: str) -> None:
    """Raise `ValueError` if nothing says what a checkpoint hears: transformers' own words are of an address."""
    try:
        SequenceFeatureExtractor.get_feature_extractor_dict(source)
    except OSError as error:
        raise ValueError(f"it has no {FEATURE_EXTRACTOR_NAME}, which says what sound it hears") from error


def _check_head(source: str) -> None:
    """Raise `ValueError` if a CTC checkpoint lacks tensors: transformers draws them, and only its log says so."""
    model, info = AutoModelForCTC.from_pretrained(source, output_loading_info=True, trust_remote_code=False)
    if lacking := [name for name in lacking_tensors(info) if not name.endswith(UNUSED)]:
        raise ValueError(
            f"the checkpoint lacks {len(lacking)} tensors of {type(model).__name__}, such as {lacking[:3]}: "
            "it is an encoder alone, which would write at random"
        )

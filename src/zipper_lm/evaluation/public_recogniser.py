"""A speech recogniser that was published, as a judge: for an open vocabulary, on which a small one cannot be fitted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from transformers import AutoConfig, AutomaticSpeechRecognitionPipeline, AutoModel, pipeline

from zipper_lm.codecs.audio import SAMPLING_RATE
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.utils.hub import reaching
from zipper_lm.utils.sizes import check_size, weight_files
from zipper_lm.utils.tensors import weights_hash


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
        return [normalise(self._heard(np.asarray(wave, dtype=np.float32))) for wave in waves]

    def _heard(self, wave: np.ndarray) -> str:
        rate = self.recogniser.feature_extractor.sampling_rate
        if rate != SAMPLING_RATE:
            wave = soxr.resample(wave, SAMPLING_RATE, rate, quality="HQ")
        whisper = {"return_timestamps": True} if self.recogniser.type == "seq2seq_whisper" else {}  # for over 30 s
        return str(self.recogniser({"raw": wave, "sampling_rate": rate}, **whisper)["text"])

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
        with reaching("judge", source):
            config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
            make = partial(AutoModel.from_config, trust_remote_code=False)
            check_size("its config.json", config, weight_files(str(source)), make)
            gpu = torch.cuda.current_device() if torch.cuda.is_available() else -1  # of several processes each its own
            made: Any = pipeline("automatic-speech-recognition", model=str(source), device=gpu, trust_remote_code=False)
        return cls(made)

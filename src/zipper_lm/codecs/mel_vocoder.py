"""Published vocoder: log-mel frames to sound by a network, in place of Griffin-Lim.

The networks are transformers' `SpeechT5HifiGan` (HiFi-GAN: Kong et al. 2020, arXiv 2010.05646) and `UnivNetModel` (Jang
et al. 2021, arXiv 2106.07889). Each speaks log-mel frames of one kind alone, which its feature extractor makes: of its
own rate, bands, window and step. Here frames are 10 ms apart, as units last whole ones. So the extractor is asked for
frames so far apart, a decoder learns to write these, and those that the network steps by lie on lines between them.

Letters: T samples, N frames of 10 ms, M bands of the vocoder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
import transformers
from torch import Tensor
from transformers.utils import FEATURE_EXTRACTOR_NAME, cached_file

from zipper_lm.codecs.audio import SAMPLING_RATE, check_rate, read_audio
from zipper_lm.codecs.mel import HOP
from zipper_lm.utils.hub import CONFIG_FILE, reaching
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.sizes import check_size, weight_files
from zipper_lm.utils.tensors import lacking_tensors

_EXTRACTORS = {"SpeechT5HifiGan": "SpeechT5FeatureExtractor", "UnivNetModel": "UnivNetFeatureExtractor"}
_FRAMES_A_SECOND = SAMPLING_RATE // HOP
_TAIL = SAMPLING_RATE // 10  # of silence, which the last frames see
_LEAST_STEPS = 4  # that a convolution can reflect at its edge
_LONGEST_WINDOW = 1 << 14  # of what a file asks for: 20 times those that there are


class MelVocoder:
    """Log-mel frames to sound at 16 kHz, and sound to these frames. Make one with `load`.

    Args:
        model: a `SpeechT5HifiGan` or `UnivNetModel`. extractor: the feature extractor of its class.

    Raises:
        ValueError: if the one does not make what the other speaks.
    """

    def __init__(self, model: Any, extractor: Any) -> None:
        self.model, self.extractor = model.eval().requires_grad_(False), extractor
        self._centred = isinstance(model, transformers.SpeechT5HifiGan)  # frame i at i steps, not in a step's middle
        self.rate = check_rate(extractor.sampling_rate, "vocoder: its sampling_rate")
        if self._centred:
            self.bands, self.step = model.config.model_in_dim, math.prod(model.config.upsample_rates)
            found, rate = extractor.sample_stride, model.config.sampling_rate
        else:
            self.bands, self.step = model.config.num_mel_bins, math.prod(model.config.resblock_stride_sizes)
            found, rate = extractor.hop_length, self.rate
        for name, theirs, own in (
            ("bands", extractor.num_mel_bins, self.bands),
            ("samples from one to the next", found, self.step),
            ("samples a second", self.rate, rate),
        ):
            if theirs != own:
                raise ValueError(
                    f"vocoder: takes log-mel frames of {own} {name}, and its feature extractor makes them of {theirs}: "
                    f"a {FEATURE_EXTRACTOR_NAME} beside it must say how they are made"
                )
        if self.rate % _FRAMES_A_SECOND:
            raise ValueError(
                f"vocoder: its sampling_rate must be a multiple of {_FRAMES_A_SECOND} Hz, got {self.rate}: 10 ms are "
                "whole samples then"
            )
        each = 1000 if self._centred else self.rate  # which counts in ms
        self._every_10_ms = type(extractor).from_dict({**extractor.to_dict(), "hop_length": each // _FRAMES_A_SECOND})

    def frames(self, wave: Tensor, count: int) -> Tensor:
        """So many of its log-mel frames, float32 [N, M], of a wave float32 [T] at 16 kHz, silent beyond its end."""
        silent = torch.nn.functional.pad(wave, (0, max(0, count * HOP + _TAIL - len(wave)))).numpy()
        heard = soxr.resample(silent, SAMPLING_RATE, self.rate, quality="HQ")
        make = self._every_10_ms
        if self._centred:
            mel = make(audio_target=heard, sampling_rate=self.rate)["input_values"][0]
        else:
            mel = make.mel_spectrogram(heard)
            mel = make.normalize(mel) if make.do_normalize else mel
        return torch.from_numpy(np.asarray(mel[:count], dtype=np.float32))

    def spaced(self, mel: Tensor) -> Tensor:
        """Frames [N, M] as far apart as the network's steps: float32 [steps, M]."""
        ratio = self.step * _FRAMES_A_SECOND / self.rate
        first = 0.0 if self._centred else 0.5
        at = (torch.arange(math.ceil(len(mel) / ratio)) + first) * ratio - first
        at = at.clamp(0, len(mel) - 1)
        before = at.floor().long()
        return torch.lerp(mel[before], mel[(before + 1).clamp_max(len(mel) - 1)], (at - before)[:, None])

    @torch.inference_mode()
    def __call__(self, mel: Tensor) -> np.ndarray:
        """Sound, float32 [N * 160] at 16 kHz, in [-1, 1], of frames float32 [N, M], as `frames` makes them."""
        length = len(mel) * HOP
        if not length:
            return np.zeros(0, dtype=np.float32)
        steps = self.spaced(mel)
        steps = torch.cat([steps, steps[-1:].expand(max(0, _LEAST_STEPS - len(steps)), -1)])
        if self._centred:
            wave = self.model(steps.to(self.model.device))
        else:
            shape = (len(steps), self.model.config.model_in_channels)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            wave = self.model(steps.to(self.model.device), noise.to(self.model.device)).waveforms[0]
        sound = read_audio((wave.cpu().numpy(), self.rate), max_seconds=math.inf)[:length]
        return np.pad(sound, (0, length - len(sound))).clip(-1.0, 1.0)

    def save(self, folder: Path) -> None:
        """Write `config.json`, `model.safetensors` and `preprocessor_config.json`."""
        self.model.save_pretrained(folder)
        self.extractor.save_pretrained(folder)

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, **hub: Any) -> MelVocoder:
        """Load one.

        Args:
            source: folder or Hub id. Where no `preprocessor_config.json` lies beside the weights, its log-mel frames
                are those that its class is published with, if these are what its config asks for.
            revision: on the Hub. hub: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if it cannot be loaded, is of another class, or takes other frames than are told.
        """
        what = "vocoder"
        with reaching(what, source, revision):
            file = cached_file(source, CONFIG_FILE, revision=revision, **hub)
            if file is None:
                raise ValueError(f"there is no {CONFIG_FILE}")
            said = read_mapping(file)
        named = said.get("architectures")
        name = named[0] if isinstance(named, list) and named else said.get("model_type")
        if not isinstance(name, str) or name not in _EXTRACTORS:
            raise ValueError(
                f"{what} {str(source)!r}: is {name if isinstance(name, str) else 'nothing of transformers'}, must be "
                f"{' or '.join(_EXTRACTORS)}: what log-mel frames others take is told nowhere"
            )
        owner = getattr(transformers, name)
        with reaching(what, source, revision):
            config = owner.config_class.from_dict(said)
            files = weight_files(str(source), revision=revision, **hub)
            check_size("its config.json", config, files, owner)
            model, info = owner.from_pretrained(
                source, config=config, revision=revision, dtype=torch.float32, output_loading_info=True, **hub
            )
            if lacking := lacking_tensors(info):
                raise ValueError(f"the checkpoint lacks {len(lacking)} tensors of {name}, such as {lacking[:3]}")
            extractor = _extractor(_EXTRACTORS[name], source, revision, **hub)
            return cls(model, extractor)


def _extractor(name: str, source: str | Path, revision: str | None, **hub: Any) -> Any:
    """The feature extractor beside a vocoder's weights, or that of its class as it is published."""
    file = cached_file(
        source, FEATURE_EXTRACTOR_NAME, revision=revision, _raise_exceptions_for_missing_entries=False, **hub
    )
    settings = read_mapping(file) if file else {}
    if (made := settings.get("feature_extractor_type", name)) != name:
        raise ValueError(f"{FEATURE_EXTRACTOR_NAME} is of a {made}, must be of a {name}")
    for size in ("win_length", "filter_length", "num_mel_bins"):
        value = settings.get(size)
        if value is not None and (type(value) is not int or not 1 <= value <= _LONGEST_WINDOW):
            raise ValueError(f"{FEATURE_EXTRACTOR_NAME}: {size} must be from 1 to {_LONGEST_WINDOW}, got {value!r}")
    check_rate(settings.get("sampling_rate", SAMPLING_RATE), f"{FEATURE_EXTRACTOR_NAME}: sampling_rate")
    return getattr(transformers, name).from_dict(settings)

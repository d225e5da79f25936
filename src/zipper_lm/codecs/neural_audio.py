"""Neural audio codecs of transformers, such as Mimi, EnCodec, DAC, X-Codec, X-Codec 2 and NeuCodec: sound <-> codes.

Where a model has several codebooks, its frames are laid out one after the other, each from the first codebook to the
last, and every codebook has its own ids (code c of codebook k is unit ``k * size + c``): a decoder that reads the
stream always knows where in a frame it is. The first codebooks alone are a coarser sound at a lower rate.

How the models differ is read from their configs and from the arguments of their `encode` and `decode`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, SeamlessM4TFeatureExtractor

from zipper_lm.codecs.audio import SAMPLING_RATE, read_audio
from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.layout import IdLayout, LaidOut
from zipper_lm.codecs.pretrained import ModelSource, RunsModel, keep_model, kept_model, open_model
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import check_hub_arguments, reaching


@dataclass(frozen=True, kw_only=True)
class CodesFormat:
    """What the codes of one model are.

    Args:
        rate_in, rate_out: samples per second that it takes and gives. hop: samples taken per frame.
        codebooks: codes of a frame. size: codes to choose from in each codebook.
    """

    rate_in: int
    rate_out: int
    hop: int
    codebooks: int
    size: int


def codes_format(config: PreTrainedConfig) -> CodesFormat:
    """Read the format of a model's codes off its config.

    Raises:
        ValueError: if it is no neural audio codec's, or one whose sounds are not told by codes alone.
    """

    def first(*names: str, otherwise: Any = None) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), otherwise)

    name = type(config).__name__
    levels = first("quantization_levels")  # finite scalar quantisation has no codebook to speak of
    size = math.prod(levels) if levels else first("codebook_size")
    ratios = first("downsampling_ratios")  # the hop_length beside them is wrong in published DAC configs
    hop = math.prod(ratios) if ratios else first("encoder_hop_length", "frame_size", "hop_length")
    rate = first("input_sampling_rate", "sampling_rate", "sample_rate")
    if size is None or hop is None or rate is None:
        raise ValueError(f"neural-audio: {name} is not the config of a neural audio codec")
    if (channels := first("audio_channels", otherwise=1)) != 1:
        raise ValueError(f"neural-audio: {name}: audio_channels={channels}, must be 1: all sound here is mono")
    if first("normalize") or first("chunk_length_s"):
        raise ValueError(
            f"neural-audio: {name}: this model tells a sound by loudness scales of its pieces beside the codes "
            "(normalize, chunk_length_s); tokens cannot carry those"
        )
    return CodesFormat(
        rate_in=rate,
        rate_out=first("output_sampling_rate", otherwise=rate),
        hop=int(hop),
        codebooks=first("num_quantizers", "n_codebooks", otherwise=1),
        size=size,
    )


class NeuralAudioCodec(LaidOut, RunsModel):
    """Sound <-> codes of a pre-trained neural audio codec. Make one with `make` or `from_pretrained`.

    The model runs where it is (`to`), one sound at a time and each in one piece.

    Args:
        model: a codec model of transformers. at: where it came from.
        codebooks: how many of its codebooks are used, from the first on; `None` for all.
        layout: where the ``codebooks * size`` units lie among the ids; by default from 0 on.

    Raises:
        ValueError: if the model is no neural audio codec, or has fewer codebooks.
    """

    kind: ClassVar[str] = "neural-audio"

    def __init__(
        self, model: PreTrainedModel, at: ModelSource, *, codebooks: int | None = None, layout: IdLayout | None = None
    ) -> None:
        self.format = codes_format(model.config)
        self.codebooks = _checked_codebooks(codebooks, self.format)
        units = self.codebooks * self.format.size
        if layout is not None and layout.units != units:
            raise ValueError(f"neural-audio: layout is for {layout.units} units, the codec has {units}")
        self.model: Any = model
        self.at = at
        self.layout = layout or IdLayout(units=units)

    @property
    def rate(self) -> float:
        """Tokens per second of sound: frames per second, times `codebooks`."""
        return self.codebooks * self.format.rate_in / self.format.hop

    @torch.inference_mode()
    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Sounds (whatever `read_audio` reads; a bare array is at 16 kHz) to ids, `codebooks` a frame.

        Raises:
            ValueError: if a sound cannot be read; see `read_audio`.
        """
        return [self.from_codes(self._encode_one(value)) for value in values]

    @torch.inference_mode()
    def decode(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Ids to sounds, float32 [time] at 16 kHz, in [-1, 1]. Ids out of order are dropped (see `to_codes`).

        Raises:
            ValueError: if an id is no unit's.
        """
        rows = [self.to_codes(row, f"neural-audio ids, row {number}") for number, row in enumerate(ids)]
        return [self._decode_one(codes) for codes in rows]

    def from_codes(self, codes: Tensor) -> list[int]:
        """Codes, long [codebooks, frames], to ids, frame by frame."""
        first_units = torch.arange(self.codebooks, device=codes.device)[:, None] * self.format.size
        return self.layout.to_ids((codes + first_units).T.flatten().tolist())

    def to_codes(self, ids: Sequence[int], what: str = "neural-audio ids") -> Tensor:
        """Ids to codes, long [codebooks, frames].

        A written row need not be whole frames. An id of the first codebook begins a frame, and every other must be of
        the codebook whose turn it is, or it is dropped; so is a frame that is not finished.

        Raises:
            ValueError: naming `what`, if an id is no unit's.
        """
        frames: list[int] = []
        frame: list[int] = []
        for unit in self.layout.to_units(ids, what):
            codebook, code = divmod(unit, self.format.size)
            if codebook == 0:
                frame = []
            if codebook != len(frame):
                continue
            frame.append(code)
            if len(frame) == self.codebooks:
                frames += frame
                frame = []
        return torch.tensor(frames, dtype=torch.long).reshape(-1, self.codebooks).T

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` into the folder `path`; a model that is no one of the Hub is copied beside it."""
        with files_into(path, last=CODEC_FILE) as folder:
            fields = {
                "kind": self.kind,
                "model": keep_model(self.model, self.at, folder),
                "codebooks": self.codebooks,
                "layout": self.layout.settings(),
            }
            write_json(folder / CODEC_FILE, fields)

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> NeuralAudioCodec:
        """Read what `save_pretrained` wrote.

        Args:
            path: the folder. hub: `cache_dir`, `token`, `local_files_only`, for a model on the Hub.

        Raises:
            ValueError: if the file is missing or damaged, or the model cannot be loaded or is another one.
        """
        fields = read_codec_file(path, cls.kind)
        with reaching(f"{cls.kind} codec", path):
            at, codebooks, layout = kept_model(fields["model"], path, **hub), fields["codebooks"], fields["layout"]
        return cls._open(at, codebooks, layout)

    @classmethod
    def make(
        cls,
        values: Sequence[Any] = (),
        *,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        codebooks: int | None = None,
        offset: int = 0,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
        **hub: Any,
    ) -> NeuralAudioCodec:
        """As a recipe asks for it: nothing is fitted.

        Args:
            source: folder or Hub id of the model. revision: on the Hub.
            codebooks: how many are used, from the first on; `None` for all.
            offset, bos, eos, pad: of `IdLayout`. hub: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if it cannot be loaded, is no neural audio codec, or has fewer codebooks.
        """
        if source is None:
            raise ValueError("codec.source: neural-audio needs the folder or Hub id of a model")
        check_hub_arguments(hub)
        layout = {"offset": offset, "bos": bos, "eos": eos, "pad": pad}
        return cls._open(ModelSource(source=source, revision=revision, hub=hub), codebooks, layout)

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes the model goes by name: a weight-normed one cannot be pickled."""
        return self._open, (self.at, self.codebooks, self.layout.settings())

    @classmethod
    def _open(cls, at: ModelSource, codebooks: int | None, layout: dict[str, Any]) -> NeuralAudioCodec:
        with reaching(f"{cls.kind} codec model", at.source, at.revision):
            config = AutoConfig.from_pretrained(at.source, revision=at.revision, trust_remote_code=False, **at.hub)
        format = codes_format(config)  # what is wrong shows before the weights are fetched
        placed = IdLayout(units=_checked_codebooks(codebooks, format) * format.size, **layout)
        model, at = open_model(AutoModel, at)
        return cls(model, at, codebooks=codebooks, layout=placed)

    def _encode_one(self, value: Any) -> Tensor:
        if isinstance(value, np.ndarray | Tensor | list):
            value = (value, SAMPLING_RATE)  # read_audio would take it to be at the model's rate
        wave = read_audio(value, self.format.rate_in)
        wanted = inspect.signature(self.model.encode).parameters
        inputs: dict[str, Any] = {}
        if "input_features" in wanted:
            wave, inputs["input_features"] = _semantic(wave, self.format, self.model.config.model_type)
        if "bandwidth" in wanted:  # residual codebooks follow each other: the first are the same at any bandwidth
            inputs["bandwidth"] = max(self.model.config.target_bandwidths)
        wave = np.pad(wave, (0, -len(wave) % self.format.hop))
        inputs = {"input_values": torch.from_numpy(wave)[None, None], **inputs}
        at = self.model.device
        found = self.model.encode(**{k: v.to(at) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        codes = found.audio_codes
        return codes.reshape(-1, codes.shape[-1])[: self.codebooks].cpu()

    def _decode_one(self, codes: Tensor) -> np.ndarray:
        if not codes.shape[1]:
            return np.zeros(0, dtype=np.float32)
        batch = codes[None].to(self.model.device)  # [1, codebooks, frames]
        if "audio_scales" in inspect.signature(self.model.decode).parameters:  # codes and scales of one piece
            found = self.model.decode(audio_codes=batch[None], audio_scales=[None])
        else:
            found = self.model.decode(audio_codes=batch)
        wave = found.audio_values.flatten().cpu().numpy()
        return read_audio((wave, self.format.rate_out), max_seconds=math.inf).clip(-1.0, 1.0)


def _checked_codebooks(codebooks: int | None, format: CodesFormat) -> int:
    if codebooks is None:
        return format.codebooks
    if isinstance(codebooks, bool) or not isinstance(codebooks, int) or not 1 <= codebooks <= format.codebooks:
        raise ValueError(f"neural-audio: codebooks must be from 1 to {format.codebooks}, got {codebooks!r}")
    return codebooks


def _semantic(wave: np.ndarray, format: CodesFormat, model_type: str) -> tuple[np.ndarray, Tensor]:
    """What models with a semantic encoder (Wav2Vec2-BERT) read: a wave [time], and features float32 [1, frames, 160].

    The models' own feature extractors need torchaudio; that of SeamlessM4T computes the same Kaldi filter banks
    without. As there, the wave gets one sample and then whole frames, and X-Codec 2's features half a frame at
    each end.
    """
    frames = max(2, len(wave) // format.hop + 1)  # one frame of sound is shorter than the window of a feature
    wave = np.pad(wave, (0, frames * format.hop - len(wave)))
    edge = format.hop // 2 if model_type == "xcodec2" else 0
    prepared = SeamlessM4TFeatureExtractor()(
        np.pad(wave, edge), sampling_rate=format.rate_in, return_tensors="pt", return_attention_mask=False
    )
    return wave, prepared.input_features

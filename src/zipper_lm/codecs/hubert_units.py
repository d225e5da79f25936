"""Speech units of a pre-trained speech encoder: k-means of one layer's features, and the ways back to sound.

Encoding: 16 kHz sound, an encoder of transformers that takes waves (HuBERT, arXiv 2106.07447; wav2vec 2.0; WavLM), the
hidden states after one layer, the nearest centroid of each (Lakhotia et al. 2021, arXiv 2102.01192). The centroids are
a published codebook, or fitted on the user's sound. Runs of one unit may be made one. Decoding: a unit vocoder
(`zipper_lm.codecs.unit_vocoder`), or, with a codebook that was fitted here, each unit's mean log-mel frames and
Griffin-Lim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers.utils import FEATURE_EXTRACTOR_NAME, cached_file

from zipper_lm.codecs.audio import SAMPLING_RATE, read_audio
from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.kmeans import ENOUGH, fit_centroids, means, nearest
from zipper_lm.codecs.layout import IdLayout, LaidOut
from zipper_lm.codecs.mel import BANDS, HOP, log_mel, mel_to_sound, normalise_loudness
from zipper_lm.codecs.pretrained import ModelSource, RunsModel, keep_model, kept_model, open_model
from zipper_lm.codecs.unit_vocoder import UnitVocoder
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import check_hub_arguments, reaching
from zipper_lm.utils.json_files import read_mapping

WEIGHTS_FILE = "codec.safetensors"
VOCODER_FOLDER = "vocoder"
LONGEST_RUN = 10_000
"""Of one unit, on average: more than there are in the longest sound that is read."""


@dataclass(frozen=True, kw_only=True)
class HubertUnitsConfig:
    """How features become units.

    Args:
        layer: the hidden states after this layer of the encoder; 0 is what enters the first.
        normalize: whether each sound is brought to zero mean and unit variance before the encoder reads it.
        deduplicate: whether a run of one unit is one token.
    """

    layer: int
    normalize: bool = False
    deduplicate: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"hubert-units: layer must be a whole number of at least 0, got {self.layer!r}")


@dataclass(frozen=True, kw_only=True)
class UnitSounds:
    """What each of K units stands for in the sound that a codebook was fitted on.

    Args:
        mels: float32 [K, frames, 80], mean log-mel frames of 10 ms. runs: float32 [K], mean length of a run of it.
    """

    mels: Tensor
    runs: Tensor

    def __post_init__(self) -> None:
        if self.mels.ndim != 3 or self.mels.shape[2] != BANDS or self.runs.shape != self.mels.shape[:1]:
            shapes = [list(self.mels.shape), list(self.runs.shape)]
            raise ValueError(f"hubert-units: mels and runs must be [units, frames, {BANDS}] and [units], got {shapes}")
        if not (torch.isfinite(self.runs).all() and (self.runs <= LONGEST_RUN).all()):
            raise ValueError(f"hubert-units: runs must be at most {LONGEST_RUN} units, got {float(self.runs.max()):g}")

    def sound(self, units: Sequence[int], *, deduplicated: bool) -> np.ndarray:
        """Units to sound, float32 [time] at 16 kHz; `deduplicated` ones last as long as their mean run."""
        row = torch.tensor(list(units), dtype=torch.long)
        if deduplicated:
            row = row.repeat_interleave(self.runs[row].round().long().clamp_min(1))
        return mel_to_sound(self.mels[row].reshape(-1, BANDS))


class HubertUnits(LaidOut, RunsModel):
    """Sound <-> units of a pre-trained encoder. Make one with `make` or `from_pretrained`.

    The model runs where it is (`to`), one sound at a time: so no sound's units depend on what it is batched with, and
    none on padding, which encoders such as HuBERT base do not mask in their convolutions.

    Args:
        model: encoder with `conv_stride` in its config and `output_hidden_states`. at: where it came from.
        config: see there. codebook: float [K, width of the model].
        layout: where the K units lie among the ids; by default from 0 on.
        vocoder: speaks the units. sounds: what they stand for, if there is no vocoder.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    kind: ClassVar[str] = "hubert-units"

    def __init__(
        self,
        model: PreTrainedModel,
        at: ModelSource,
        config: HubertUnitsConfig,
        codebook: Tensor,
        *,
        layout: IdLayout | None = None,
        vocoder: UnitVocoder | None = None,
        sounds: UnitSounds | None = None,
    ) -> None:
        check_encoder(model, config)
        width = model.config.hidden_size
        if codebook.ndim != 2 or codebook.shape[1] != width:
            raise ValueError(
                f"hubert-units: codebook has shape {list(codebook.shape)}, must be [units, {width}]: "
                f"the features of {at.source!r} are {width} wide"
            )
        if layout is not None and layout.units != len(codebook):
            raise ValueError(f"hubert-units: layout is for {layout.units} units, the codebook has {len(codebook)}")
        if sounds is not None and len(sounds.runs) != len(codebook):
            raise ValueError(f"hubert-units: sounds of {len(sounds.runs)} units, the codebook has {len(codebook)}")
        self.model = model
        self.at = at
        self.config = config
        self.codebook = codebook.float()
        self.layout = layout or IdLayout(units=len(codebook))
        self.vocoder = vocoder
        self.sounds = sounds
        if vocoder is not None:
            _check_vocoder(vocoder, len(codebook), self.rate, config.deduplicate)

    def to(self, device: torch.device | str) -> Self:
        """Run on this device from now on, the vocoder too."""
        if self.vocoder is not None:
            self.vocoder.model.to(device)
        return super().to(device)

    @property
    def rate(self) -> float:
        """Units per second of sound; with `deduplicate`, the most there can be."""
        return SAMPLING_RATE / math.prod(self.model.config.conv_stride)

    @property
    def can_decode(self) -> bool:
        """Whether it has a vocoder or sounds of its own: units of a published codebook alone cannot be spoken."""
        return self.vocoder is not None or self.sounds is not None

    @torch.inference_mode()
    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Sounds (whatever `read_audio` reads) to ids.

        Raises:
            ValueError: if a sound cannot be read; see `read_audio`.
        """
        return [self._encode_one(value) for value in values]

    @torch.inference_mode()
    def decode(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Ids to sounds, float32 [time] at 16 kHz, in [-1, 1].

        Raises:
            ValueError: if an id is no unit's, or the codec has neither vocoder nor sounds of its own.
        """
        rows = [self.layout.to_units(row, f"hubert-units ids, row {number}") for number, row in enumerate(ids)]
        speak = self.vocoder or (self.sounds.sound if self.sounds is not None else None)
        if speak is None:
            raise ValueError(
                "hubert-units: there is no way back to sound; give the option vocoder (folder or Hub id of a unit "
                "HiFi-GAN for these units), or leave codebook out, so that units are fitted on your sound"
            )
        deduplicated = self.config.deduplicate
        return [speak(row, deduplicated=deduplicated) if row else np.zeros(0, dtype=np.float32) for row in rows]

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` and `codec.safetensors` into the folder `path`; the vocoder, and an encoder that is no
        one of the Hub, are copied beside them."""
        tensors = {"codebook": self.codebook}
        if self.sounds is not None:
            tensors |= {"mels": self.sounds.mels, "runs": self.sounds.runs}
        with files_into(path, last=CODEC_FILE) as folder:
            at = keep_model(self.model, self.at, folder)
            if self.vocoder is not None:
                self.vocoder.save(folder / VOCODER_FOLDER)
            # not save_file: it makes files that only their owner can read
            (folder / WEIGHTS_FILE).write_bytes(save({name: t.contiguous() for name, t in tensors.items()}))
            fields = {
                "kind": self.kind,
                "model": at,
                "config": asdict(self.config),
                "layout": self.layout.settings(),
                "speaker": None if self.vocoder is None else self.vocoder.speaker,
            }
            write_json(folder / CODEC_FILE, fields)

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> HubertUnits:
        """Read what `save_pretrained` wrote.

        Args:
            path: the folder. hub: `cache_dir`, `token`, `local_files_only`, for a model on the Hub.

        Raises:
            ValueError: if a file is missing or damaged, or the model cannot be loaded or is another one.
        """
        fields = read_codec_file(path, cls.kind)
        with reaching(f"{cls.kind} codec", path):
            tensors = load_file(Path(path) / WEIGHTS_FILE)
            config = HubertUnitsConfig(**fields["config"])
            codebook, speaker = tensors["codebook"], fields["speaker"]
            layout = IdLayout(units=len(codebook), **fields["layout"])
            at = kept_model(fields["model"], path, **hub)
        vocoder = None if speaker is None else UnitVocoder.load(Path(path) / VOCODER_FOLDER, speaker=speaker)
        sounds = UnitSounds(mels=tensors["mels"], runs=tensors["runs"]) if "mels" in tensors else None
        return cls._open(at, config, codebook, layout, vocoder, sounds)

    @classmethod
    def make(
        cls,
        values: Sequence[Any] = (),
        *,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        layer: int,
        codebook: str | None = None,
        units: int | None = None,
        deduplicate: bool = False,
        normalize: bool | None = None,
        vocoder: str | None = None,
        vocoder_revision: str | None = None,
        speaker: int = 0,
        offset: int = 0,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
        **hub: Any,
    ) -> HubertUnits:
        """As a recipe asks for it.

        Args:
            values: sounds to fit a codebook on, where none is given.
            source: folder or Hub id of the encoder. revision: on the Hub. seed: of the fit.
            layer: whose features; the codebook's, if one is given.
            codebook: file of centroids [K, width]: a path, or a name inside `source`; `.npy`, `.safetensors`, or
                `.pt` and `.bin` of plain tensors.
            units: number of centroids to fit (500), where no codebook is given.
            deduplicate: see `HubertUnitsConfig`.
            normalize: see there; by default as the encoder's preprocessor_config.json says, false if it has none.
            vocoder: folder, file or Hub id; see `UnitVocoder.load`. vocoder_revision: on the Hub.
            speaker: which of its voices.
            offset, bos, eos, pad: of `IdLayout`. hub: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if something cannot be loaded, does not fit, or there is too little sound.
        """
        if source is None:
            raise ValueError("codec.source: hubert-units needs the folder or Hub id of an encoder")
        check_hub_arguments(hub)
        if codebook is not None and units is not None:
            raise ValueError(f"codec.options: units={units} has no effect: the codebook says how many there are")
        if codebook is None and vocoder is not None:
            raise ValueError("codec.options: a vocoder speaks the units of one codebook: give the option codebook too")
        if vocoder is None and vocoder_revision is not None:
            raise ValueError(f"codec.options: vocoder_revision={vocoder_revision!r} has no effect without a vocoder")
        if normalize is None:
            normalize = _normalizes(source, revision, **hub)
        config = HubertUnitsConfig(layer=layer, normalize=normalize, deduplicate=deduplicate)
        centroids = None if codebook is None else read_codebook(codebook, source, revision, **hub)
        size = len(centroids) if centroids is not None else 500 if units is None else units
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(f"hubert-units: units must be a whole number of at least 2, got {size!r}")
        placed = IdLayout(units=size, offset=offset, bos=bos, eos=eos, pad=pad)
        speaks = sounds = None
        if vocoder is not None:
            speaks = UnitVocoder.load(vocoder, revision=vocoder_revision, speaker=speaker, **hub)
        model, at = open_model(AutoModel, ModelSource(source=source, revision=revision, hub=hub))
        if centroids is None:
            centroids, sounds = fit_units(values, model, config, size, seed)
        return cls(model, at, config, centroids, layout=placed, vocoder=speaks, sounds=sounds)

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes the encoder goes by name: a weight-normed one cannot be pickled."""
        return self._open, (self.at, self.config, self.codebook, self.layout, self.vocoder, self.sounds)

    @classmethod
    def _open(
        cls,
        at: ModelSource,
        config: HubertUnitsConfig,
        codebook: Tensor,
        layout: IdLayout,
        vocoder: UnitVocoder | None,
        sounds: UnitSounds | None,
    ) -> HubertUnits:
        model, at = open_model(AutoModel, at)
        return cls(model, at, config, codebook, layout=layout, vocoder=vocoder, sounds=sounds)

    def _encode_one(self, value: Any) -> list[int]:
        found = nearest(features(read_audio(value), self.model, self.config), self.codebook)
        if self.config.deduplicate:
            found = found.unique_consecutive()
        return self.layout.to_ids(found.tolist())


def check_encoder(model: PreTrainedModel, config: HubertUnitsConfig) -> None:
    """Raise `ValueError` if `model` takes no waves, or has no such layer."""
    if not hasattr(model.config, "conv_stride"):
        raise ValueError(
            f"hubert-units: {type(model).__name__} takes no waves; an encoder such as HuBERT, WavLM or wav2vec 2.0 is "
            "needed"
        )
    if config.layer > (depth := model.config.num_hidden_layers):
        raise ValueError(f"hubert-units: layer={config.layer}, but {type(model).__name__} has layers 1 to {depth}")


@torch.inference_mode()
def features(wave: np.ndarray, model: PreTrainedModel, config: HubertUnitsConfig) -> Tensor:
    """Features that units are told apart by, float32 [units, width], of a wave float32 [time] at 16 kHz.

    Silence is appended to a wave too short for one.
    """
    field = 1  # samples that one vector sees
    for kernel, stride in zip(reversed(model.config.conv_kernel), reversed(model.config.conv_stride)):
        field = (field - 1) * stride + kernel
    wave = np.pad(wave, (0, max(0, field - len(wave))))
    prepare = Wav2Vec2FeatureExtractor(do_normalize=config.normalize)
    values = prepare(wave, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_values.to(model.device)
    return model(values, output_hidden_states=True).hidden_states[config.layer][0].cpu()


def fit_units(
    values: Sequence[Any], model: PreTrainedModel, config: HubertUnitsConfig, units: int, seed: int
) -> tuple[Tensor, UnitSounds | None]:
    """Centroids, float32 [units, width], of the sounds' features, and what each stands for.

    Of many hours of sound a part is read, drawn with `seed`: as much as k-means looks at.

    Returns:
        The centroids, and the sounds; `None` where the encoder's stride is no multiple of 10 ms.

    Raises:
        ValueError: if there is too little sound, or it cannot be read.
    """
    check_encoder(model, config)
    stride = math.prod(model.config.conv_stride)
    vectors, mels, total = [], [], 0
    for number in np.random.default_rng(seed).permutation(len(values)):
        wave = read_audio(values[number])
        vectors.append(features(wave, model, config))
        frames = len(vectors[-1]) * (stride // HOP)
        mels.append(log_mel(torch.nn.functional.pad(normalise_loudness(torch.from_numpy(wave)), (0, stride)))[:frames])
        total += len(vectors[-1])
        if total >= ENOUGH:
            break
    if total < units:
        raise ValueError(
            f"hubert-units: {total} vectors are too few for units={units}: at least {units} "
            f"({units * stride / SAMPLING_RATE:.0f} s of sound) are needed, or the option codebook"
        )
    everything = torch.cat(vectors)
    centroids = fit_centroids(everything, units, seed)
    if stride % HOP:
        return centroids, None
    ids = nearest(everything, centroids)
    runs = [part.unique_consecutive(return_counts=True) for part in ids.split([len(v) for v in vectors])]
    lengths = torch.cat([counts for _, counts in runs])[:, None].float()
    return centroids, UnitSounds(
        mels=means(torch.cat(mels).reshape(total, -1), ids, units).reshape(units, -1, BANDS),
        runs=means(lengths, torch.cat([first for first, _ in runs]), units)[:, 0],
    )


def read_codebook(codebook: str, source: str, revision: str | None = None, **hub: Any) -> Tensor:
    """Centroids, float32 [K, width].

    Args:
        codebook: path, or the name of a file inside `source`: `.npy`, `.safetensors`, or `.pt` and `.bin`, which hold
            one matrix. Nothing is unpickled that could run code.
        source: folder or Hub id. revision: on the Hub. hub: `cache_dir`, `token`, `local_files_only`.

    Raises:
        ValueError: if it is not there, cannot be read, or does not hold exactly one matrix.
    """
    file = next((f for f in (Path(codebook), Path(source) / codebook) if f.is_file()), None)
    if file is None and Path(source).is_dir():
        raise ValueError(f"codebook {codebook!r}: no such file here nor in {source}")
    if file is None:
        with reaching(f"codebook {codebook!r} of", source, revision):
            file = Path(hf_hub_download(source, codebook, revision=revision, **hub))
    try:
        content: Any
        if file.suffix == ".npy":
            content = torch.from_numpy(np.load(file, allow_pickle=False))
        elif file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # numpy, safetensors, zip files and the restricted unpickler each have their own kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"codebook {file}: cannot be read as .npy, .safetensors or plain tensors ({first}); docs/codecs.md says "
            "how to convert one that scikit-learn pickled"
        ) from error
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    matrices = [t for t in tensors if isinstance(t, Tensor) and t.ndim == 2]
    if len(matrices) != 1:
        raise ValueError(f"codebook {file}: must hold one matrix [units, width], holds {len(matrices)}")
    return matrices[0].float()


def _normalizes(source: str, revision: str | None, **hub: Any) -> bool:
    """What the encoder's preprocessor says of normalisation."""
    with reaching("codec model", source, revision):
        file = cached_file(
            source, FEATURE_EXTRACTOR_NAME, revision=revision, _raise_exceptions_for_missing_entries=False, **hub
        )
        settings = read_mapping(file) if file else {}
    if (rate := settings.get("sampling_rate", SAMPLING_RATE)) != SAMPLING_RATE:
        raise ValueError(f"hubert-units: {source!r} takes sound at {rate} Hz, must be {SAMPLING_RATE}")
    return bool(settings.get("do_normalize", False))


def _check_vocoder(vocoder: UnitVocoder, units: int, rate: float, deduplicate: bool) -> None:
    if vocoder.units < units:
        raise ValueError(f"hubert-units: the vocoder knows {vocoder.units} units, the codebook has {units}")
    if deduplicate and not vocoder.durations:
        raise ValueError("hubert-units: deduplicate=true, but the vocoder has no duration predictor")
    if not deduplicate and vocoder.rate != rate:
        raise ValueError(
            f"hubert-units: the vocoder speaks {vocoder.rate:g} units a second, the encoder gives {rate:g}"
        )

"""Speech units of a pre-trained speech encoder: k-means of one layer's features, and the ways back to sound.

Encoding: 16 kHz sound, an encoder of transformers (HuBERT, arXiv 2106.07447; wav2vec 2.0; WavLM; Whisper, arXiv
2212.04356), the hidden states after one layer, pooled to a lower rate if one is named, the nearest centroid of each
(Lakhotia et al. 2021, arXiv 2102.01192). The centroids are a published codebook, or fitted on the user's sound; there a
projection may be learned first that keeps what spells (`zipper_lm.codecs.spelling_projection`). Runs of one unit may be
made one. Decoding: a unit vocoder (`zipper_lm.codecs.unit_vocoder`), or each unit's mean log-mel frames
in the user's sound, or a decoder trained on that (`zipper_lm.codecs.mel_decoder`), and Griffin-Lim or a vocoder of
log-mel frames (`zipper_lm.codecs.mel_vocoder`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, WhisperFeatureExtractor
from transformers.utils import FEATURE_EXTRACTOR_NAME, cached_file

from zipper_lm.codecs.audio import SAMPLING_RATE, read_sound
from zipper_lm.codecs.codebook import read_codebook
from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.kmeans import nearest
from zipper_lm.codecs.layout import IdLayout, LaidOut
from zipper_lm.codecs.mel import HOP
from zipper_lm.codecs.mel_decoder import DECODER_FOLDER, MelDecoder, check_training
from zipper_lm.codecs.mel_vocoder import MelVocoder
from zipper_lm.codecs.pretrained import ModelSource, RunsModel, keep_model, kept_model, open_model
from zipper_lm.codecs.speech_encoder import (
    BATCH,
    EncoderModel,
    MelEncoder,
    SpeechEncoder,
    features,
    pool_of,
    pooled,
    speech_encoder,
)
from zipper_lm.codecs.spelling_projection import PROJECTION_FOLDER, SpellingProjection, check_spelling
from zipper_lm.codecs.unit_sounds import FittedUnits, UnitSounds, unit_decoder, unit_frames
from zipper_lm.codecs.unit_vocoder import UnitVocoder
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import check_hub_arguments, reaching
from zipper_lm.utils.json_files import read_mapping

WEIGHTS_FILE = "codec.safetensors"
VOCODER_FOLDER = "vocoder"


@dataclass(frozen=True, kw_only=True)
class HubertUnitsConfig:
    """How features become units.

    Args:
        layer: the hidden states after this layer of the encoder; 0 is what enters the first.
        normalize: whether each sound is brought to zero mean and unit variance before the encoder reads it.
        deduplicate: whether a run of one unit is one token.
        pool: features in a row, of whose mean one unit is made. window: seconds of the longest piece that the encoder
            reads at once; `None` for that of its kind (see `speech_encoder`).

    Raises:
        ValueError: on a layer or a pool out of range.
    """

    layer: int
    normalize: bool = False
    deduplicate: bool = False
    pool: int = 1
    window: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("layer", 0), ("pool", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"hubert-units: {name} must be a whole number of at least {least}, got {value!r}")

    def settings(self) -> dict[str, Any]:
        """What makes it again. Of `pool` and `window` only what was chosen: so codecs without stay what they were."""
        rest = {"pool": 1, "window": None}
        return {name: value for name, value in asdict(self).items() if name not in rest or value != rest[name]}


class HubertUnits(LaidOut, RunsModel):
    """Sound <-> units of a pre-trained encoder. Make one with `make` or `from_pretrained`.

    The model runs where it is (`to`). One that takes waves reads one sound at a time: so no sound's units depend on
    what it is batched with, and none on padding, which encoders such as HuBERT base do not mask in their convolutions.
    Whisper reads pieces of one length, several together.

    Args:
        model: as `EncoderModel` loads it. at: where it came from.
        config: see there. codebook: float [K, D], D the width of the model, or what a projection makes of it.
        layout: where the K units lie among the ids; by default from 0 on.
        vocoder: speaks the units. sounds: what they stand for, if there is no vocoder.
        decoder: of log-mel frames, beside `sounds`. projection: of features, before the nearest centroid is found.

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
        decoder: MelDecoder | None = None,
        projection: SpellingProjection | None = None,
    ) -> None:
        self.encoder = speech_encoder(model, normalize=config.normalize, window=config.window)
        _check_layer(self.encoder, config.layer)
        width = self.encoder.width if projection is None else projection.config.size
        if codebook.ndim != 2 or codebook.shape[1] != width:
            raise ValueError(
                f"hubert-units: codebook has shape {list(codebook.shape)}, must be [units, {width}]: "
                f"the features of {at.source!r} are {width} wide"
            )
        if layout is not None and layout.units != len(codebook):
            raise ValueError(f"hubert-units: layout is for {layout.units} units, the codebook has {len(codebook)}")
        if sounds is not None and len(sounds.runs) != len(codebook):
            raise ValueError(f"hubert-units: sounds of {len(sounds.runs)} units, the codebook has {len(codebook)}")
        if decoder is not None and sounds is None:
            raise ValueError("hubert-units: a decoder corrects the sounds of the units, of which there are none")
        self.model = model
        self.at = at
        self.config = config
        self.codebook = codebook.float()
        self.layout = layout or IdLayout(units=len(codebook))
        self.vocoder = vocoder
        self.sounds = sounds
        self.decoder = decoder
        self.projection = projection
        if vocoder is not None:
            _check_vocoder(vocoder, len(codebook), self.rate, config.deduplicate)

    def to(self, device: torch.device | str) -> Self:
        """Run on this device from now on, the vocoder too."""
        for vocoder in (self.vocoder, self.decoder and self.decoder.vocoder):
            if vocoder is not None:
                vocoder.model.to(device)
        super().to(device)
        self.encoder.to(device)
        return self

    @property
    def rate(self) -> float:
        """Units per second of sound; with `deduplicate`, the most there can be."""
        return SAMPLING_RATE / self.encoder.stride / self.config.pool

    @property
    def unit_vectors(self) -> tuple[range, Tensor]:
        """Ids of the units, and their centroids, float32 [K, D]."""
        return self.layout.content, self.codebook

    @property
    def can_decode(self) -> bool:
        """Whether it has a vocoder or sounds of its own: units of a published codebook alone cannot be spoken."""
        return self.vocoder is not None or self.sounds is not None

    @property
    def looked_up(self) -> Self | None:
        """The same units without the decoder; `None` where there is none."""
        if self.decoder is None:
            return None
        plain = copy.copy(self)
        plain.decoder = None
        return plain

    @torch.inference_mode()
    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Sounds (whatever `read_audio` reads, of any length that fits into memory) to ids.

        Raises:
            ValueError: if a sound cannot be read; see `read_audio`.
        """
        rows: list[list[int]] = []
        for start in range(0, len(values), BATCH):
            found = self._units([read_sound(value) for value in values[start : start + BATCH]])
            rows += [
                self.layout.to_ids((u.unique_consecutive() if self.config.deduplicate else u).tolist()) for u in found
            ]
        return rows

    @torch.inference_mode()
    def decode(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Ids to sounds, float32 [time] at 16 kHz, in [-1, 1].

        Raises:
            ValueError: if an id is no unit's, or the codec has neither vocoder nor sounds of its own.
        """
        rows = [self.layout.to_units(row, f"hubert-units ids, row {number}") for number, row in enumerate(ids)]
        speak: Callable[..., np.ndarray]
        if self.vocoder is not None:
            speak = self.vocoder
        elif self.sounds is not None:
            speak = partial(self.sounds.sound, decoder=self.decoder)
        else:
            raise ValueError(
                "hubert-units: there is no way back to sound; give the option vocoder (folder or Hub id of a unit "
                "HiFi-GAN for these units), or leave codebook out, so that units are fitted on your sound"
            )
        deduplicated = self.config.deduplicate
        return [speak(row, deduplicated=deduplicated) if row else np.zeros(0, dtype=np.float32) for row in rows]

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` and `codec.safetensors` into the folder `path`; decoder, vocoder, and an encoder that is
        no one of the Hub, lie beside them."""
        tensors = {"codebook": self.codebook}
        if self.sounds is not None:
            tensors |= {"mels": self.sounds.mels, "runs": self.sounds.runs}
        with files_into(path, last=CODEC_FILE) as folder:
            at = keep_model(self.model, self.at, folder)
            if self.vocoder is not None:
                self.vocoder.save(folder / VOCODER_FOLDER)
            if self.decoder is not None:
                self.decoder.save(folder / DECODER_FOLDER)
            if self.projection is not None:
                self.projection.save(folder / PROJECTION_FOLDER)
            # not save_file: it makes files that only their owner can read
            (folder / WEIGHTS_FILE).write_bytes(save({name: t.contiguous() for name, t in tensors.items()}))
            fields = {
                "kind": self.kind,
                "model": at,
                "config": self.config.settings(),
                "layout": self.layout.settings(),
                "speaker": None if self.vocoder is None else self.vocoder.speaker,
                **({} if self.decoder is None else {"decoder": True}),
                **({} if self.projection is None else {"projection": True}),
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
        decoder = None
        if fields.get("decoder") and sounds is not None:
            units, frames, _ = sounds.mels.shape
            decoder = MelDecoder.load(Path(path) / DECODER_FOLDER, units=units, frames=frames)
        model, at = open_model(EncoderModel, at)
        projection = None
        if fields.get("projection"):
            width = speech_encoder(model, normalize=config.normalize, window=config.window).width
            projection = SpellingProjection.load(Path(path) / PROJECTION_FOLDER, features=width, pool=config.pool)
        return cls(
            model,
            at,
            config,
            codebook,
            layout=layout,
            vocoder=vocoder,
            sounds=sounds,
            decoder=decoder,
            projection=projection,
        )

    @classmethod
    def make(
        cls,
        values: Sequence[Any] = (),
        *,
        texts: Sequence[str | None] | None = None,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        layer: int,
        codebook: str | None = None,
        units: int | None = None,
        deduplicate: bool = False,
        normalize: bool | None = None,
        rate: float | None = None,
        window: float | None = None,
        spelling_steps: int = 0,
        refine_steps: int = 0,
        width: int = 160,
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
            texts: what each of them says, `None` for one that is not known.
            source: folder or Hub id of the encoder. revision: on the Hub. seed: of the fit.
            layer: whose features; the codebook's, if one is given.
            codebook: file of centroids [K, width]: a path, or a name inside `source`; `.npy`, `.safetensors`, or
                `.pt` and `.bin` of plain tensors.
            units: number of centroids to fit (500), where no codebook is given.
            deduplicate: see `HubertUnitsConfig`.
            normalize: see there; by default as the encoder's preprocessor_config.json says, false if it has none.
            rate: units a second, of which the encoder's own rate is a multiple: 25, 12.5 and 8.3 of one that gives 50.
            window: see `HubertUnitsConfig`.
            spelling_steps: training steps of a projection that keeps what spells the texts, before units are fitted.
            refine_steps, width: training steps and channels of a decoder, where units are fitted; see `MelDecoder`.
            vocoder: folder, file or Hub id: with a codebook of its units, see `UnitVocoder.load`; without, of what a
                decoder writes, see `MelVocoder.load`. vocoder_revision: on the Hub.
            speaker: which of a unit vocoder's voices.
            offset, bos, eos, pad: of `IdLayout`. hub: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if something cannot be loaded, does not fit, or there is too little sound.
        """
        if source is None:
            raise ValueError("codec.source: hubert-units needs the folder or Hub id of an encoder")
        check_hub_arguments(hub)
        if codebook is not None and units is not None:
            raise ValueError(f"codec.options: units={units} has no effect: the codebook says how many there are")
        if vocoder is None and vocoder_revision is not None:
            raise ValueError(f"codec.options: vocoder_revision={vocoder_revision!r} has no effect without a vocoder")
        check_training(refine_steps, width)
        check_spelling(spelling_steps)
        if codebook is None and vocoder is not None and not refine_steps:
            raise ValueError(
                "codec.options: a vocoder speaks the units of a codebook, or what a decoder writes: give codebook, or "
                "refine_steps"
            )
        if codebook is None and speaker:
            raise ValueError(f"codec.options: speaker={speaker} has no effect without a codebook and its vocoder")
        for name, steps in (("refine_steps", refine_steps), ("spelling_steps", spelling_steps)):
            if steps and codebook is not None:
                raise ValueError(f"codec.options: {name}={steps} has no effect with a codebook")
        if spelling_steps and texts is None:
            raise ValueError(
                f"codec.options: spelling_steps={spelling_steps} needs the texts of the sounds: let the tower be "
                "pre-trained with training.ctc, which names the task that they are taken from"
            )
        if normalize is None:
            normalize = _normalizes(source, revision, **hub)
        centroids = None if codebook is None else read_codebook(codebook, source, revision, **hub)
        size = len(centroids) if centroids is not None else 500 if units is None else units
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(f"hubert-units: units must be a whole number of at least 2, got {size!r}")
        placed = IdLayout(units=size, offset=offset, bos=bos, eos=eos, pad=pad)
        speaks = says = sounds = decoder = projection = None
        if vocoder is not None and codebook is not None:
            speaks = UnitVocoder.load(vocoder, revision=vocoder_revision, speaker=speaker, **hub)
        elif vocoder is not None:
            says = MelVocoder.load(vocoder, revision=vocoder_revision, **hub)
        model, at = open_model(EncoderModel, ModelSource(source=source, revision=revision, hub=hub))
        encoder = speech_encoder(model, normalize=normalize, window=window)
        if isinstance(encoder, MelEncoder):
            _check_preprocessor(encoder, source, revision, **hub)
        _check_layer(encoder, layer)
        pool = pool_of(rate, encoder)
        config = HubertUnitsConfig(layer=layer, normalize=normalize, deduplicate=deduplicate, pool=pool, window=window)
        if refine_steps and (encoder.stride * pool) % HOP:
            raise ValueError("codec.options: refine_steps has no effect: a unit does not last whole frames of 10 ms")
        if centroids is None:
            fitted = FittedUnits(values, encoder, layer, pool, size, seed, says, texts, spelling_steps)
            centroids, sounds, projection = fitted.centroids, fitted.sounds, fitted.projection
            if refine_steps:
                decoder = fitted.decoder(refine_steps, width, seed)
        return cls(
            model,
            at,
            config,
            centroids,
            layout=placed,
            vocoder=speaks,
            sounds=sounds,
            decoder=decoder,
            projection=projection,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes the encoder goes by name: a weight-normed one cannot be pickled."""
        parts: dict[str, Any] = {
            "layout": self.layout,
            "vocoder": self.vocoder,
            "sounds": self.sounds,
            "decoder": self.decoder,
            "projection": self.projection,
        }
        return partial(self._open, **parts), (self.at, self.config, self.codebook)

    @classmethod
    def _open(cls, at: ModelSource, config: HubertUnitsConfig, codebook: Tensor, **parts: Any) -> HubertUnits:
        model, at = open_model(EncoderModel, at)
        return cls(model, at, config, codebook, **parts)

    def fit_decoder(
        self,
        waves: Iterable[Any],
        steps: int,
        width: int = 160,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
        vocoder: MelVocoder | None = None,
    ) -> None:
        """Train a decoder for units that were fitted on sound, in place of the one that there is: no id changes.

        Args:
            waves: sounds, whatever `read_audio` reads: those that the units were fitted on, or others of such voices.
            steps: at least 1. width: channels. seed: of weights and order.
            progress: called as ``progress(step, steps, loss)``. vocoder: that speaks what the decoder writes.

        Raises:
            ValueError: if the units have no sounds, a sound cannot be read, or a setting is out of range.
        """
        check_training(steps, width)
        sounds = [read_sound(wave) for wave in waves]
        if self.sounds is None or not steps or not sounds:
            raise ValueError(
                "hubert-units: a decoder needs units that were fitted on sound, sounds, and at least 1 step; "
                f"got {'no ' if self.sounds is None else ''}units, {len(sounds)} sounds, steps={steps}"
            )
        rows = [row for start in range(0, len(sounds), BATCH) for row in self._units(sounds[start : start + BATCH])]
        frames = [unit_frames(wave, len(row), self._unit_samples, vocoder) for wave, row in zip(sounds, rows)]
        self.decoder = unit_decoder(rows, frames, self.sounds, steps, width, seed, progress, vocoder)

    @property
    def _unit_samples(self) -> int:
        return self.encoder.stride * self.config.pool

    def _units(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        """Units, long [time] each, of waves at 16 kHz."""
        pool, project = self.config.pool, self.projection
        found = features(waves, self.encoder, self.config.layer, pool)
        vectors = [pooled(row, pool) if project is None else project.units(row) for row in found]
        return [nearest(each, self.codebook) for each in vectors]


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


def _check_layer(encoder: SpeechEncoder, layer: int) -> None:
    if layer > encoder.depth:
        name = type(encoder.model).__name__
        raise ValueError(f"hubert-units: layer={layer}, but {name} has layers 1 to {encoder.depth}")


def _check_preprocessor(encoder: MelEncoder, source: str, revision: str | None, **hub: Any) -> None:
    """Raise `ValueError` unless the checkpoint says how its log-mel frames are made, and they are those made here."""
    try:
        said, _ = WhisperFeatureExtractor.get_feature_extractor_dict(source, revision=revision or "main", **hub)
    except OSError as error:
        raise ValueError(
            f"codec.source {source!r}: has no {FEATURE_EXTRACTOR_NAME}, which says what log-mel frames it takes"
        ) from error
    made = encoder.prepare
    for name in ("feature_size", "sampling_rate", "hop_length", "n_fft"):
        if (found := said.get(name, getattr(made, name))) != (here := getattr(made, name)):
            raise ValueError(f"codec.source {source!r}: {FEATURE_EXTRACTOR_NAME} has {name}={found}, must be {here}")


def _check_vocoder(vocoder: UnitVocoder, units: int, rate: float, deduplicate: bool) -> None:
    if vocoder.units < units:
        raise ValueError(f"hubert-units: the vocoder knows {vocoder.units} units, the codebook has {units}")
    if deduplicate and not vocoder.durations:
        raise ValueError("hubert-units: deduplicate=true, but the vocoder has no duration predictor")
    if not deduplicate and vocoder.rate != rate:
        raise ValueError(
            f"hubert-units: the vocoder speaks {vocoder.rate:g} units a second, the encoder gives {rate:g}"
        )

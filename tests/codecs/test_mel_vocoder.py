"""Vocoders of log-mel frames: small random ones of the classes that users load, and decoders that write for them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    FastSpeech2ConformerHifiGan,
    FastSpeech2ConformerHifiGanConfig,
    SpeechT5FeatureExtractor,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    UnivNetConfig,
    UnivNetFeatureExtractor,
    UnivNetModel,
)

from tests.codecs.test_hubert_units import LAYER, encoder
from tests.codecs.test_speech import WAVES, voice
from tests.codecs.test_unit_vocoder import network, published
from zipper_lm.codecs.codec import codec_hash, load_codec, make_codec
from zipper_lm.codecs.mel import normalise_loudness
from zipper_lm.codecs.mel_vocoder import MelVocoder
from zipper_lm.codecs.speech import SpeechCodec

SMALL = {"upsample_initial_channel": 16, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]]}
KINDS = ["hifigan", "univnet"]


def hifigan(**changes: Any) -> SpeechT5HifiGan:
    torch.manual_seed(0)
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**SMALL | changes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def univnet() -> UnivNetModel:
    torch.manual_seed(0)
    sizes = {"model_in_channels": 4, "model_hidden_channels": 4, "kernel_predictor_hidden_channels": 4}
    return UnivNetModel(UnivNetConfig(**sizes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("vocoders")
    hifigan().save_pretrained(at / "hifigan")  # alone, as it is published
    univnet().save_pretrained(at / "univnet")
    UnivNetFeatureExtractor(do_normalize=True).save_pretrained(at / "univnet")
    return at


def wanted(kind: str, wave: np.ndarray) -> tuple[Any, np.ndarray]:
    """What the extractor itself makes of a wave at its rate."""
    if kind == "hifigan":
        made = SpeechT5FeatureExtractor()(audio_target=wave, sampling_rate=16_000)
        return made, made["input_values"][0]
    extractor = UnivNetFeatureExtractor(do_normalize=True)
    return extractor, extractor.normalize(extractor.mel_spectrogram(wave))


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_given_the_frames_that_its_extractor_makes(folders: Path, kind: str) -> None:
    vocoder = MelVocoder.load(folders / kind)
    wave = torch.from_numpy(voice(3))
    mel = vocoder.frames(wave, 200)
    assert mel.shape == (200, 80 if kind == "hifigan" else 100)
    given = vocoder.spaced(mel).numpy()
    if kind == "hifigan":
        _, own = wanted(kind, wave.numpy())
    else:
        from scipy.signal import resample_poly

        _, own = wanted(kind, resample_poly(wave.numpy(), 3, 2))
    assert abs(len(given) - len(own)) <= 1
    given, own = given[:120], own[:120]
    assert np.abs(given - own).mean() < 0.06 * np.abs(own[1:] - own[:-1]).mean() + 0.03 * own.std()
    if kind == "hifigan":  # each fifth of 16 ms is an eighth of 10
        np.testing.assert_allclose(given[::5], own[::5], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_is_as_long_as_the_frames_and_the_same_each_time(folders: Path, kind: str) -> None:
    vocoder = MelVocoder.load(folders / kind)
    for count in (1, 4, 55):
        mel = vocoder.frames(torch.from_numpy(voice(3)), count)
        sound = vocoder(mel)
        assert (sound.shape, sound.dtype) == ((160 * count,), np.float32)
        assert np.abs(sound).max() <= 1
        np.testing.assert_array_equal(sound, vocoder(mel))
    assert sound.std() > 0
    assert len(vocoder(mel[:0])) == 0


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("hubert")
    encoder().save_pretrained(at)
    return at


def made(codec: str, hubert: Path, values: Any = WAVES, **options: Any) -> Any:
    if codec == "speech":
        return make_codec("speech", values, units=32, width=24, **options)
    return make_codec("speech-units", values, source=str(hubert), layer=LAYER, units=32, rate=25, width=16, **options)


@pytest.mark.parametrize(("codec", "kind"), [("speech", "hifigan"), ("units", "hifigan"), ("speech", "univnet")])
def test_a_decoder_writes_for_the_vocoder(folders: Path, hubert: Path, tmp_path: Path, codec: str, kind: str) -> None:
    """Both codecs: no id changes, the decoder comes nearer to the vocoder's own frames than look-up, and the saved
    codec needs nothing beside it."""
    spoken = made(codec, hubert, refine_steps=60, vocoder=str(folders / kind))
    plain = made(codec, hubert)
    ids = spoken.encode(WAVES)
    assert ids == plain.encode(WAVES)
    assert codec_hash(spoken) == codec_hash(plain)
    decoder, vocoder = spoken.decoder, spoken.decoder.vocoder
    units = torch.tensor(ids[0])
    frames = decoder.frames(units, torch.zeros(0))
    error = {"frames": 0.0, "looked up": 0.0}
    for wave, row in zip(WAVES, ids):
        found = {"frames": decoder.frames(torch.tensor(row), torch.zeros(0))}
        found["looked up"] = decoder.mels[row].reshape(-1, vocoder.bands)
        goal = vocoder.frames(normalise_loudness(torch.from_numpy(wave)), len(found["frames"]))
        error = {way: error[way] + float((mel - goal).abs().mean()) for way, mel in found.items()}
    assert error["frames"] < error["looked up"]
    sounds = spoken.decode([*ids[:1], []])
    np.testing.assert_array_equal(sounds[0], vocoder(frames))
    assert len(sounds[1]) == 0
    spoken.save_pretrained(tmp_path)
    names = {str(file.relative_to(tmp_path / "decoder")) for file in (tmp_path / "decoder").rglob("*.*")}
    assert names == {"config.json", "model.safetensors"} | {
        f"vocoder/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")
    }
    for again in (load_codec(tmp_path), pickle.loads(pickle.dumps(spoken))):
        assert again.encode(WAVES[:1]) == ids[:1]
        np.testing.assert_array_equal(again.decode(ids[:1])[0], sounds[0])


@pytest.mark.parametrize("codec", ["speech", "units"])
def test_units_that_there_are_can_have_one(folders: Path, hubert: Path, codec: str) -> None:
    plain = made(codec, hubert, values=WAVES[:2])
    before, digest = plain.encode(WAVES[:1]), codec_hash(plain)
    plain.fit_decoder(WAVES[:2], 2, width=4, vocoder=MelVocoder.load(folders / "hifigan"))
    assert (plain.encode(WAVES[:1]), codec_hash(plain)) == (before, digest)
    assert plain.decoder.config.vocoder
    plain.fit_decoder(WAVES[:2], 2, width=4)
    assert not plain.decoder.config.vocoder


def test_on_a_device(folders: Path, hubert: Path) -> None:
    codec = made("units", hubert, refine_steps=1, vocoder=str(folders / "hifigan"))
    codec.to("meta")
    assert {p.device.type for p in codec.decoder.vocoder.model.parameters()} == {"meta"}


def test_vocoders_that_do_not_do(folders: Path, hubert: Path, tmp_path: Path) -> None:
    """Each is refused before any sound is read, by name."""
    small: Any = {"upsample_initial_channel": 16}
    hifigan(model_in_dim=64).save_pretrained(tmp_path / "bands")
    hifigan(sampling_rate=22_050).save_pretrained(tmp_path / "rate")
    hifigan(upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[9, 8, 8, 4]).save_pretrained(tmp_path / "step")
    FastSpeech2ConformerHifiGan(FastSpeech2ConformerHifiGanConfig(**small)).save_pretrained(tmp_path / "other")
    hifigan().save_pretrained(tmp_path / "mixed")
    UnivNetFeatureExtractor().save_pretrained(tmp_path / "mixed")
    hifigan().save_pretrained(tmp_path / "lacking")
    weights = tmp_path / "lacking" / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "mean"}, weights, {"format": "pt"})
    hifigan().save_pretrained(tmp_path / "huge")
    (tmp_path / "huge" / "preprocessor_config.json").write_text(json.dumps({"win_length": 10**12}))
    published(network(), tmp_path / "units")
    for name, content in (("none", None), ("list", [{}]), ("lists", {"architectures": [["UnivNetModel"]]})):
        (tmp_path / name).mkdir()  # a list was a traceback
        if content is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(content))

    def unread() -> Any:
        raise AssertionError("read")
        yield

    for name, words in (
        ("bands", r"takes log-mel frames of 64 bands, .* makes them of 80: a preprocessor_config\.json beside it must"),
        ("rate", "of 22050 samples a second, .* makes them of 16000"),
        ("step", "of 160 samples from one to the next, .* makes them of 256"),
        ("other", "is FastSpeech2ConformerHifiGan, must be SpeechT5HifiGan or UnivNetModel"),
        ("units", "is nothing of transformers, must be SpeechT5HifiGan or UnivNetModel"),
        ("mixed", "is of a UnivNetFeatureExtractor, must be of a SpeechT5FeatureExtractor"),
        ("lacking", r"lacks 1 tensors of SpeechT5HifiGan, such as \['mean'\]"),
        ("huge", "win_length must be from 1 to 16384, got 1000000000000"),
        ("none", r"there is no config\.json"),
        ("list", r"list/config\.json: must hold a"),
        ("lists", "is nothing of transformers"),
        ("nobody/nothing", "cache does not have it"),
    ):
        source = str(tmp_path / name) if "/" not in name else name
        for codec in ("speech", "units"):
            with pytest.raises(ValueError, match=words):
                made(codec, hubert, values=unread(), refine_steps=1, vocoder=source)


def test_options_without_an_effect(folders: Path, hubert: Path) -> None:
    vocoder = str(folders / "hifigan")
    for codec, options, words in (
        ("speech", {"vocoder": vocoder}, "a vocoder speaks what a decoder writes: give refine_steps"),
        ("speech", {"vocoder_revision": "v1"}, r"\['vocoder_revision'\] have no effect without a vocoder"),
        ("speech", {"token": "x"}, r"\['token'\] have no effect without a vocoder"),
        ("units", {"vocoder": vocoder}, "give codebook, or refine_steps"),
        ("units", {"vocoder": vocoder, "refine_steps": 1, "speaker": 1}, "speaker=1 has no effect"),
    ):
        with pytest.raises(ValueError, match=words):
            made(codec, hubert, **options)
    with pytest.raises(ValueError, match="refine_steps must be at least 1"):
        SpeechCodec.fit(WAVES, units=8, vocoder=MelVocoder.load(vocoder))


def test_a_saved_decoder_is_held_against_its_vocoder(folders: Path, hubert: Path, tmp_path: Path) -> None:
    made("speech", hubert, values=WAVES[:2], refine_steps=1, vocoder=str(folders / "hifigan")).save_pretrained(tmp_path)
    file = tmp_path / "decoder" / "config.json"
    said = json.loads(file.read_text())
    for change, words in (
        ({"vocoder": False}, "need a vocoder"),
        ({"vocoder": 1}, "vocoder must be true or false, got 1"),
        ({"bands": 100}, "the config asks for"),
        ({"low": 5.0}, "low and high must be rising numbers"),
        ({"high": float("nan")}, "low and high must be rising numbers"),
        ({"high": "x"}, "low and high must be rising numbers"),
    ):
        file.write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=words):
            load_codec(tmp_path)
    file.write_text(json.dumps(said))
    univnet().save_pretrained(tmp_path / "decoder" / "vocoder")
    (tmp_path / "decoder" / "vocoder" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="bands=80, but the vocoder takes 100"):
        load_codec(tmp_path)

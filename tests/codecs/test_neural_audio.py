"""Neural audio codecs: small random models of the classes that users load, saved and loaded by path."""

from __future__ import annotations

import json
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    HubertModel,
    MimiConfig,
    MimiModel,
    NeuCodecConfig,
    NeuCodecModel,
    PreTrainedModel,
    Wav2Vec2BertConfig,
    Xcodec2Config,
    Xcodec2Model,
    XcodecConfig,
    XcodecModel,
)

from tests.tiny import tiny_backbone
from zipper_lm import ZipperModel
from zipper_lm.codecs import neural_audio
from zipper_lm.codecs.codec import Codec, load_codec, make_codec
from zipper_lm.codecs.neural_audio import NeuralAudioCodec, codes_format

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def _hubert() -> HubertConfig:
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **convolutions
    )


def _xcodec2(config: type, model: type) -> PreTrainedModel:
    semantic = Wav2Vec2BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        feature_projection_input_dim=160,
    )
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 32,
        "encoder_hidden_size": 4,
    }
    quantizer = {"quantization_dim": 80, "quantization_levels": [4, 4, 2]}
    return model(config(semantic_model_config=semantic.to_dict(), **sizes, **quantizer, **HEADS))


def build(family: str) -> PreTrainedModel:
    """A random model whose codes depend on what it hears; 16 or 32 codes in each codebook, frames of 13 to 80 ms."""
    torch.manual_seed(0)
    model = random_model(family)
    for name, codebook in model.named_buffers():
        if name.endswith((".embed", ".embed_sum")):  # zeros in a fresh model
            codebook.normal_()
    for name, parameter in model.named_parameters():  # as they start, signals fade on the way through
        if name.endswith("original0"):  # lengths of weight norm
            torch.nn.init.constant_(parameter, 1.5)
        elif parameter.ndim > 1 and parameter[0].numel() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return model


def random_model(family: str) -> PreTrainedModel:
    if family == "mimi":
        sizes = {"hidden_size": 16, "num_filters": 4, "num_hidden_layers": 1, "intermediate_size": 16, "head_dim": 8}
        books = {
            "codebook_size": 16,
            "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8,
            "upsample_groups": 16,
        }
        return MimiModel(MimiConfig(num_quantizers=4, **sizes, **books, **HEADS))
    if family == "encodec":
        # 75 frames a second of 4 bits are 0.3 kbit/s a codebook
        return EncodecModel(
            EncodecConfig(
                hidden_size=8, num_filters=4, codebook_size=16, target_bandwidths=[0.6, 1.2], num_lstm_layers=1
            )
        )
    if family == "dac":
        sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 32}
        return DacModel(DacConfig(**sizes, n_codebooks=3, codebook_size=16, codebook_dim=4))
    if family == "xcodec":
        acoustic = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "hidden_size": 16}
        return XcodecModel(
            XcodecConfig(
                acoustic_model_config={**acoustic, "downsampling_ratios": [8, 5, 4, 2], "model_type": "dac"},
                semantic_model_config=_hubert().to_dict(),
                codebook_size=16,
                target_bandwidths=[0.25, 0.75],  # 50 frames a second of 4 bits are 0.2 kbit/s a codebook
            )
        )
    if family == "xcodec2":
        return _xcodec2(Xcodec2Config, Xcodec2Model)
    return _xcodec2(NeuCodecConfig, NeuCodecModel)


CODEBOOKS = {"mimi": 4, "encodec": 4, "dac": 3, "xcodec": 3, "xcodec2": 1, "neucodec": 1}
RATES = {"mimi": 12.5, "encodec": 75, "dac": 31.25, "xcodec": 50, "xcodec2": 50, "neucodec": 50}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    at = tmp_path_factory.mktemp("models")
    for family in CODEBOOKS:
        build(family).save_pretrained(at / family)
    return {family: str(at / family) for family in CODEBOOKS}


def sound(seconds: float = 0.5, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(int(seconds * rate))
    return (0.1 * noise).astype(np.float32)


@lru_cache
def _made(source: str, **options: Any) -> NeuralAudioCodec:
    codec = make_codec("neural-audio", source=source, **options)
    assert isinstance(codec, NeuralAudioCodec)
    return codec


def made(folders: dict[str, str], family: str, **options: Any) -> NeuralAudioCodec:
    return _made(folders[family], **options)


@pytest.mark.parametrize("family", CODEBOOKS)
def test_sound_to_ids_and_back(folders: dict[str, str], family: str) -> None:
    codec = made(folders, family)
    assert isinstance(codec, Codec)
    books = CODEBOOKS[family]
    assert (codec.codebooks, codec.rate) == (books, pytest.approx(books * RATES[family]))
    (ids,) = codec.encode([sound(0.5)])
    frames = len(ids) / books
    assert frames == int(frames)
    assert abs(frames - 0.5 * RATES[family]) <= 1
    size = codec.format.size
    assert [i // size for i in ids] == list(range(books)) * int(frames)
    assert max(ids) < codec.bos_id < codec.vocab_size == books * size + 3
    assert len(set(ids)) > books
    (wave,) = codec.decode([ids])
    assert wave.dtype == np.float32
    assert np.abs(wave).max() <= 1
    assert len(wave) / 16_000 == pytest.approx(frames / RATES[family], abs=0.03)


@pytest.mark.parametrize("family", CODEBOOKS)
def test_codes_and_sound_are_the_models_own(folders: dict[str, str], family: str) -> None:
    codec = made(folders, family)
    codes = torch.randint(codec.format.size, (codec.codebooks, 7), generator=torch.Generator().manual_seed(1))
    ids = codec.from_codes(codes)
    assert torch.equal(codec.to_codes(ids), codes)
    (wave,) = codec.decode([ids])
    model: Any = codec.model
    with torch.no_grad():
        if family == "encodec":
            wanted = model.decode(codes[None, None], [None]).audio_values
        else:
            wanted = model.decode(audio_codes=codes[None]).audio_values
    if codec.format.rate_out == 16_000:
        assert np.allclose(wave, wanted.flatten().numpy().clip(-1, 1), atol=1e-6)
    else:
        assert abs(len(wave) - wanted.numel() * 16_000 / codec.format.rate_out) <= 1


@pytest.mark.parametrize("family", ["mimi", "encodec", "dac", "xcodec"])
def test_first_codebooks_are_those_of_all(folders: dict[str, str], family: str) -> None:
    whole, few = made(folders, family), made(folders, family, codebooks=2)
    value = sound()
    all_codes = whole.to_codes(whole.encode([value])[0])
    assert torch.equal(few.to_codes(few.encode([value])[0]), all_codes[:2])
    one = made(folders, family, codebooks=1)
    assert one.rate == pytest.approx(RATES[family])
    assert len(one.decode(one.encode([value]))[0]) == pytest.approx(8000, abs=1500)


@pytest.mark.parametrize("family", CODEBOOKS)
def test_all_of_a_model_that_was_used_goes_to_a_device(folders: dict[str, str], family: str) -> None:
    """Mimi computes its codebooks when they are first used and keeps them where they are then: a codec that had read
    anything on the CPU could read nothing on a GPU. Here the model goes to the device without data."""
    codec = make_codec("neural-audio", source=folders[family])
    assert isinstance(codec, NeuralAudioCodec)
    codec.encode([sound()])
    model: Any = codec.to("meta").model
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert bool(kept) == (family == "mimi")
    assert {t.device.type for t in (*model.parameters(), *model.buffers(), *kept)} == {"meta"}


@pytest.mark.parametrize("family", CODEBOOKS)
@pytest.mark.parametrize("samples", [1, 161, 640])
def test_short_sounds(folders: dict[str, str], family: str, samples: int) -> None:
    codec = made(folders, family)
    ids = codec.encode([sound()[:samples]])
    assert len(ids[0]) >= codec.codebooks
    assert len(codec.decode(ids)[0]) > 0


def test_batches_give_what_single_sounds_give(folders: dict[str, str]) -> None:
    codec = made(folders, "xcodec")
    values = [sound(0.3), sound(0.71, seed=1)]
    assert codec.encode(values) == [codec.encode([v])[0] for v in values]


def test_rates_and_channels(folders: dict[str, str], tmp_path: Path) -> None:
    """A file is read at the model's rate at once; a bare array is at 16 kHz whatever the model's rate."""
    codec = made(folders, "mimi")
    wave = sound(0.4, 24_000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, wave], 1), 24_000, subtype="FLOAT")
    assert codec.encode([tmp_path / "stereo.wav"]) == codec.encode([(wave, 24_000)])
    plain = sound(0.4)
    assert codec.encode([plain]) == codec.encode([(plain, 16_000)]) == codec.encode([torch.from_numpy(plain)])
    assert len(codec.encode([plain])[0]) == 5 * 4


def test_semantic_features_have_a_vector_for_each_frame(folders: dict[str, str]) -> None:
    """X-Codec 2 adds the features of both its encoders: they must be equally many, however long the sound."""
    for family in ("xcodec2", "neucodec"):
        codec = made(folders, family)
        counts = [len(codec.encode([sound()[:n]])[0]) for n in range(3199, 3203)]
        assert counts == ([10, 11, 11, 11] if family == "xcodec2" else [9, 10, 10, 10])


def test_rows_out_of_order_keep_their_whole_frames(folders: dict[str, str]) -> None:
    codec = made(folders, "dac")
    size = codec.format.size
    a, b, c = 1, size + 2, 2 * size + 3
    frame = [[1], [2], [3]]
    assert codec.to_codes([a, b, c]).tolist() == frame
    for row in (
        [9, a, b, c],
        [9, size + 9, a, b, c],
        [b, c, a, b, c],
        [a, a, b, c],
        [a, b, b, c],
        [a, c, b, c],
        [a, b, c, a, b],
        [a, b, a, b, c, c],
    ):
        assert codec.to_codes(row).tolist() == frame, row
    assert codec.to_codes([c, b]).shape == (3, 0)
    assert [len(w) for w in codec.decode([[], [a]])] == [0, 0]
    with pytest.raises(ValueError, match=r"row 1: id 48 is no unit's"):
        codec.decode([[a], [codec.bos_id]])


def test_layout(folders: dict[str, str]) -> None:
    codec, moved = made(folders, "dac"), made(folders, "dac", offset=10, bos=0, eos=1, pad=1)
    value = sound()
    assert moved.encode([value]) == [[i + 10 for i in codec.encode([value])[0]]]
    assert (moved.bos_id, moved.eos_id, moved.pad_id, moved.vocab_size) == (0, 1, 1, 58)
    assert np.array_equal(moved.decode(moved.encode([value]))[0], codec.decode(codec.encode([value]))[0])


@pytest.mark.parametrize("family", CODEBOOKS)
def test_saved_and_loaded(folders: dict[str, str], family: str, tmp_path: Path) -> None:
    codec = made(folders, family, codebooks=1, offset=3)
    for _ in range(2):  # the second time over what is there
        codec.save_pretrained(tmp_path / "codec")
    assert sorted(f.name for f in (tmp_path / "codec").iterdir()) == ["codec.json", "model"]
    loaded = load_codec(tmp_path / "codec")
    value = sound()
    ids = codec.encode([value])
    assert loaded.encode([value]) == ids
    assert np.array_equal(loaded.decode(ids)[0], codec.decode(ids)[0])
    assert (loaded.vocab_size, loaded.rate) == (codec.vocab_size, codec.rate)


def test_goes_to_other_processes(folders: dict[str, str]) -> None:
    """With several processes, training makes a codec once and hands it to all."""
    codec = made(folders, "encodec", codebooks=2, offset=3)  # weight norm: the model itself cannot be pickled
    assert pickle.loads(pickle.dumps(codec)).encode([sound()]) == codec.encode([sound()])


def test_damaged_folders_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    made(folders, "dac").save_pretrained(tmp_path)
    other = build("dac")
    torch.nn.init.ones_(other.encoder.conv1.weight)
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="other weights than when the codec was saved"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({"kind": "neural-audio"}))
    with pytest.raises(ValueError, match=r"neural-audio codec .*model"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({"kind": "text"}))
    with pytest.raises(ValueError, match="kind is not 'neural-audio'"):
        NeuralAudioCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codebooks": 5}, "codebooks must be from 1 to 3, got 5"),
        ({"codebooks": 0}, "codebooks must be from 1 to 3, got 0"),
        ({"codebooks": True}, "codebooks must be from 1 to 3, got True"),
        ({"eos": 7}, "eos=7 must lie outside of the units"),
        ({"colour": 1}, "codec.options: .*colour"),
    ],
)
def test_bad_options(folders: dict[str, str], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_codec("neural-audio", source=folders["dac"], **options)


def test_sources_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.source: neural-audio needs"):
        make_codec("neural-audio")
    with pytest.raises(ValueError, match=r"'nobody/nothing': .*cache does not have it"):
        make_codec("neural-audio", source="nobody/nothing", revision="v1")
    HubertModel(_hubert()).save_pretrained(tmp_path / "hubert")
    with pytest.raises(ValueError, match="HubertConfig is not the config of a neural audio codec"):
        make_codec("neural-audio", source=str(tmp_path / "hubert"))
    for name, value in (("audio_channels", 2), ("normalize", True), ("chunk_length_s", 1.0)):
        EncodecConfig(**{name: value}).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            make_codec("neural-audio", source=str(tmp_path / name))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills in at random what a checkpoint lacks: the codec gave random codes."""
    build("dac").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("encoder.conv1")}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint lacks 2 tensors of DacModel, such as \['encoder\.conv1\."):
        make_codec("neural-audio", source=str(tmp_path))


def test_what_the_hub_needs_is_passed_on_and_the_token_not_kept(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codec in a recipe took neither a token nor a cache. Another process gets the cache, and no token."""
    codec = make_codec("neural-audio", source=folders["dac"], cache_dir=str(tmp_path), token="hf_secret")
    assert isinstance(codec, NeuralAudioCodec)
    pickled = pickle.dumps(codec)
    assert b"hf_secret" not in pickled
    asked: dict[str, dict[str, Any]] = {}

    def heard(owner: Any) -> Any:
        load, name = owner.from_pretrained, owner.__name__

        def method(*args: Any, **kwargs: Any) -> Any:
            asked.setdefault(name, kwargs)
            return load(*args, **kwargs)

        return method

    for owner in (neural_audio.AutoConfig, neural_audio.AutoModel):
        monkeypatch.setattr(owner, "from_pretrained", heard(owner))
    pickle.loads(pickled)
    assert [given.get("cache_dir") for given in asked.values()] == [str(tmp_path)] * 2
    asked.clear()
    make_codec("neural-audio", source=folders["dac"], local_files_only=True)
    assert [given.get("local_files_only") for given in asked.values()] == [True] * 2


def test_a_frame_is_as_long_as_the_encoders_strides() -> None:
    """The configs of the published DACs at 16 and 24 kHz have the hop_length of the one at 44 kHz, 512: their rate was
    given as 31 and 47 frames a second, where they have 50 and 75."""
    config = DacConfig(sampling_rate=24_000, downsampling_ratios=[2, 4, 5, 8], hop_length=512)
    assert config.hop_length == 512
    assert codes_format(config).hop == 320


def test_a_tower_with_too_few_ids_is_refused(folders: dict[str, str]) -> None:
    codec = made(folders, "dac")
    towers = {"text": tiny_backbone("llama", 31), "speech": tiny_backbone("gpt2", codec.vocab_size - 1)}
    with pytest.raises(ValueError, match="tower 'speech': the codec has 51 ids, the backbone's vocabulary only 50"):
        ZipperModel.fuse(towers, codecs={"speech": codec})

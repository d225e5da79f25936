"""Units of speech encoders: small random models of the classes that users load, saved and loaded by path."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    SEWConfig,
    SEWModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from tests.codecs.test_speech import voice
from tests.codecs.test_unit_vocoder import network, published
from tests.tiny import tiny_backbone
from zipper_lm import ZipperModel, ZipperProcessor
from zipper_lm.codecs import codebook, hubert_units, pretrained, unit_vocoder
from zipper_lm.codecs.codec import Codec, can_decode, codec_hash, load_codec, make_codec
from zipper_lm.codecs.hubert_units import HubertUnits
from zipper_lm.codecs.kmeans import nearest
from zipper_lm.codecs.mel import log_mel, normalise_loudness
from zipper_lm.codecs.speech_encoder import features
from zipper_lm.data.collation import Specials
from zipper_lm.utils import known_hashes

FAMILIES: dict[str, Any] = {
    "hubert": (HubertConfig, HubertModel),
    "wavlm": (WavLMConfig, WavLMModel),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
}
WIDTH, UNITS, LAYER = 16, 12, 2


def encoder(family: str = "hubert", **changes: Any) -> PreTrainedModel:
    """A random encoder: 3 layers, one vector for 20 ms."""
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return model(config(**{**sizes, **convolutions, **changes})).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoders, and codebooks in all forms inside the first of them."""
    at = tmp_path_factory.mktemp("encoders")
    for family in FAMILIES:
        encoder(family).save_pretrained(at / family)
        Wav2Vec2FeatureExtractor(do_normalize=family == "hubert").save_pretrained(at / family)
    with torch.no_grad():  # centroids that are features of some sound, so that all of them are used
        heard = [encoder(f)(torch.from_numpy(voice(9))[None], output_hidden_states=True) for f in FAMILIES]
    drawn = torch.Generator().manual_seed(0)
    for family, output in zip(FAMILIES, heard):
        features = output.hidden_states[LAYER][0]
        centroids = features[torch.randperm(len(features), generator=drawn)[:UNITS]].clone()
        np.save(at / family / "km.npy", centroids.numpy())
    save_file({"centroids": torch.from_numpy(np.load(at / "hubert" / "km.npy"))}, at / "hubert" / "km.safetensors")
    torch.save(torch.from_numpy(np.load(at / "hubert" / "km.npy")), at / "hubert" / "km.pt")
    return at


def made(source: Path, family: str = "hubert", values: Any = (), **options: Any) -> HubertUnits:
    codec = make_codec("hubert-units", values, source=str(source / family), **{"layer": LAYER, **options})
    assert isinstance(codec, HubertUnits)
    return codec


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_the_nearest_centroids_of_the_layers_features(source: Path, family: str) -> None:
    codec = made(source, family, codebook="km.npy")
    assert isinstance(codec, Codec)
    assert (codec.rate, codec.vocab_size, codec.bos_id) == (50, UNITS + 3, UNITS)
    wave = voice(1)
    (ids,) = codec.encode([wave])
    normal = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7) if family == "hubert" else wave
    with torch.no_grad():
        output = encoder(family)(torch.from_numpy(normal)[None], output_hidden_states=True)
    centroids = np.load(source / family / "km.npy")
    distances = ((output.hidden_states[LAYER][0].numpy()[:, None] - centroids) ** 2).sum(2)
    assert ids == distances.argmin(1).tolist()
    assert len(set(ids)) > 3
    assert len(ids) == (len(wave) - 400) // 320 + 1


def test_normalisation_is_the_preprocessors_unless_it_is_said(source: Path, tmp_path: Path) -> None:
    assert made(source, codebook="km.npy").config.normalize
    assert not made(source, codebook="km.npy", normalize=False).config.normalize
    encoder().save_pretrained(tmp_path / "bare")
    codebook = str(source / "hubert" / "km.npy")
    assert not made(tmp_path, "bare", codebook=codebook).config.normalize
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="takes sound at 8000 Hz"):
        made(tmp_path, "bare", codebook=codebook)


def test_batches_of_ragged_length_give_what_single_sounds_give(source: Path) -> None:
    codec = made(source, codebook="km.npy")
    values = [voice(1), voice(2, 0.5), voice(3, 1.0)[:4321]]
    assert codec.encode(values) == [codec.encode([v])[0] for v in values]


def test_short_stereo_and_other_rates(source: Path, tmp_path: Path) -> None:
    codec = made(source, codebook="km.npy")
    assert [len(row) for row in codec.encode([voice(1)[:n] for n in (1, 399, 400, 719, 720)])] == [1, 1, 1, 1, 2]
    wave = np.repeat(voice(1), 3)  # one second at 48 kHz
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, wave], 1), 48_000, subtype="FLOAT")
    assert codec.encode([tmp_path / "stereo.wav"]) == codec.encode([(wave, 48_000)])


def test_runs_become_one(source: Path) -> None:
    plain, single = made(source, codebook="km.npy"), made(source, codebook="km.npy", deduplicate=True)
    (all_units,), (once,) = plain.encode([voice(1)]), single.encode([voice(1)])
    assert once == [u for n, u in enumerate(all_units) if n == 0 or all_units[n - 1] != u]
    assert len(once) < len(all_units)


@pytest.mark.parametrize("name", ["km.npy", "km.safetensors", "km.pt"])
def test_forms_of_codebooks(source: Path, name: str) -> None:
    wanted = made(source, codebook="km.npy").codebook
    assert torch.equal(made(source, codebook=name).codebook, wanted)
    assert torch.equal(made(source, codebook=str(source / "hubert" / name)).codebook, wanted)


def test_codebooks_that_do_not_do(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.zeros((5, WIDTH - 1), np.float32))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(5, np.float32))
    (tmp_path / "km.bin").write_bytes(pickle.dumps(Path("x")))
    torch.save({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.pt")
    for name, words in (
        ("narrow.npy", rf"codebook has shape \[5, 15\], must be \[units, {WIDTH}\]"),
        ("objects.npy", "cannot be read as .*scikit-learn pickled"),
        ("km.bin", "cannot be read as .*scikit-learn pickled"),
        ("flat.npy", "must hold one matrix .*, holds 0"),
        ("two.pt", "must hold one matrix .*, holds 2"),
        ("none.npy", "no such file here nor in"),
    ):
        with pytest.raises(ValueError, match=words):
            made(source, codebook=str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 4}, "layer=4, but HubertModel has layers 1 to 3"),
        ({"layer": -1}, "layer must be a whole number of at least 0, got -1"),
        ({"units": 5}, "units=5 has no effect"),
        ({"pad": 3}, "pad=3 must lie outside of the units"),
        ({"colour": 1}, "codec.options: .*colour"),
        ({"vocoder": "x", "codebook": None}, "speaks the units of a codebook"),
        ({"vocoder": "nobody/nothing"}, "'nobody/nothing'.*cache does not have it"),
    ],
)
def test_bad_options(source: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(source, **{"codebook": "km.npy", **options})


def test_sources_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.source: hubert-units needs"):
        make_codec("hubert-units", layer=1)
    with pytest.raises(ValueError, match=r"codec\.options: .*layer"):
        make_codec("hubert-units", source="x")
    with pytest.raises(ValueError, match=r"'nobody/nothing': .*cache does not have it"):
        make_codec("hubert-units", source="nobody/nothing", revision="v1", layer=1)
    LlamaModel(
        LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="LlamaModel takes no waves"):
        made(tmp_path, "llama", values=[voice(1)])


def test_an_encoder_that_changes_the_rate_between_layers_is_refused(tmp_path: Path) -> None:
    """SEW has half as many features in its layers as its convolutions give: units came out at half the rate that the
    codec told, and pieces of long sounds were joined at wrong places."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": [8] * 7, "conv_stride": [5, *[2] * 6], "conv_kernel": [10, 3, 3, 3, 3, 2, 2]}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    SEWModel(SEWConfig(**sizes, **convolutions, **positions)).save_pretrained(tmp_path / "sew")
    with pytest.raises(ValueError, match="SEWModel gives 49 features after layer 2 where its convolutions give 99"):
        made(tmp_path, "sew", values=[voice(1)], units=8)


def test_without_a_vocoder_there_is_no_way_back(source: Path) -> None:
    codec = made(source, codebook="km.npy")
    assert not can_decode(codec)
    with pytest.raises(ValueError, match="no way back to sound; give the option vocoder"):
        codec.decode([[1, 2]])


@pytest.mark.parametrize("deduplicate", [False, True])
def test_fitted_on_sound(source: Path, tmp_path: Path, deduplicate: bool) -> None:
    waves = [voice(seed) for seed in range(4)]
    codec = made(source, values=waves, units=20, deduplicate=deduplicate, seed=3)
    again = made(source, values=waves, units=20, deduplicate=deduplicate, seed=3)
    ids = codec.encode([waves[0]])
    assert can_decode(codec)
    assert again.encode([waves[0]]) == ids
    assert len(set(ids[0])) > 5
    (sound,) = codec.decode(ids)
    assert np.abs(sound).max() <= 1
    assert sound.std() > 1e-3
    seconds = len(sound) / 16_000
    if deduplicate:  # as long as the runs are on average
        assert seconds == pytest.approx(2.0, rel=0.3)
        assert len(ids[0]) < 0.9 * 99
    else:
        assert seconds == pytest.approx(len(ids[0]) / codec.rate)
    codec.save_pretrained(tmp_path)
    loaded = load_codec(tmp_path)
    assert loaded.encode([waves[0]]) == ids
    assert np.array_equal(loaded.decode(ids)[0], sound)


def test_fitted_sounds_are_those_of_the_unit(source: Path) -> None:
    """A loud and a silent half fall into different units, which sound like it."""
    wave = np.concatenate([voice(1, 1.0), np.zeros(16_000, np.float32)])
    codec = made(source, values=[wave], units=8)
    (ids,) = codec.encode([wave])
    sound = codec.decode([ids])[0]
    half = len(sound) // 2
    assert sound[:half].std() > 10 * sound[half + 1600 :].std()


def test_too_little_sound(source: Path) -> None:
    with pytest.raises(ValueError, match=r"99 vectors are too few for units=100: .*2 s of sound"):
        made(source, values=[voice(1)], units=100)
    with pytest.raises(ValueError, match="0 vectors are too few for units=500"):
        made(source)
    with pytest.raises(ValueError, match="units must be a whole number of at least 2, got 1"):
        made(source, values=[voice(1)], units=1)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_vocoder_speaks_and_is_saved(source: Path, tmp_path: Path, deduplicate: bool) -> None:
    folder = published(network(), tmp_path / "vocoder")
    codec = made(source, codebook="km.npy", vocoder=str(folder), deduplicate=deduplicate, offset=1, pad=0)
    assert can_decode(codec)
    (ids,) = codec.encode([voice(1)])
    (sound,) = codec.decode([ids])
    assert codec.vocoder is not None
    units = [i - 1 for i in ids]
    assert np.array_equal(sound, codec.vocoder(units, deduplicated=deduplicate))
    assert len(codec.decode([[]])[0]) == 0
    with pytest.raises(ValueError, match="row 0: id 0 is no unit's"):
        codec.decode([[0]])
    for _ in range(2):
        codec.save_pretrained(tmp_path / "codec")
    assert sorted(f.name for f in (tmp_path / "codec").iterdir()) == [
        "codec.json",
        "codec.safetensors",
        "model",
        "vocoder",
    ]
    loaded = load_codec(tmp_path / "codec")
    assert (loaded.vocab_size, loaded.pad_id, loaded.rate) == (codec.vocab_size, 0, 50)
    for other in (loaded, pickle.loads(pickle.dumps(codec))):  # with several processes, each gets the codec pickled
        assert other.encode([voice(1)]) == [ids]
        assert np.array_equal(other.decode([ids])[0], sound)


def test_a_processor_takes_encoder_and_vocoder_to_a_device(source: Path, tmp_path: Path) -> None:
    """Everybody's encoders stayed on the CPU. Here they go to the device without data: all but the way back is run."""
    vocoder = str(published(network(), tmp_path / "vocoder"))
    codec = made(source, codebook="km.npy", vocoder=vocoder)
    special = Specials(codec.bos_id, codec.eos_id, codec.pad_id)
    processor = ZipperProcessor({"speech": codec}, {"speech": special, "ids": special}).to("meta")
    assert processor.codecs["speech"] is codec
    assert codec.vocoder is not None
    for model in (codec.model, codec.vocoder.model):
        assert {p.device.type for p in model.parameters()} == {"meta"}
    for run in (lambda: codec.encode([voice(1)]), lambda: codec.decode([[3, 4]])):
        with pytest.raises(NotImplementedError, match="copy out of meta tensor"):
            run()


def test_vocoders_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    few = published(network(units=UNITS - 1), tmp_path / "few")
    with pytest.raises(ValueError, match="the vocoder knows 11 units, the codebook has 12"):
        made(source, codebook="km.npy", vocoder=str(few))
    slow = published(network(), tmp_path / "slow", durations=False, sampling_rate=8000)
    with pytest.raises(ValueError, match="the vocoder speaks 25 units a second, the encoder gives 50"):
        made(source, codebook="km.npy", vocoder=str(slow))
    with pytest.raises(ValueError, match="deduplicate=true, but the vocoder has no duration predictor"):
        made(source, codebook="km.npy", vocoder=str(slow), deduplicate=True)


def test_an_encoder_is_hashed_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loading of a speech codec read the numbers of its encoder a second time."""
    made(source, codebook="km.npy").save_pretrained(tmp_path)
    monkeypatch.setattr(known_hashes, "FRESH", 0.0)
    load_codec(tmp_path)
    monkeypatch.setattr(pretrained, "weights_hash", lambda model: "computed")
    load_codec(tmp_path)
    (tmp_path / "model" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"other weights than when the codec was saved.*computed"):
        load_codec(tmp_path)


def test_damaged_folders_are_refused(source: Path, tmp_path: Path) -> None:
    made(source, codebook="km.npy").save_pretrained(tmp_path)
    encoder(initializer_range=0.5).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="other weights than when the codec was saved"):
        load_codec(tmp_path)
    (tmp_path / "codec.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="hubert-units codec"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({"kind": "hubert-units"}))
    with pytest.raises(ValueError, match="hubert-units codec"):
        load_codec(tmp_path)


def without(folder: Path, *, part: str) -> None:
    """Take the tensors with `part` in their names out of a checkpoint."""
    file = folder / "model.safetensors"
    left = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    assert left.keys() != load_file(file).keys()
    save_file(left, file, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_weights_is_refused(source: Path, tmp_path: Path) -> None:
    """transformers fills in at random what a checkpoint lacks, with a note in its log: the codec gave random units."""
    encoder().save_pretrained(tmp_path / "half")
    without(tmp_path / "half", part="encoder.layers.1.")
    with pytest.raises(
        ValueError, match=r"checkpoint lacks 16 tensors of HubertModel, such as \['encoder\.layers\.1\."
    ):
        made(tmp_path, "half", codebook=str(source / "hubert" / "km.npy"))


def test_a_checkpoint_may_lack_what_only_pre_training_uses(source: Path, tmp_path: Path) -> None:
    """The vector for masked frames was drawn anew on each loading and was in the hash: the codec could neither go to
    another process nor be loaded again, since its weights were "others"."""
    encoder().save_pretrained(tmp_path / "plain")
    without(tmp_path / "plain", part="masked_spec_embed")
    codec = made(tmp_path, "plain", codebook=str(source / "hubert" / "km.npy"), normalize=True)
    ids = made(source, codebook="km.npy").encode([voice(1)])
    codec.save_pretrained(tmp_path / "codec")
    for each in (codec, pickle.loads(pickle.dumps(codec)), load_codec(tmp_path / "codec")):
        assert each.encode([voice(1)]) == ids


def test_a_model_whose_folder_was_moved_is_saved_all_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a model is local was asked only on saving: where the folder was gone by then, or the working folder had
    changed, the saved codec named a path of this machine and had no model."""
    encoder().save_pretrained(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    codec = make_codec("hubert-units", source="here", layer=LAYER, codebook=str(source / "hubert" / "km.npy"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickle.dumps(codec)).encode([voice(1)]) == codec.encode([voice(1)])
    (tmp_path / "here").rename(tmp_path / "there")
    codec.save_pretrained(tmp_path / "codec")
    said = json.loads((tmp_path / "codec" / "codec.json").read_text())["model"]
    assert (said["source"], sorted(said)) == ("model", ["revision", "source", "weights_hash"])
    (tmp_path / "codec").rename(tmp_path / "given")
    again = load_codec(tmp_path / "given")
    (tmp_path / "given").rename(tmp_path / "gone")
    again.save_pretrained(tmp_path / "again")
    assert load_codec(tmp_path / "again").encode([voice(1)]) == codec.encode([voice(1)])


def test_what_the_hub_needs_is_passed_on_and_the_token_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only codecs that were saved took a token or a cache; those in a recipe and the vocoder's revision could not be
    said. A token must not go where a codec is written or pickled."""
    asked: dict[str, Any] = {}

    def heard(what: str, answer: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            asked[what] = {"id": args[0], **kwargs}
            return answer()

        return method

    hubert, folder = source / "hubert", published(network(), tmp_path / "vocoder")
    info: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}
    monkeypatch.setattr(hubert_units, "cached_file", heard("preprocessor", lambda: None))
    monkeypatch.setattr(codebook, "hf_hub_download", heard("codebook", lambda: str(hubert / "km.npy")))
    monkeypatch.setattr(hubert_units.EncoderModel, "from_pretrained", heard("model", lambda: (encoder(), info)))
    monkeypatch.setattr(pretrained.AutoConfig, "from_pretrained", heard("config", lambda: encoder().config))
    monkeypatch.setattr(pretrained, "weight_files", heard("weights", list))
    monkeypatch.setattr(unit_vocoder, "local_folder", heard("vocoder", lambda: folder))
    hub = {"token": "hf_secret", "cache_dir": str(tmp_path), "local_files_only": True}
    codec = make_codec(
        "hubert-units",
        source="me/encoder",
        revision="v1",
        layer=LAYER,
        codebook="km.npy",
        vocoder="you/vocoder",
        **hub,
    )
    assert asked.keys() == {"preprocessor", "codebook", "config", "weights", "model", "vocoder"}
    assert all(hub.items() <= given.items() for given in asked.values())
    assert b"hf_secret" not in pickle.dumps(codec)
    assert "hf_secret" not in repr(vars(codec))
    pickle.loads(pickle.dumps(codec))
    kept = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert kept.items() <= asked["model"].items()
    assert "token" not in asked["model"]
    codec.save_pretrained(tmp_path / "codec")
    assert json.loads((tmp_path / "codec" / "codec.json").read_text())["model"]["source"] == "me/encoder"


def test_the_vocoder_has_a_revision_of_its_own(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from the Hub could not be pinned: the encoder's revision is that of another repository."""

    def load(source: str, *, revision: str | None, **_: Any) -> None:
        raise ValueError(f"asked for {source} at {revision}")

    monkeypatch.setattr(hubert_units.UnitVocoder, "load", load)
    with pytest.raises(ValueError, match="asked for you/vocoder at v2"):
        made(source, codebook="km.npy", vocoder="you/vocoder", vocoder_revision="v2", revision="v1")
    with pytest.raises(ValueError, match="vocoder_revision='v2' has no effect without a vocoder"):
        made(source, codebook="km.npy", vocoder_revision="v2")


def test_a_tower_with_too_few_ids_is_refused(source: Path) -> None:
    codec = made(source, codebook="km.npy")
    towers = {"text": tiny_backbone("llama", 31), "speech": tiny_backbone("gpt2", codec.vocab_size - 1)}
    with pytest.raises(ValueError, match="tower 'speech': the codec has 15 ids, the backbone's vocabulary only 14"):
        ZipperModel.fuse(towers, codecs={"speech": codec})


# -- Whisper ------------------------------------------------------------------------------------------------------


def whisper(**changes: Any) -> WhisperModel:
    """A random one: 3 layers, 50 vectors a second, windows of 30 s."""
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(**{**sizes, **rest, **special, "num_mel_bins": 80, **changes})).eval()


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper's folder, with what says how its log-mel frames are made."""
    at = tmp_path_factory.mktemp("whispers")
    whisper().save_pretrained(at / "whisper")
    WhisperFeatureExtractor().save_pretrained(at / "whisper")
    return at


def listening(heard: Path, **options: Any) -> HubertUnits:
    return made(heard, "whisper", **{"values": [voice(s, 3.0) for s in range(3)], "units": 12, "window": 3, **options})


def test_features_of_a_whole_window_are_the_encoders(heard: Path) -> None:
    """With 30 s nothing is cut: they are what the model itself gives for the sound filled up with silence."""
    codec, wave = listening(heard, window=30, units=None, codebook=str(saved(heard / "book.npy"))), voice(5)
    mels = WhisperFeatureExtractor()(wave, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        wanted = whisper().encoder(mels, output_hidden_states=True).hidden_states[LAYER][0, :100]
    (found,) = features([wave], codec.encoder, LAYER)
    torch.testing.assert_close(found, wanted)
    assert codec.encode([wave]) == [nearest(wanted, codec.codebook).tolist()]
    assert codec.rate == 50


def saved(file: Path) -> Path:
    np.save(file, torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0)).numpy())
    return file


def test_a_cut_window_has_the_first_positions_and_leaves_the_model_whole(heard: Path, tmp_path: Path) -> None:
    codec, wave = listening(heard), voice(5, 3.0)
    own: Any = whisper().encoder
    own.config.max_source_positions = 150
    own.embed_positions = torch.nn.Embedding.from_pretrained(own.embed_positions.weight[:150])
    mels = WhisperFeatureExtractor()(wave, sampling_rate=16_000, max_length=48_000, return_tensors="pt").input_features
    with torch.no_grad():
        wanted = own(mels, output_hidden_states=True).hidden_states[LAYER][0]
    torch.testing.assert_close(features([wave], codec.encoder, LAYER)[0], wanted)
    assert codec.model.config.max_source_positions == 1500
    ids = codec.encode([wave])
    codec.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert names["embed_positions.weight"].shape == (1500, WIDTH)
    assert not [name for name in names if "decoder" in name]
    for again in (load_codec(tmp_path), pickle.loads(pickle.dumps(codec))):
        assert again.encode([wave]) == ids
        assert np.array_equal(again.decode(ids)[0], codec.decode(ids)[0])


@pytest.mark.parametrize(("rate", "pool"), [(None, 1), (25, 2), (12.5, 4), (8.3, 6), (8.33, 6), (8.333, 6), (5, 10)])
def test_units_at_the_rate_that_is_named(heard: Path, rate: float | None, pool: int) -> None:
    codec, wave = listening(heard, rate=rate), voice(5, 2.0)
    assert codec.rate == pytest.approx(50 / pool)
    (ids,) = codec.encode([wave])
    assert len(ids) == math.ceil(2 * 50 / pool)
    silent = np.pad(wave, (0, -len(wave) % (320 * pool)))
    means = features([silent], codec.encoder, LAYER)[0].unflatten(0, (-1, pool)).mean(1)
    assert ids == nearest(means, codec.codebook).tolist()
    assert len(codec.decode([ids])[0]) == len(ids) * pool * 320


@pytest.mark.parametrize("rate", [25, 8.3])
def test_encoders_of_waves_are_pooled_too(source: Path, rate: float) -> None:
    codec = made(source, values=[voice(s) for s in range(4)], units=12, rate=rate)
    (ids,) = codec.encode([voice(9)])
    assert len(ids) == math.ceil(99 / round(50 / rate))
    assert codec.decode([ids])[0].std() > 1e-3


def test_long_sounds_are_cut_into_pieces_that_join(heard: Path, source: Path) -> None:
    """Sounds beyond 120 s were refused. Of each piece the middle is kept, so that no joint hears an edge: a sound of
    noise that begins anew gives the units of its own pieces."""
    for codec in (listening(heard, rate=25), made(source, values=[voice(1)], units=12, window=3)):
        wave = voice(3, 8.0)
        encoder, rows = codec.encoder, features([wave], codec.encoder, LAYER)
        count, step, side = len(rows[0]), encoder.window - 100, 50
        for number, begin in enumerate(range(0, count - encoder.window, step)):
            piece = wave[begin * 320 : (begin + encoder.window - 1) * 320 + encoder.field]
            alone = features([piece], encoder, LAYER)[0]
            first = side if number else 0
            kept = rows[0][begin + first : begin + encoder.window - side]
            torch.testing.assert_close(kept, alone[first : encoder.window - side], rtol=1e-4, atol=1e-5)
        assert len(codec.encode([np.tile(wave, 16)])[0]) >= 128 * codec.rate - 2


def test_sounds_are_encoded_together_as_alone(heard: Path) -> None:
    codec = listening(heard, rate=12.5)
    values = [voice(s, seconds) for s, seconds in enumerate((0.5, 4.0, 2.0, 9.0, 1.0))]
    assert codec.encode(values) == [codec.encode([v])[0] for v in values]
    assert codec.encode([]) == []


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_decoder_comes_with_units_that_are_fitted(heard: Path, tmp_path: Path, deduplicate: bool) -> None:
    waves = [voice(s, 3.0) for s in range(3)]
    codec = listening(heard, rate=12.5, refine_steps=60, width=16, deduplicate=deduplicate)
    plain = listening(heard, rate=12.5, deduplicate=deduplicate)
    ids = codec.encode(waves)
    assert ids == plain.encode(waves)
    assert codec_hash(codec) == codec_hash(plain)
    said, looked_up = codec.decode(ids), plain.decode(ids)
    assert not np.array_equal(said[0], looked_up[0])
    if not deduplicate:
        wanted = [log_mel(normalise_loudness(torch.from_numpy(w))) for w in waves]

        def error(sounds: list[np.ndarray]) -> float:
            return sum(float((log_mel(torch.from_numpy(s))[:300] - w).abs().mean()) for s, w in zip(sounds, wanted))

        assert error(said) < error(looked_up)
    codec.save_pretrained(tmp_path)
    for again in (load_codec(tmp_path), pickle.loads(pickle.dumps(codec))):
        assert np.array_equal(again.decode(ids)[0], said[0])
    plain.fit_decoder(waves, 1, width=4)
    assert plain.decoder is not None


def test_a_projection_goes_with_the_units_that_are_made_of_it(heard: Path, tmp_path: Path) -> None:
    waves, texts = [voice(s, 3.0) for s in range(3)], ["one two", None, "three"]
    codec = listening(heard, rate=25, refine_steps=2, width=4, values=waves, texts=texts, spelling_steps=3)
    assert codec.projection is not None
    assert codec.codebook.shape == (12, codec.projection.config.size)
    ids = codec.encode(waves)
    rows = features(waves, codec.encoder, LAYER, 2)
    assert ids == [nearest(codec.projection.units(row), codec.codebook).tolist() for row in rows]
    plain = listening(heard, rate=25, values=waves)
    assert ids != plain.encode(waves)
    codec.save_pretrained(tmp_path / "codec")
    for again in (load_codec(tmp_path / "codec"), pickle.loads(pickle.dumps(codec))):
        assert again.encode(waves) == ids
        assert np.array_equal(again.decode(ids)[0], codec.decode(ids)[0])
        assert codec_hash(again) == codec_hash(codec)
    before = codec_hash(codec)
    with torch.no_grad():
        codec.projection.out.bias += 1
    assert codec_hash(codec) != before, "what its ids mean depends on it"


def test_no_projection_without_texts_or_with_a_codebook(source: Path) -> None:
    with pytest.raises(ValueError, match=r"spelling_steps=5 needs the texts .* pre-trained with training\.ctc"):
        made(source, values=[voice(1)], spelling_steps=5)
    with pytest.raises(ValueError, match="spelling_steps=5 has no effect with a codebook"):
        made(source, codebook="km.npy", spelling_steps=5)
    with pytest.raises(ValueError, match="spelling_steps must be a whole number of at least 0, got -1"):
        made(source, values=[voice(1)], texts=["one"], spelling_steps=-1)
    with pytest.raises(ValueError, match="codec: 0 texts for 1 values"):
        made(source, values=[voice(1)], texts=[], spelling_steps=1)


def test_no_decoder_without_sounds(source: Path) -> None:
    codec = made(source, codebook="km.npy")
    with pytest.raises(ValueError, match="needs units that were fitted on sound"):
        codec.fit_decoder([voice(1)], 1)
    with pytest.raises(ValueError, match="refine_steps=5 has no effect with a codebook"):
        made(source, codebook="km.npy", refine_steps=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 20}, "rate=20 must divide the encoder's 50 features a second; 25 and 16.67 would be nearest"),
        ({"rate": 9}, "rate=9 must divide .*; 10 and 8.333 would be nearest"),
        ({"rate": 60}, "rate=60 must divide .*; 50 would be nearest"),
        ({"rate": 0.01}, "rate=0.01 must divide .*; 0.3356 would be nearest"),
        ({"rate": 1e-320}, "must divide .*; 0.3356 would be nearest"),
        ({"rate": -1}, "rate must be a positive number of units a second, got -1"),
        ({"rate": "fast"}, "rate must be a positive number of units a second, got 'fast'"),
        ({"window": 2}, "window must be from 3 to 30 seconds, got 2"),
        ({"window": 31}, "window must be from 3 to 30 seconds, got 31"),
        ({"window": True}, "window must be from 3 to 30 seconds, got True"),
        ({"normalize": True}, "normalize=true is for encoders that take waves"),
        ({"layer": 4}, "layer=4, but WhisperEncoder has layers 1 to 3"),
        ({"refine_steps": -1}, "refine_steps must be a whole number of at least 0, got -1"),
        ({"refine_steps": 1, "width": 0}, "width must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options_of_whisper(heard: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        listening(heard, **options)


def test_a_whisper_without_or_with_another_preprocessor(tmp_path: Path) -> None:
    whisper().save_pretrained(tmp_path / "whisper")
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json, which says what log-mel frames"):
        listening(tmp_path)
    for changes, words in (
        ({"feature_size": 128}, "feature_size=128, must be 80"),
        ({"hop_length": 320}, "hop_length=320, must be 160"),
        ({"sampling_rate": 8000}, "takes sound at 8000 Hz, must be 16000"),
    ):
        WhisperFeatureExtractor(**changes).save_pretrained(tmp_path / "whisper")
        with pytest.raises(ValueError, match=words):
            listening(tmp_path)


def test_recipes_may_say_speech_units(heard: Path) -> None:
    codec = make_codec("speech-units", [voice(1, 3.0)], source=str(heard / "whisper"), layer=2, units=12, window=3)
    assert codec.kind == "hubert-units"

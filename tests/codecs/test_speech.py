"""The speech codec, fitted on tones made here."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zipper_lm.codecs import speech
from zipper_lm.codecs.codec import Codec, codec_hash, load_codec, looked_up
from zipper_lm.codecs.mel import log_mel, normalise_loudness
from zipper_lm.codecs.speech import SpeechCodec, SpeechCodecConfig, Unquantiser


def voice(seed, seconds=2.0):
    """A few harmonic "vowels" of random pitch and colour, with pauses."""
    random = np.random.default_rng(seed)
    pieces = []
    for _ in range(int(seconds / 0.25)):
        time = np.arange(3200) / 16_000
        pitch, colour = random.uniform(100, 250), random.uniform(300, 2500)
        harmonics = pitch * np.arange(1, 25)[:, None]
        strength = np.exp(-(((harmonics - colour) / 400) ** 2)) + 0.02
        pieces += [(strength * np.sin(2 * np.pi * harmonics * time)).sum(0) * np.hanning(3200), np.zeros(800)]
    return (0.05 * np.concatenate(pieces)).astype(np.float32)


WAVES = [voice(seed) for seed in range(8)]


@pytest.fixture(scope="module")
def codec():
    return SpeechCodec.fit(WAVES, units=64, refine_steps=120, width=32)


@pytest.fixture(scope="module")
def plain():
    return SpeechCodec.fit(WAVES, units=64, refine_steps=0)


def error(codec, wave):
    (ids,) = codec.encode([wave])
    wanted = log_mel(normalise_loudness(torch.from_numpy(wave)))
    return float((codec.decode_mel(ids)[: len(wanted)] - wanted).abs().mean())


def test_it_is_a_codec(codec):
    assert isinstance(codec, Codec)
    assert codec.kind == "speech"
    assert codec.rate == 25.0
    assert codec.vocab_size == 67
    assert [codec.bos_id, codec.eos_id, codec.pad_id] == [64, 65, 66]


def test_one_unit_for_each_begun_40_ms(codec):
    ids = codec.encode([WAVES[0], WAVES[0][:640], WAVES[0][:641], WAVES[0][:1]])
    assert [len(i) for i in ids] == [50, 1, 2, 1]
    assert all(0 <= i < 64 for row in ids for i in row)
    assert len(set(ids[0])) > 5


def test_a_batch_is_its_rows(codec):
    assert codec.encode(WAVES[:3]) == [codec.encode([w])[0] for w in WAVES[:3]]
    ids = codec.encode(WAVES[:2])
    for together, alone in zip(codec.decode(ids), [codec.decode([i])[0] for i in ids]):
        np.testing.assert_array_equal(together, alone)


def test_sound_comes_back(codec):
    unseen = voice(99)
    (wave,) = codec.decode(codec.encode([unseen]))
    assert wave.dtype == np.float32
    assert wave.shape == unseen.shape
    assert np.abs(wave).max() <= 1.0
    wanted = log_mel(normalise_loudness(torch.from_numpy(unseen)))
    heard = log_mel(normalise_loudness(torch.from_numpy(wave)))
    random = log_mel(normalise_loudness(torch.from_numpy(voice(5))))
    assert (heard - wanted).abs().mean() < 0.5 * (random - wanted).abs().mean()


def test_decoder_comes_nearer_than_centroids(codec, plain):
    unseen = [voice(seed) for seed in range(90, 96)]
    assert sum(error(codec, wave) for wave in unseen) < 0.98 * sum(error(plain, wave) for wave in unseen)


def test_a_decoder_changes_no_id(codec, plain):
    assert codec.encode(WAVES) == plain.encode(WAVES)
    assert codec_hash(codec) == codec_hash(plain)


def test_the_decoder_can_be_put_aside(codec, plain):
    ids = codec.encode(WAVES[:1])
    np.testing.assert_array_equal(looked_up(codec).decode(ids)[0], plain.decode(ids)[0])
    assert codec.decoder is not None
    assert looked_up(plain) is None


def test_a_decoder_for_units_that_there_are(codec, plain, tmp_path):
    """It is as good as one that came with them, and any codec of these units can have it."""
    plain.save_pretrained(tmp_path)
    again = SpeechCodec.from_pretrained(tmp_path)
    again.fit_decoder(WAVES, 120, width=32)
    assert error(again, voice(99)) == pytest.approx(error(codec, voice(99)), rel=1e-3)
    for waves, steps, words in (([], 5, "no sounds"), (WAVES[:1], 0, "steps must be at least 1, got 0")):
        with pytest.raises(ValueError, match=words):
            again.fit_decoder(waves, steps)


def test_a_decoder_is_that_of_its_codec_alone(codec, plain, tmp_path):
    """A codec without one that is written over one with it has none, and another's is refused."""
    codec.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    assert SpeechCodec.from_pretrained(tmp_path).decoder is None
    other = SpeechCodec.fit(WAVES[:2], units=8, refine_steps=1, width=4)
    codec.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    shutil.rmtree(tmp_path / "one" / "decoder")
    shutil.copytree(tmp_path / "other" / "decoder", tmp_path / "one" / "decoder")
    with pytest.raises(ValueError, match=r"decoder/config\.json: units=8, but the codec has 64"):
        load_codec(tmp_path / "one")


def older(width=8):
    """A codec as they were before decoders."""
    config = SpeechCodecConfig(units=16, width=width)
    drawn = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=drawn) for shape in ((16, 80), (20,), (16, 320))]
    return SpeechCodec(config, *tensors, Unquantiser(config))


def test_an_older_codec_is_read_and_can_have_a_decoder(tmp_path):
    codec = older()
    codec.save_pretrained(tmp_path)
    again = load_codec(tmp_path)
    assert torch.equal(again.decode_mel([1, 2, 3]), codec.decode_mel([1, 2, 3]))
    assert not torch.equal(again.decode_mel([1, 2, 3]), codec.mels[[1, 2, 3]].reshape(-1, 80))
    again.fit_decoder(WAVES[:1], 1, width=4)
    again.save_pretrained(tmp_path)
    assert load_codec(tmp_path).unquantiser is None
    with pytest.raises(ValueError, match="can use only one"):
        SpeechCodec(codec.config, codec.centroids, codec.scale, codec.mels, codec.unquantiser, again.decoder)


def test_loudness_and_rate_do_not_change_the_units(codec):
    assert codec.encode([0.1 * WAVES[0]]) == codec.encode([WAVES[0]])
    ids = codec.encode([{"array": WAVES[0], "sampling_rate": 16_000}, (WAVES[0], 16_000)])
    assert ids[0] == ids[1]


def test_averaged_frames_at_50_hz():
    codec = SpeechCodec.fit(WAVES, units=32, frames_per_token=2, reduce="mean", refine_steps=5, width=16)
    assert codec.rate == 50.0
    assert codec.centroids.shape == (32, 20)
    assert codec.mels.shape == (32, 80)
    (ids,) = codec.encode([WAVES[0]])
    assert len(ids) == 100
    assert codec.decode([ids])[0].shape == WAVES[0].shape


def test_progress_is_told():
    told = []
    SpeechCodec.fit(
        WAVES[:2], units=8, refine_steps=3, width=4, progress=lambda step, steps, loss: told.append((step, steps, loss))
    )
    assert [t[:2] for t in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(t[2] > 0 for t in told)


def test_fit_is_repeatable(plain):
    again = SpeechCodec.fit(WAVES, units=64, refine_steps=0)
    assert torch.equal(again.centroids, plain.centroids)


def test_units_hear_what_is_said_more_than_who_says_it():
    """With units of log-mel bands, pitch alone (its harmonics are resolved there) split a vowel into many units, so
    that the demo's model read voices it had never heard much worse than those of its training.
    """
    time = np.arange(16_000) / 16_000

    def vowel(pitch: float, formant: float) -> np.ndarray:
        harmonics = pitch * np.arange(1, int(7000 / pitch))
        strength = np.exp(-np.square((harmonics - formant) / 300)) + 0.01
        return (strength[:, None] * np.sin(2 * np.pi * harmonics[:, None] * time)).sum(0).astype(np.float32)

    formants = np.linspace(500, 2500, 8)
    sounds = [vowel(pitch, formant) for pitch in np.linspace(100, 240, 8) for formant in formants]

    def shared(cepstra: int) -> float:
        """Share of the tokens of an unheard pitch that have the unit of some heard pitch of their own vowel only."""
        codec = SpeechCodec.fit(sounds, units=24, cepstra=cepstra)
        units = [set(row) for row in codec.encode(sounds)]
        own = [set.union(*units[v::8]) for v in range(8)]
        rows = codec.encode([vowel(170.0, f) for f in formants])
        right = [
            sum(u in own[v] and not any(u in own[w] for w in range(8) if w != v) for u in row) / len(row)
            for v, row in enumerate(rows)
        ]
        return float(np.mean(right))

    assert shared(20) > shared(80)


def test_empty_row_is_no_sound(codec):
    (wave,) = codec.decode([[]])
    assert wave.shape == (0,)
    assert wave.dtype == np.float32


@pytest.mark.parametrize("bad", [-1, 64, 66])
def test_ids_out_of_range_are_refused(codec, bad):
    with pytest.raises(ValueError, match=rf"row 1: id {bad} is not in \[0, 64\)"):
        codec.decode([[0], [3, bad]])


@pytest.mark.parametrize(("reduce", "frames_per_token"), [("stack", 4), ("mean", 3)])
def test_a_long_sound_is_read_in_pieces_that_give_its_units(monkeypatch, reduce, frames_per_token):
    """Sounds of more than 120 s were refused. In pieces, whose seams are anywhere, each unit is that of the whole."""
    codec = SpeechCodec.fit(WAVES, units=32, reduce=reduce, frames_per_token=frames_per_token)
    wave = voice(77, 9.0)[:-100]
    (whole,) = codec.encode([wave])
    assert len(whole) == -(-len(wave) // (160 * frames_per_token))
    for piece in (1, 10, 100, 333):
        monkeypatch.setattr(speech, "PIECE", piece)
        assert codec.encode([wave]) == [whole]
    monkeypatch.undo()
    long = np.tile(WAVES[0], 70)  # 140 s, the seam lies within
    (units,) = codec.encode([long])
    assert len(units) == -(-len(long) // (160 * frames_per_token))
    monkeypatch.setattr(speech, "PIECE", 10**6)
    assert codec.encode([long]) == [units]


def test_bad_sound_is_refused(codec):
    with pytest.raises(ValueError, match="NaN"):
        codec.encode([np.array([0.0, np.nan], np.float32)])


def test_too_little_sound_is_refused():
    with pytest.raises(ValueError, match=r"50 vectors are too few for units=64: at least 64 \(3 s"):
        SpeechCodec.fit(WAVES[:1], units=64)


@pytest.mark.parametrize(
    "setting",
    [
        {"units": 1},
        {"frames_per_token": 0},
        {"reduce": "max"},
        {"cepstra": 0},
        {"cepstra": 81},
        {"whitening": 1.5},
        {"refine_steps": -1},
        {"width": -1, "refine_steps": 1},
    ],
)
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SpeechCodec.fit([], **setting)


@pytest.mark.parametrize("which", ["codec", "plain"])
def test_saved_codec_is_the_same(which, request, tmp_path):
    codec = request.getfixturevalue(which)
    codec.save_pretrained(tmp_path / "new")
    assert all(f.stat().st_mode & 0o044 for f in (tmp_path / "new").iterdir())
    own = {"decoder"} if which == "codec" else set()
    assert {f.name for f in (tmp_path / "new").iterdir()} == {"codec.json", "codec.safetensors", *own}
    ids = codec.encode(WAVES)
    for again in (SpeechCodec.from_pretrained(tmp_path / "new"), load_codec(tmp_path / "new")):
        assert again.config == codec.config
        assert again.encode(WAVES) == ids
        np.testing.assert_array_equal(again.decode(ids[:1])[0], codec.decode(ids[:1])[0])


def test_damaged_folders_are_refused(tmp_path):
    codec = older()
    with pytest.raises(ValueError, match=r"no codec\.json"):
        SpeechCodec.from_pretrained(tmp_path)
    codec.save_pretrained(tmp_path)
    weights = tmp_path / "codec.safetensors"
    good = load_file(weights)
    for tensors, words in (
        ({k: v for k, v in good.items() if k != "unquantiser.head.bias"}, "missing or extra.*head.bias"),
        (good | {"more": torch.zeros(1)}, "missing or extra.*more"),
        ({k: v for k, v in good.items() if k != "mels"}, "missing or extra.*mels"),
        (good | {"centroids": torch.zeros(3, 3)}, "centroids has shape"),
        (good | {"scale": torch.zeros(3)}, "scale has shape"),
        (good | {"unquantiser.head.bias": torch.zeros(3)}, "head.bias"),
    ):
        save_file(tensors, weights)
        with pytest.raises(ValueError, match=words):
            SpeechCodec.from_pretrained(tmp_path)
    weights.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        SpeechCodec.from_pretrained(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({"kind": "speech", "colour": 3}))
    with pytest.raises(ValueError, match="colour"):
        SpeechCodec.from_pretrained(tmp_path)


def test_configuration_defaults():
    assert SpeechCodecConfig().dimension == 320
    assert SpeechCodecConfig(reduce="mean").dimension == 80
    assert SpeechCodecConfig().cepstra == 20


def test_damaged_decoders_are_refused(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    config, weights = tmp_path / "decoder" / "config.json", tmp_path / "decoder" / "model.safetensors"
    said, good = json.loads(config.read_text()), load_file(weights)
    for tensors, words in (
        ({k: v for k, v in good.items() if k != "head.bias"}, "missing or extra.*head.bias"),
        (good | {"head.bias": torch.zeros(3)}, "head.bias has shape"),
    ):
        save_file(tensors, weights)
        with pytest.raises(ValueError, match=words):
            load_codec(tmp_path)
    save_file(good, weights)
    sizes = [{"width": 10**9}, {"width": 10**20}, {"dilations": [1] * 1000}, {"width": 0}, {"dilations": [1, 0]}]
    sizes += [{"frames": 10**9}, {"colour": 1}, {"width": "x"}]
    for wrong in sizes:
        config.write_text(json.dumps(said | wrong))
        with pytest.raises(
            ValueError, match=r"the config asks for|no weights can have|asks for more|decoder|config\.json"
        ):
            load_codec(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_codec(tmp_path)


@pytest.mark.parametrize("field", ["units", "width", "frames_per_token"])
def test_sizes_are_held_against_the_weights_before_memory_is_taken(field, tmp_path):
    """A downloaded codec.json may claim any size: the un-quantiser was made in that size, and then compared."""
    older().save_pretrained(tmp_path)
    file = tmp_path / "codec.json"
    for size in (10**9, 10**12, 10**20):
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: size}))
        with pytest.raises(ValueError, match=r"has shape .*the config asks for|sizes that no weights can have"):
            SpeechCodec.from_pretrained(tmp_path)

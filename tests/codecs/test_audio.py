"""Reading and writing sound."""

import io
import re

import numpy as np
import pytest
import soundfile
import torch

from zipper_lm.codecs import audio
from zipper_lm.codecs.audio import read_audio, write_audio


def tone(seconds=1.0, rate=16_000, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def sound_bytes(wave, rate=16_000, form="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_any_rate_is_resampled_to_the_same_tone(rate):
    wave = read_audio((tone(rate=rate), rate))
    assert wave.dtype == np.float32
    assert wave.shape == (16_000,)
    np.testing.assert_allclose(wave[500:-500], tone()[500:-500], atol=2e-3)


def test_resampling_down_does_not_alias():
    wave = read_audio((tone(rate=48_000, hertz=11_000.0), 48_000))
    assert np.abs(wave[500:-500]).max() < 1e-3


def test_all_forms_of_source_give_the_same_sound(tmp_path):
    wave = tone()
    data = sound_bytes(wave)
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    sources = [
        path,
        str(path),
        data,
        (wave, 16_000),
        {"array": wave, "sampling_rate": 16_000},
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        wave,
        torch.from_numpy(wave),
        wave.tolist(),
        ((wave * 32_768).round().astype(np.int16), 16_000),
        ((wave * 2**31).astype(np.int32), 16_000),
    ]
    for source in sources:
        np.testing.assert_allclose(read_audio(source), wave, atol=1e-4)


def test_small_integers_are_scaled_by_their_type():
    np.testing.assert_allclose(read_audio(np.array([0, 64, -128], np.int8)), [0, 0.5, -1])
    np.testing.assert_allclose(read_audio(np.array([128, 192, 0], np.uint8)), [0, 0.5, -1])


def test_channels_are_averaged(tmp_path):
    both = np.stack([tone(), np.zeros(16_000, np.float32)], axis=1)
    path = tmp_path / "stereo.flac"
    soundfile.write(path, both, 16_000)
    np.testing.assert_allclose(read_audio(path), tone() / 2, atol=1e-4)
    np.testing.assert_allclose(read_audio((both, 16_000)), tone() / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such.wav", "no/such.wav: no such audio file"),
        (b"", "the file is empty"),
        (b"this is text, not sound, and long enough to look at" * 9, "not a sound file"),
        ((np.zeros(0, np.float32), 16_000), "no samples"),
        ({"array": [], "sampling_rate": 16_000}, "no samples"),
        (np.array([0.0, np.nan], np.float32), "NaN or infinite"),
        (np.array([0.0, 1e300]), "NaN or infinite"),
        (np.zeros((16_000, 2), np.float32), "must be 1-D"),
        ((np.zeros((2, 16_000), np.float32), 16_000), "transpose"),
        ((16_000, np.zeros(16_000, np.float32)), "in this order"),
        ((tone(), 0), "rate must be a positive"),
        ({"array": tone()}, "no 'sampling_rate'"),
        ({"wave": tone()}, "dict must have"),
        (np.zeros(10, np.int64), "int64"),
        (np.zeros(10, bool), "bool"),
        (["a", "b"], "must hold floats"),
        ([[0.0], [0.0, 1.0]], "array of numbers"),
        (3, "int"),
        (None, "NoneType"),
        ((np.zeros(1, np.float32), 48_000), "too few to resample"),
    ],
)
def test_bad_sources_are_named(source, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_audio(source)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_audio(tmp_path)


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.97])
def test_cut_files_do_not_pass(form, subtype, part, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    data = sound_bytes(noise, form=form, subtype=subtype)
    assert read_audio(data).shape == (48_000,)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"cut: .*cut off"):
        read_audio(path)


def test_wav_of_a_pipe_is_read_to_its_end():
    data = bytearray(sound_bytes(tone()))
    start = data.index(b"data") + 4
    data[start : start + 4] = b"\xff\xff\xff\xff"
    assert read_audio(bytes(data)).shape == (16_000,)


def test_too_long_is_refused_from_the_header(tmp_path, monkeypatch):
    path = tmp_path / "hour.flac"
    soundfile.write(path, np.zeros(3600 * 8_000, np.int16), 8_000)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_a, **_k: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"3600\.0 s.*max_seconds=120"):
        read_audio(path)


def test_too_long_arrays_are_refused():
    with pytest.raises(ValueError, match=r"2\.0 s.*max_seconds=1\.5"):
        read_audio((tone(2.0), 16_000), max_seconds=1.5)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_written_sound_comes_back_clipped_to_one(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_audio(path, 3.0 * tone())
    np.testing.assert_allclose(read_audio(path), np.clip(3.0 * tone(), -1, 1), atol=1e-4)
    assert soundfile.info(path).subtype == "PCM_16"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_audio(path, tone())
    before = path.read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_audio(path, tone(2.0))
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "wave", "words"),
    [
        ("a.mp3", tone(), "suffix"),
        ("a.wav", np.zeros(0, np.float32), "non-empty"),
        ("a.wav", np.zeros((4, 2), np.float32), "1-D"),
        ("a.wav", np.array([np.inf], np.float32), "NaN or infinite"),
    ],
)
def test_bad_writing_is_refused(tmp_path, name, wave, words):
    with pytest.raises(ValueError, match=words):
        write_audio(tmp_path / name, wave)
    assert not list(tmp_path.iterdir())


def test_samples_of_all_channels_are_counted_before_they_are_decoded(monkeypatch):
    """A small file of silence with hundreds of channels took gigabytes."""
    monkeypatch.setattr(audio, "MAX_SAMPLES", 2000)
    file = io.BytesIO()
    soundfile.write(file, np.zeros((501, 4), np.float32), 8000, format="FLAC")
    with pytest.raises(ValueError, match="501 frames of 4 channels, more than the limit of 2000 samples"):
        read_audio(file.getvalue())


def test_a_sampling_rate_that_no_recording_has_is_refused():
    with pytest.raises(ValueError, match=f"rate must be at most {audio.HIGHEST_RATE} Hz"):
        read_audio((np.zeros(100, np.float32), 10**12))
    wave = io.BytesIO()
    soundfile.write(wave, np.zeros(100, np.float32), 16_000, format="WAV", subtype="PCM_16")
    header = bytearray(wave.getvalue())
    header[24:28] = (2_000_000_000).to_bytes(4, "little")
    with pytest.raises(ValueError, match="its sampling rate must be"):
        read_audio(bytes(header))

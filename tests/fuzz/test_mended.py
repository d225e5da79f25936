"""What fuzzing found, each with how it came about."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image

from zipper_lm.codecs import picture
from zipper_lm.codecs.audio import read_audio
from zipper_lm.codecs.codec import load_codec
from zipper_lm.codecs.picture import grey, is_picture, read_picture, rgb
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.prepared import file_hash, open_prepared
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.generation.settings import generation_config
from zipper_lm.jobs.recipes.yaml_values import parse_value
from zipper_lm.utils.places import inside


@pytest.mark.parametrize(
    "text", ["!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!binary é", "!!set [a]", "{!!bool x: 1}"]
)
def test_a_tag_that_its_value_does_not_fit(text: str) -> None:
    """PyYAML makes a value of a tag without a look at it: `!!bool x` was a KeyError with a traceback."""
    with pytest.raises(ValueError, match="recipe: not readable as YAML"):
        parse_value(text, "recipe")


def test_a_picture_that_pillow_does_not_know_how_to_read() -> None:
    """Of a DDS file with odd flags Pillow says that it is not implemented, which is none of the errors that were
    expected of it."""
    out = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(out, "DDS")
    data = bytearray(out.getvalue())
    data[80:84] = (0x2000).to_bytes(4, "little")
    assert not is_picture(bytes(data))
    with pytest.raises(ValueError, match="not readable"):
        read_picture(bytes(data))


def test_pictures_of_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own limit lets 89 million pixels through, and turning them plain took 16 bytes each, 32 of grey ones."""
    monkeypatch.setattr(picture, "MAX_PIXELS", 15)
    with pytest.raises(ValueError, match="more than the limit of 15"):
        read_picture(_png(4, 4))


def _png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_bands_and_rows_are_the_whole_picture() -> None:
    """Pictures are put on white, and brought to 8 bits, in parts: each pixel as before."""
    draw = np.random.default_rng(0)
    clear = Image.fromarray(draw.integers(0, 256, (150, 7, 4)).astype(np.uint8))
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    assert np.array_equal(np.asarray(rgb(clear, clear.size, 2)), np.asarray(white.convert("RGB")))
    deep = draw.integers(0, 65_536, (150, 7)).astype(np.uint16)
    assert np.array_equal(np.asarray(grey(Image.fromarray(deep))), np.round(deep / 257).astype(np.uint8))


def test_a_sound_of_many_samples() -> None:
    """A file of silence of 2 MB was unpacked to 512 MiB, and more beside."""
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 192_000, 8, "PCM_16", format="FLAC") as file:
        for _ in range(66):
            file.write(np.zeros((1 << 17, 8), np.int16))
    with pytest.raises(ValueError, match="more than the limit of 67108864 samples"):
        read_audio(out.getvalue())


def test_a_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    """What is wrong in a tokenizer's files shows only when it is used: it was a TypeError at the first text."""
    TextCodec.train(["one two"], vocab_size=32).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": {"a": 1}}))
    with pytest.raises(ValueError, match="cannot be used"):
        load_codec(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 10**6}, "num_beams must be at most 1024"),
        ({"do_sample": True, "num_return_sequences": 10**6}, "num_return_sequences must be at most"),
        ({"cache_implementation": "static", "max_cache_len": 10**9}, "max_cache_len must be at most"),
    ],
)
def test_settings_that_take_memory_at_once(settings: dict[str, object], words: str) -> None:
    """A million beams are two gigabytes before the first token: a checkpoint's generation.json could ask for them."""
    with pytest.raises(ValueError, match=words):
        generation_config("text", settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": [[10**9]]},
        {"begin_suppress_tokens": -5},
        {"forced_eos_token_id": 1 << 20},
        {"forced_eos_token_id": "one"},
        {"sequence_bias": "evil.py"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "evil.py"}},
    ],
)
def test_settings_that_show_at_the_first_token(settings: dict[str, object]) -> None:
    """transformers takes them, and fails in the middle of writing, in many ways: IndexError, TypeError, or words about
    tensors. They are named as what they are."""
    from tiny import doc, tiny_model

    model = tiny_model()
    with pytest.raises(ValueError, match="settings for 'text': "):
        model.generate([doc(("speech", [3, 4]))], ["text"], settings={"text": {"max_new_tokens": 2, **settings}})


def test_an_error_of_a_callback_is_not_taken_for_one_of_settings() -> None:
    from tiny import doc, tiny_model

    def told(token: object) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tiny_model().generate(
            doc(("speech", [3, 4])), ["text"], settings={"text": {"max_new_tokens": 2}}, on_token=told
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said.pop("modalities"), "modalities must be a list"),
        (lambda said: said.update(modalities=[1]), "modalities must be names"),
        (lambda said: said.update(splits=[]), "splits must be a dict"),
        (lambda said: said["splits"]["train"].update(shards=["a"]), r"shards\[0\] must be a mapping"),
        (lambda said: said["splits"]["train"]["shards"][0].pop("bytes"), r"shards\[0\].bytes must be a int"),
        (lambda said: said["splits"]["train"].update(shards=[]), "are none"),
        (lambda said: said["splits"]["train"]["shards"][0].update(file="../x.arrow"), "leads out of the folder"),
        (lambda said: said["codecs"].update(text=3), "codecs.text must be a mapping"),
        (lambda said: said.update(columns=[1]), "columns must be a mapping"),
        (lambda said: said.update(modalities=["text"]), "other columns"),
    ],
)
def test_a_manifest_of_prepared_data_is_not_believed(
    prepared: Path, tmp_path: Path, change: object, words: str
) -> None:
    """Each field was used as it came: whatever lacked or was of another type was a KeyError or TypeError."""
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    said = json.loads((folder / "prepared.json").read_text())
    change(said)  # type: ignore[operator]
    (folder / "prepared.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=words):
        open_prepared(folder).rows("train")


def test_a_shard_that_is_damaged_with_its_hash(prepared: Path, tmp_path: Path) -> None:
    """Whoever changes a shard can change its hash. Arrow followed offsets that lead anywhere: the process ended."""
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    said = json.loads((folder / "prepared.json").read_text())
    shard = said["splits"]["train"]["shards"][0]
    file = folder / shard["file"]
    text = pa.ipc.open_file(pa.py_buffer(data := file.read_bytes())).read_all()["text"].chunk(0)
    ends = text.buffers()[1].to_pybytes()[: 4 * (len(text) + 1)]
    assert data.count(ends) == 1
    file.write_bytes(data.replace(ends, ends[:-4] + (2**30).to_bytes(4, "little")))
    shard |= {"bytes": file.stat().st_size, "sha256": file_hash(file)}
    (folder / "prepared.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="no readable Arrow file"):
        open_prepared(folder).rows("train")


OUT = ["../secret.wav", "in/../../secret.wav", "link.wav", "far/secret.wav", "{home}/secret.wav"]


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("form", ["metadata.csv", "audio", "row", "feature", "document"])
def test_files_that_rows_name_lie_in_their_folder(tmp_path: Path, name: str, form: str) -> None:
    """A data set's list could name any file here, and what was read of it went into the model that was shared."""
    (folder := tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "secret.wav", np.zeros(160), 16_000)
    soundfile.write(folder / "0.wav", np.zeros(160), 16_000)
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "far").symlink_to(tmp_path)
    name = name.format(home=tmp_path)
    text = {
        "metadata.csv": f"file_name,text\n{name},one\n",
        "audio": f"file_name,audio,text\n0.wav,{name},one\n",
        "row": json.dumps({"audio": name, "text": "one"}),
        "feature": json.dumps({"audio": {"bytes": None, "path": name, "id": 1}, "text": "one"}),
        "document": json.dumps(
            {"segments": [{"modality": "speech", "value": name}, {"modality": "text", "value": "a", "target": True}]}
        ),
    }[form]
    (folder / ("metadata.csv" if "file_name" in text else "train.jsonl")).write_text(text)
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_rows(folder)


def test_a_list_of_ones_own_names_files_anywhere(tmp_path: Path) -> None:
    """One that is named by itself; of a folder that somebody may have sent the same list is refused, as above."""
    (folder := tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "far.wav", np.zeros(160), 16_000)
    for name, message in (("far.wav", None), ("../far.wav", "leads out")):
        row = {"audio": str(tmp_path / name) if message is None else name, "text": "one"}
        spoken = [{"modality": "speech", "value": row["audio"]}, {"modality": "text", "value": "a", "target": True}]
        for line in (row, {"segments": spoken}):
            (folder / "train.jsonl").write_text(json.dumps(line))
            if message is None:
                found = read_rows(folder / "train.jsonl")[0]
                assert read_audio(found["speech"] if line is row else found[0].value).shape == (160,)
            else:
                with pytest.raises(ValueError, match=message):
                    read_rows(folder / "train.jsonl")


def test_rows_that_hold_their_files_name_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only lists were looked at: a field of JSON in a tar, or a column of texts on the Hub, named any file here."""
    import datasets

    soundfile.write(tmp_path / "secret.wav", np.zeros(160), 16_000)
    secret = str(tmp_path / "secret.wav")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        info = tarfile.TarInfo("0.json")
        content = json.dumps({"audio": secret, "text": "one"}).encode()
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match="hold their files, and name none"):
        read_rows(tmp_path / "train.tar")[0]
    plain = datasets.Dataset.from_dict({"audio": [secret], "text": ["one"]})
    assert read_rows(plain)[0]["speech"] == secret, "what is given in Python is its owner's"
    plain.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_rows(tmp_path / "saved")[0]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    kept = {"audio": [{"bytes": None, "path": secret}], "text": ["one"]}
    for fetched in (plain, datasets.Dataset.from_dict(kept)):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, of=fetched, **__: of)
        with pytest.raises(ValueError, match="leads out of the folder"):
            read_rows("owner/name")[0]
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path))
    assert read_rows("owner/name")[0]["speech"] == secret, "that of the sound's own file, where it was unpacked"


@pytest.mark.parametrize("read", [read_audio, read_picture])
@pytest.mark.parametrize("value", ["{file}", {"bytes": "{file}"}, {"bytes": None, "path": "{file}"}, {"bytes": 10**13}])
def test_no_text_opens_just_any_file(tmp_path: Path, read: Any, value: Any) -> None:
    """Text that a row has where a sound belongs named a file by any name; and a number asked for so many bytes."""
    (tmp_path / "secret").write_bytes(b"nobody may read this")
    filled = json.loads(json.dumps(value).replace("{file}", str(tmp_path / "secret")))
    with (
        mock.patch.object(Path, "open", side_effect=AssertionError),
        pytest.raises(ValueError, match=r"no name of|cannot read|must have"),
    ):
        read(filled)


def test_files_that_are_there_are_found(tmp_path: Path) -> None:
    """By whatever way, as long as it ends in the folder; and what nobody reads may be any text."""
    (folder := tmp_path / "in").mkdir()
    soundfile.write(folder / "0.wav", np.zeros(160), 16_000)
    (folder / "link.wav").symlink_to("0.wav")
    (tmp_path / "other").symlink_to(folder)
    for name in ("0.wav", "./0.wav", "link.wav", str(folder / "0.wav"), "../in/0.wav"):
        (folder / "train.jsonl").write_text(json.dumps({"audio": name, "text": "one", "was": "/far/away/0.wav"}))
        row = read_rows(tmp_path / "other")[0]
        assert read_audio(row["speech"]).shape == (160,)
        assert row["was"] == "/far/away/0.wav"


def test_the_hubs_cache_is_links(tmp_path: Path) -> None:
    """What is fetched from the Hub lies beside its snapshot."""
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    for place in (snapshot, snapshot.parents[1] / "blobs", snapshot.parents[1] / "refs"):
        place.mkdir(parents=True)
    (snapshot.parents[1] / "blobs" / "f00").write_bytes(b"a")
    (snapshot / "0.wav").symlink_to("../../blobs/f00")
    (snapshot / "1.wav").symlink_to("../../refs")
    assert inside(snapshot, "0.wav", "row 0: file").read_bytes() == b"a"
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot, "1.wav", "row 0: file")


def test_a_name_that_is_too_long_for_one(tmp_path: Path) -> None:
    """The system says so by an error of its own when it is asked for such a file, which ended in a traceback."""
    name = "a" * 70_000 + ".wav"
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},one\n")
    with pytest.raises(ValueError, match="is no path"):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match="no such audio file"):
        read_audio(name)
    with pytest.raises(ValueError, match="no file"):
        read_picture(name)


@pytest.mark.parametrize(
    "fields",
    [{"loss_weights": 31}, {"loss_weights": {"text": "a"}}, {"handover_weight": [1]}, {"groups": [3]}, {"groups": 3}],
)
def test_fields_of_a_checkpoints_config_that_are_of_another_type(fields: dict[str, object]) -> None:
    """Towers and zips were looked at, what stands beside them was used as it came: a TypeError."""
    with pytest.raises(ValueError, match="config: "):
        ZipperConfig(towers={"text": {"source": "a"}}, **fields)


def test_fields_that_transformers_finds_odd_are_named_with_their_file(tmp_path: Path) -> None:
    from zipper_lm.models.checkpoint import read_config

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "zipper", "id2label": 5}))
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_config(tmp_path)


OTHERS: tuple[Any, ...] = (0, "x", [0])


def test_no_field_of_a_codecs_config_is_a_traceback_when_it_is_of_another_type() -> None:
    """A separator that was a number was found when ids became text: an AttributeError in the midst of an evaluation."""
    from fuzz.targets import codecs
    from fuzz.watch import Watch

    root, tried = codecs.saved(), 0
    with Watch(codecs.run) as watch:
        for file in sorted(file for file in root.rglob("*.json") if "tokenizer" not in file.name):
            said = json.loads(file.read_text())
            for place in _places(said):
                for value in OTHERS:
                    tried += 1
                    changed = json.dumps(_with(said, place, value)).encode()
                    bug = watch.check(str(file.relative_to(root)).encode() + b"\n" + changed)
                    assert bug is None, (file.name, place, value, bug)
    assert tried > 100
    assert watch.tally.refused > tried / 2


def _places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _with(value: Any, path: tuple[str, ...], new: Any) -> Any:
    return {**value, path[0]: _with(value[path[0]], path[1:], new)} if path else new


def test_a_watermark_that_is_none() -> None:
    """transformers asks it for its attributes before it looks at what it is."""
    with pytest.raises(ValueError, match="settings for 'text'"):
        generation_config("text", {"watermarking_config": 5})


@pytest.mark.parametrize("field", ["max_length", "max_new_tokens"])
def test_room_that_is_taken_at_once_is_bounded(field: str) -> None:
    """A static cache has room for the longest that may be written: a billion tokens took all memory of the machine, for
    a tower whose positions have no end."""
    with pytest.raises(ValueError, match=f"takes room for all tokens at once, so {field} must be at most"):
        generation_config("text", {"cache_implementation": "static", field: 10**9})
    generation_config("text", {"cache_implementation": "static", field: 1000})
    generation_config("text", {"cache_implementation": "dynamic", field: 10**9})


def test_a_tar_of_a_size_that_no_file_has() -> None:
    """Found by coverage: Python's `tarfile` goes to where such a member would end, which is no place in a file."""
    from fuzz.targets import target
    from fuzz.watch import Watch

    old = Path(__file__).parent / "corpus" / "tars" / "size-beyond-files"
    with Watch(target("tars").run) as watch:
        assert watch.check(old.read_bytes()) is None
        assert watch.tally.refused == 1

"""Readers: the same rows from folders, JSONL and datasets, and what is said when they do not fit."""

import csv
import json
import pickle

import numpy as np
import pytest
import soundfile

from zipper_lm.data.readers import Stream, list_splits, read_rows, stream_rows
from zipper_lm.document import Document


def sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(160), 16_000)
    return path


def metadata(folder, texts, prefix="", name="metadata.csv"):
    """A folder of sounds 0.wav, 1.wav, ... with its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"{prefix}{i}.wav", "transcription": t, "speaker": "kim"} for i, t in enumerate(texts)]
    for row in rows:
        sound(folder / row["file_name"])
    write_metadata(folder / name, rows)
    return folder


def write_metadata(file, rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def jsonl(file, *lines):
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_audiofolder_with_splits(tmp_path, name):
    metadata(tmp_path / "train", ["one", 'two, "three"', "007"], name=name)
    metadata(tmp_path / "dev", ["four"], name=name)
    rows = read_rows(tmp_path)
    assert len(rows) == 3
    path = str(tmp_path / "train" / "1.wav")
    assert rows[1] == {"speech": path, "text": 'two, "three"', "speaker": "kim", "file_name": path}
    assert rows[-1]["text"] == "007"
    assert rows.column("text") == ["one", 'two, "three"', "007"]
    assert [row["text"] for row in read_rows(tmp_path, split="validation")] == ["four"]
    assert list_splits(tmp_path) == ["dev", "train"]


def test_flat_audiofolder_is_the_split_of_its_name(tmp_path):
    metadata(tmp_path / "clips", ["one"])
    assert read_rows(tmp_path / "clips", split="training")[0]["text"] == "one"
    with pytest.raises(ValueError, match=r"no split 'test' in .*clips; it has \['train'\]"):
        read_rows(tmp_path / "clips", split="test")
    metadata(tmp_path / "test", ["two"])
    assert read_rows(tmp_path / "test", split="test")[0]["text"] == "two"


def test_one_metadata_file_above_the_splits(tmp_path):
    for name in ("train/0.wav", "test/1.wav", "test/2.wav"):
        sound(tmp_path / name)
    names = ["train/0.wav", "test/1.wav", "test/2.wav"]
    write_metadata(tmp_path / "metadata.csv", [{"file_name": n, "sentence": n} for n in names])
    assert list_splits(tmp_path) == ["test", "train"]
    assert [row["text"] for row in read_rows(tmp_path, split="test")] == ["test/1.wav", "test/2.wav"]


def test_imagefolder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    write_metadata(tmp_path / "metadata.csv", [{"file_name": "a.png", "text": "a cat"}])
    row = read_rows(tmp_path, {"picture": "image"})[0]
    assert row["picture"] == str(tmp_path / "a.png")
    assert row["text"] == "a cat"


def test_columns_are_chosen(tmp_path):
    folder = metadata(tmp_path, ["one"])
    row = read_rows(folder, {"speech": "file_name", "german": "transcription", "text": "speaker"})[0]
    assert row == {"speech": str(folder / "0.wav"), "german": "one", "text": "kim", "audio": str(folder / "0.wav")}
    with pytest.raises(ValueError, match=r"has no column 'words' for modality 'text'; it has \['audio', 'file_name'"):
        read_rows(folder, {"text": "words"})


def test_rows_are_lazy_sliceable_and_picklable(tmp_path):
    rows = read_rows(metadata(tmp_path, list("abcdef")), limit=5)
    assert len(rows) == 5
    assert [r["text"] for r in rows[1:4][::2]] == ["b", "d"]
    assert rows[1:4].column("text") == ["b", "c", "d"]
    assert [r["text"] for r in pickle.loads(pickle.dumps(rows))] == list("abcde")
    with pytest.raises(IndexError):
        rows[5]


def test_files_that_the_metadata_names_must_exist(tmp_path):
    metadata(tmp_path, ["one", "two", "three"])
    (tmp_path / "1.wav").unlink()
    (tmp_path / "2.wav").unlink()
    with pytest.raises(ValueError, match=r"metadata.csv:3: file '1.wav' does not exist \(so do 1 more\)"):
        read_rows(tmp_path)
    assert len(read_rows(tmp_path, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\n", "has no rows in split 'train'"),
        ("", "has no rows in split 'train'"),
        ("name,text\na,b\n", r"metadata.csv:2: no file_name; the columns are \['name', 'text'\]"),
        ("file_name,text\na.wav\n", "metadata.csv:2: not as many fields as the 2 columns"),
        ("file_name,text\na.wav,b,c\n", "metadata.csv:2: not as many fields"),
        ("file_name,text,text\na.wav,b,c\n", "a column name comes twice"),
        ('file_name,text\na.wav,"b\n', "not readable as UTF-8 CSV"),
        (b"file_name,text\na.wav,\xe9\n", "not readable as UTF-8 CSV"),
    ],
)
def test_bad_metadata(tmp_path, text, message):
    folder = tmp_path / "data"
    sound(folder / "a.wav")
    (folder / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(folder)


def test_two_metadata_files_are_refused(tmp_path):
    metadata(tmp_path, ["a"])
    metadata(tmp_path, ["a"], name="metadata.jsonl")
    with pytest.raises(ValueError, match=r"both metadata.csv and metadata.jsonl"):
        read_rows(tmp_path)


def test_ambiguous_split_is_refused(tmp_path):
    metadata(tmp_path / "dev", ["a"])
    metadata(tmp_path / "valid", ["b"])
    with pytest.raises(ValueError, match=r"split 'validation' may be any of \['dev', 'valid'\]"):
        read_rows(tmp_path, split="validation")
    assert read_rows(tmp_path, split="valid")[0]["text"] == "b"


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing", "no file or folder"), (".", "has no metadata.csv or metadata.jsonl"), (3, "cannot read a int"),
     ([], "no rows"), ([1], "row 0 must be a dict or a Document"), ("./a/b", "no file or folder")],
)  # fmt: skip
def test_bad_sources(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        read_rows(source)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_bad_limit(limit):
    with pytest.raises(ValueError, match="limit must be a whole number of at least 1"):
        read_rows([{"text": "a"}], limit=limit)


def test_jsonl_rows(tmp_path):
    sound(tmp_path / "clips" / "a.wav")
    file = jsonl(
        tmp_path / "data.jsonl",
        {"audio": "clips/a.wav", "sentence": "say a.wav", "image": str(tmp_path / "x.png"), "id": 7},
        "",
        {"audio": str(tmp_path / "clips" / "a.wav"), "sentence": "two"},
    )
    rows = read_rows(file)
    path = str(tmp_path / "clips" / "a.wav")
    assert rows[0] == {"speech": path, "text": "say a.wav", "image": str(tmp_path / "x.png"), "id": 7}
    assert rows.column("speech") == [path, path]
    assert rows.column("id") == [7, None]


def test_jsonl_per_split(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    jsonl(tmp_path / "dev.jsonl", {"text": "b"})
    jsonl(tmp_path / "notes.jsonl", {"text": "c"})
    assert list_splits(tmp_path) == ["dev", "train"]
    assert read_rows(tmp_path, split="validation")[0] == {"text": "b"}
    assert read_rows(tmp_path / "dev.jsonl", split="validation")[0] == {"text": "b"}
    with pytest.raises(ValueError, match=r"no split 'test' in .*notes.jsonl; it has \['train'\]"):
        read_rows(tmp_path / "notes.jsonl", split="test")


def test_jsonl_documents(tmp_path):
    sound(tmp_path / "a.wav")
    segments = [
        {"modality": "speech", "value": "a.wav", "target": False},
        {"modality": "text", "value": "a.wav", "target": True},
        {"modality": "speech", "ids": [3, 4]},
    ]
    (document,) = read_rows(jsonl(tmp_path / "data.jsonl", {"segments": segments}))
    assert isinstance(document, Document)
    assert document.modalities == ["speech", "text", "speech"]
    assert [s.value for s in document] == [str(tmp_path / "a.wav"), "a.wav", None]
    assert [s.target for s in document] == [False, True, False]
    assert document[2].ids == [3, 4]


TEXT = {"modality": "text", "value": "a", "target": True}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "malformed JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"text": None}, "no value in column 'text' for modality 'text'"),
        ({"transcription": "a"}, "no value in column 'text'.*the columns are"),
        ({"text": "a", "speech": "b.wav"}, None),
        ({"segments": []}, "document has no segments"),
        ({"segments": "a"}, "document has no segments"),
        ({"segments": [TEXT | {"target": False}]}, "document has no target"),
        ({"segments": [TEXT], "name": 1}, r"document: unknown keys \['name'\]; known are \['segments'\]"),
        ({"segments": [TEXT, TEXT | {"targt": 1}]}, r"segment 1: unknown keys \['targt'\]"),
        ({"segments": [3]}, "segment 0: expected a JSON object, got int"),
        ({"segments": [TEXT | {"target": 1}]}, "segment 0: target must be true or false, got 1"),
        ({"segments": [TEXT | {"ids": [True]}]}, "segment 0: ids must be a list of whole numbers"),
        ({"segments": [TEXT | {"ids": [-1]}]}, "segment 0: ids must be"),
        ({"segments": [{"value": "a", "target": True}]}, "segment 0: segment.modality must be a non-empty string"),
        ({"segments": [{"modality": "text", "target": True}]}, "segment 0: .* has neither value nor ids"),
        ({"segments": [TEXT, {"modality": "speech", "value": "no.wav"}]}, r"segment 1: file '.*no.wav' does not"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, message):
    file = jsonl(tmp_path / "data.jsonl", {"text": "fine"}, line)
    if message is None:  # a column that the first line has not is nobody's modality: it is left alone
        assert read_rows(file)[1]["text"] == "a"
        return
    with pytest.raises(ValueError, match=f"^data: .*data.jsonl:2: {message}"):
        read_rows(file)


def test_jsonl_sound_must_exist(tmp_path):
    file = jsonl(tmp_path / "data.jsonl", {"speech": "no.wav", "text": "a"})
    with pytest.raises(ValueError, match=r"data.jsonl:1: file '.*no.wav' does not exist"):
        read_rows(file)


def test_empty_jsonl(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        read_rows(jsonl(tmp_path / "data.jsonl", ""))


def test_lists_of_dicts_keep_their_values():
    wave = np.zeros(4)
    rows = read_rows([{"audio": wave, "text": "a", "n": 1}, {"audio": wave, "text": "b", "n": 2}], split="whatever")
    assert rows[1]["speech"] is wave
    assert rows.column("n") == [1, 2]
    with pytest.raises(ValueError, match="row 1: no value in column 'text'"):
        read_rows([{"text": "a"}, {}])


@pytest.fixture
def dataset(tmp_path):
    import datasets

    paths = [str(sound(tmp_path / "sounds" / f"{i}.wav")) for i in range(3)]
    made = datasets.Dataset.from_dict({"audio": paths, "sentence": ["a", "b", "c"], "n": [1, 2, 3]})
    return made.cast_column("audio", datasets.Audio())


def test_datasets_audio_stays_undecoded(tmp_path, dataset):
    rows = read_rows(dataset, split="whatever")
    assert rows[1] == {"speech": str(tmp_path / "sounds" / "1.wav"), "text": "b", "n": 2}
    assert rows[1:].column("text") == ["b", "c"]
    assert len(read_rows(dataset, limit=2)) == 2
    assert len(read_rows(dataset, limit=99)) == 3
    with pytest.raises(ValueError, match=r"the given Dataset has no column 'words'.*\['audio', 'n', 'sentence'\]"):
        read_rows(dataset, {"text": "words"})
    with pytest.raises(ValueError, match="no rows"):
        read_rows(dataset.select([]))


def test_dataset_dict_and_streams(dataset):
    import datasets

    parts = datasets.DatasetDict({"train": dataset, "dev": dataset.select([2])})
    assert [r["text"] for r in read_rows(parts, split="validation")] == ["c"]
    with pytest.raises(ValueError, match=r"no split 'test' in the given DatasetDict; it has \['dev', 'train'\]"):
        read_rows(parts, split="test")
    stream = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="set limit"):
        read_rows(stream)
    assert [r["text"] for r in read_rows(stream, limit=2)] == ["a", "b"]


def test_saved_to_disk(tmp_path, dataset):
    import datasets

    dataset.save_to_disk(str(tmp_path / "one"))
    row = read_rows(tmp_path / "one")[0]
    assert row["text"] == "a"
    assert row["speech"].startswith(b"RIFF")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "two"))
    assert list_splits(tmp_path / "two") == ["train", "test"]
    assert len(read_rows(tmp_path / "two", split="test")) == 3
    (tmp_path / "one" / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="no whole data set"):
        read_rows(tmp_path / "one")


def test_hub_ids_go_through_datasets(monkeypatch, dataset):
    import datasets

    asked = []

    def load(*args, **settings):
        asked.append((args, settings))
        return dataset

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: ["train", "dev"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_rows("someone/some-data:clean", split="validation", limit=2, revision="v1")) == 2
    assert asked == [(("someone/some-data", "clean"), {"split": "dev", "revision": "v1", "streaming": False})]
    with pytest.raises(ValueError, match=r"no split 'test' in someone/some-data; it has \['dev', 'train'\]"):
        read_rows("someone/some-data", split="test")


def test_hub_failure_says_why(monkeypatch):
    """Offline mode is on in the tests, and nothing is cached: what `datasets` itself raises then."""
    with pytest.raises(ValueError, match=r"data 'someone/data': .*offline mode is on .* the cache does not have it"):
        read_rows("someone/data")

    import datasets
    from datasets.exceptions import DatasetNotFoundError

    class RevisionNotFoundError(Exception):
        pass

    def no_revision(*_, **__):
        raise DatasetNotFoundError("Revision 'v9' doesn't exist") from RevisionNotFoundError()

    monkeypatch.setattr(datasets, "get_dataset_split_names", no_revision)
    with pytest.raises(ValueError, match="data 'someone/data': the Hub has no revision 'v9' of it"):
        read_rows("someone/data", revision="v9")


def test_a_picture_beside_speech_takes_nothing_from_it() -> None:
    """A column named ``image`` used to make a sound's ``file_name`` invisible."""
    rows = read_rows([{"file_name": "a.wav", "image": "a.png", "text": "one"}])
    assert (rows.columns["speech"], rows[0]["image"]) == ("file_name", "a.png")
    rows = read_rows([{"file_name": "a.png", "image": "a.png", "text": "one"}])
    assert "speech" not in rows.columns


def test_files_in_folders_named_after_what_they_show(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/cat/notes.txt", "test/.x/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list_splits(tmp_path) == ["test", "train"]
    row = read_rows(tmp_path)[1]
    assert (row["text"], row["image"]) == ("dog", str(tmp_path / "train" / "dog" / "2.png"))
    assert read_rows(tmp_path, split="test").column("text") == ["cat"]
    sound(tmp_path / "flat" / "bell" / "a.wav")
    assert read_rows(tmp_path / "flat")[0]["speech"] == str(tmp_path / "flat" / "bell" / "a.wav")


def test_files_alone_of_which_nothing_is_known(tmp_path):
    """Unaligned recordings used to need a metadata file with nothing in it but their names."""
    for name in ("split/train/a.wav", "split/dev/b.wav", "split/train/.c.wav", ".flat/d.wav"):
        sound(tmp_path / name)
    (tmp_path / ".flat" / "read.me").write_text("a")
    assert list_splits(tmp_path / "split") == ["dev", "train"]
    (row,) = read_rows(tmp_path / "split")
    assert row["speech"] == str(tmp_path / "split" / "train" / "a.wav")
    assert "text" not in row
    (row,) = read_rows(tmp_path / ".flat")
    assert row["speech"].endswith("d.wav")
    sound(tmp_path / "half" / "validation" / "b.wav")
    metadata(tmp_path / "half" / "train", ["one"])
    assert list_splits(tmp_path / "half") == ["train", "validation"]
    (tmp_path / "split" / "train" / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    with pytest.raises(ValueError, match=r"link to a file that does not exist.*gone\.wav"):
        read_rows(tmp_path / "split")
    (tmp_path / ".flat" / "cover.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"sounds and pictures, such as .*cover\.jpg"):
        read_rows(tmp_path / ".flat")
    sound(tmp_path / "split" / "dev" / "extra" / "c.wav")
    with pytest.raises(ValueError, match="1 sounds or pictures of its own and 1 in sub-folders"):
        read_rows(tmp_path / "split", split="dev")
    sound(tmp_path / "jsonl" / "validation" / "a.wav")
    (tmp_path / "jsonl" / "valid.jsonl").write_text('{"speech": "validation/a.wav", "text": "one"}\n')
    assert list_splits(tmp_path / "jsonl") == ["valid"]
    assert read_rows(tmp_path / "jsonl", split="validation")[0]["text"] == "one"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no sounds or pictures, in sub-folders or not"):
        read_rows(tmp_path / "empty")


@pytest.mark.parametrize(
    ("fields", "speech", "text"),
    [
        ({"file": "x", "audio": b"s", "text": "A WORD", "speaker_id": 1, "id": "1-2"}, b"s", "A WORD"),  # LibriSpeech
        ({"audio": b"s", "text_normalized": "a", "text_original": "b", "path": "x"}, b"s", "a"),  # LibriTTS
        ({"client_id": "x", "path": "x.mp3", "audio": b"s", "sentence": "a", "up_votes": 2}, b"s", "a"),  # Common Voice
        ({"audio": b"s", "transcript": "a", "original_path": "x"}, b"s", "a"),  # Multilingual LibriSpeech
    ],
)
def test_columns_of_known_data_sets(fields, speech, text):
    row = read_rows([fields])[0]
    assert (row["speech"], row["text"]) == (speech, text)


def test_captions(tmp_path):
    """Pictures of a data set stay undecoded until a codec reads them, and a class is its name."""
    import datasets
    from PIL import Image

    from zipper_lm.modality.pixels import PixelCodec, PixelCodecConfig

    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "a.png")
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )
    made = datasets.Dataset.from_dict(
        {"image": [(tmp_path / "a.png").read_bytes()] * 2, "caption": ["b", "c"], "label": [1, -1]}, features
    )
    row = read_rows(made)[0]
    assert (row["text"], row["label"]) == ("b", "y")
    assert PixelCodec(PixelCodecConfig(height=1, width=2, levels=2)).encode([row["image"]]) == [[0, 1]]
    assert read_rows(made, {"text": "label"}).column("text") == ["y", None]


def test_a_stream_is_read_row_by_row_and_again(dataset):
    import datasets

    read = []

    def rows():
        for n in range(5):
            read.append(n)
            yield {"audio": b"s", "sentence": str(n), "speaker": "ann" if n % 2 else "bob"}

    stream = stream_rows(datasets.IterableDataset.from_generator(rows))
    assert isinstance(stream, Stream)
    read.clear()
    first = iter(stream)
    assert next(first) == {"speech": b"s", "text": "0", "speaker": "bob"}
    assert read == [0]
    assert [row["text"] for row in stream] == list("01234")
    assert [row["text"] for row in stream.without({"speaker": ["bob"]})] == ["1", "3"]
    limited = stream_rows(datasets.IterableDataset.from_generator(rows), limit=2)
    assert [row["text"] for row in limited] == ["0", "1"]
    undecoded = stream_rows(dataset.to_iterable_dataset())
    assert [row["speech"][-5:] for row in undecoded] == ["0.wav", "1.wav", "2.wav"]
    with pytest.raises(ValueError, match=r"has no column 'words'.*'audio', 'n', 'sentence'"):
        stream_rows(dataset.to_iterable_dataset(), {"text": "words"})
    assert len(stream_rows(dataset)) == 3  # what is here already is no stream


def test_a_stream_that_breaks_off_names_the_data_set(monkeypatch):
    import datasets

    def rows():
        yield {"text": "a"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(ValueError, match="data 'someone/data'"):
        list(stream_rows("someone/data"))


def test_unchecked_rows_fail_when_they_are_read(tmp_path):
    metadata(tmp_path, ["one", "two"])
    (tmp_path / "1.wav").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        read_rows(tmp_path)
    rows = read_rows(tmp_path, check=False)
    assert len(rows) == 2
    assert rows.where(1) == f"{tmp_path / 'metadata.csv'}:3"


def test_without_leaves_rows_that_have_no_such_field(dataset):
    rows = read_rows([{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c"}])
    assert rows.without({"n": ["2"]}).column("text") == ["a", "c"]
    assert rows.without({"n": ["x"]}).select([2, 0]).column("text") == ["c", "a"]
    assert read_rows(dataset).without({"n": ["2"], "text": ["x"]}).column("text") == ["a", "c"]


def test_a_column_to_exclude_by_goes_by_either_name_and_must_be_there(dataset):
    """A misspelt column excluded nothing without a word, and a stream knew a text by its modality only."""
    for rows in (read_rows(dataset), stream_rows(dataset.to_iterable_dataset())):
        first = next(iter(rows))["text"]
        for name in ("sentence", "text"):
            assert len(list(rows.without({name: [first]}))) == 2
        with pytest.raises(
            ValueError, match=r"data\.exclude: there is no column \['sentense'\]; there are .*'sentence'"
        ):
            rows.without({"sentense": ["x"]})

"""Readers: the same rows from folders, JSONL and datasets, and what is said when they do not fit."""

import pickle

import numpy as np
import pytest
import torch
from tiny_folders import metadata, sound

from zipper_lm.data.sources.readers import Stream, list_splits, read_rows, stream_rows


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


@pytest.mark.parametrize("form", [None, "torch", "numpy", "pandas", "arrow"])
def test_rows_are_plain_whatever_the_format(tmp_path, form):
    """A saved data set keeps its format, in which a class is a tensor: no row was left out by its speaker's name."""
    import datasets

    speaker = datasets.ClassLabel(names=["kim", "theo"])
    features = datasets.Features({"text": datasets.Value("string"), "speaker": speaker, "n": datasets.Value("int64")})
    values = {"text": ["a", "b", "c", "d"], "speaker": [0, 1, 0, 1], "n": [1, 2, 3, 4]}
    made = datasets.Dataset.from_dict(values, features=features).with_format(form)
    made.save_to_disk(str(tmp_path / "saved"))
    streams = [datasets.IterableDatasetDict({"train": made.to_iterable_dataset().with_format(form)})]
    for source in (tmp_path / "saved", made, made.with_format(form, columns=["text"]), *streams):
        rows = read_rows(source, limit=4)
        assert rows[1] == {"text": "b", "speaker": "theo", "n": 2}
        assert type(rows[1]["n"]) is int
        assert [row["text"] for row in rows.without({"speaker": ["theo"]})] == ["a", "c"]
        assert [row["text"] for row in rows.without({"n": ["2", "3"]})] == ["a", "d"]
        assert [row["text"] for row in stream_rows(source).without({"speaker": ["theo"]})] == ["a", "c"]


def test_numbers_of_numpy_and_torch_are_plain():
    rows = read_rows([{"text": "a", "n": np.int64(1)}, {"text": "b", "n": torch.tensor(2)}])
    assert [type(row["n"]) for row in rows] == [int, int]
    assert [row["text"] for row in rows.without({"n": ["2"]})] == ["a"]


def test_a_transform_is_refused(dataset):
    """Columns are read without the others, so a function of whole rows would see a part."""
    with pytest.raises(ValueError, match="with_transform"):
        read_rows(dataset.with_transform(lambda rows: rows))


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

    from zipper_lm.codecs.pixels import PixelCodec, PixelCodecConfig

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

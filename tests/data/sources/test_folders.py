"""Local folders: with metadata, by class, or files alone; their splits, and what is said when they do not fit."""

import pytest
from tiny_folders import metadata, sound, write_metadata

from zipper_lm.data.sources.readers import list_splits, read_rows


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


def test_folders_of_which_only_some_are_splits(tmp_path):
    """One foreign folder beside train/ and test/ put the rows of test/ into the training split."""
    for top in ("train", "test", "extra"):
        sound(tmp_path / top / "1.wav")
    rows = [{"file_name": f"{top}/1.wav", "text": "one"} for top in ("train", "test", "extra")]
    write_metadata(tmp_path / "metadata.csv", rows)
    with pytest.raises(
        ValueError, match=r"in \['test', 'train'\], which are splits, and in \['extra'\], which are none"
    ):
        read_rows(tmp_path)


def test_files_too_deep_to_be_found_are_told(tmp_path):
    """They were left out, and nothing said."""
    for name in ("train/a/1.wav", "train/b/x/2.wav"):
        sound(tmp_path / name)
    with pytest.raises(ValueError, match=r"such as .*b/x/2\.wav"):
        read_rows(tmp_path)


def test_imagefolder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    write_metadata(tmp_path / "metadata.csv", [{"file_name": "a.png", "text": "a cat"}])
    row = read_rows(tmp_path, {"picture": "image"})[0]
    assert row["picture"] == str(tmp_path / "a.png")
    assert row["text"] == "a cat"


def test_files_that_the_metadata_names_must_exist(tmp_path):
    metadata(tmp_path, ["one", "two", "three"])
    (tmp_path / "1.wav").unlink()
    (tmp_path / "2.wav").unlink()
    with pytest.raises(ValueError, match=r"metadata.csv:3: file '.*1.wav' does not exist \(so do 1 more\)"):
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

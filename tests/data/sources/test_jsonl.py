"""JSONL: rows and whole documents, per split or not, and which line is wrong."""

import json
import pickle

import pytest
from tiny_folders import sound

from zipper_lm.data.document import Document
from zipper_lm.data.sources.readers import list_splits, read_rows


def jsonl(file, *lines):
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


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


def test_lines_are_read_where_they_lie(tmp_path):
    """All of a file lay in memory as Python objects, some hundred bytes a row and more."""
    lines = [json.dumps({"text": f"ω{n}", "more": "x" * 500}, ensure_ascii=False) for n in range(50)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(("\ufeff" + "\r\n\n".join(lines)).encode())
    rows = read_rows(file)
    assert [row["text"] for row in rows] == [f"ω{n}" for n in range(50)]
    assert rows.where(2) == f"{file}:5"
    assert pickle.loads(pickle.dumps(rows))[49]["text"] == "ω49"
    assert len(pickle.dumps(rows)) < 50 * 24 + 2000, "more than the places of the lines is held"
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since it was opened"):
        rows[3]
    file.unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl:5 cannot be read"):
        rows[2]

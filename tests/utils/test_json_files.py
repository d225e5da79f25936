"""JSON of others: bounded, and every complaint names the file."""

import json

import pytest

from zipper_lm.utils import json_files
from zipper_lm.utils.json_files import MAX_DEPTH, parse_json, read_json, read_mapping


def test_what_is_there_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('\ufeff{"a": [1, 2.5, "ü", null]}', encoding="utf-8")
    assert read_mapping(file) == read_json(file) == {"a": [1, 2.5, "ü", None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "malformed JSON"),
        (b'"\xff"', "malformed JSON"),
        (b"[1]", "must hold a JSON object, holds a list"),
        (b"", "malformed JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed JSON"),
    ],
)
def test_what_is_no_mapping_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "codec.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"codec\.json: {message}"):
        read_mapping(file)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: cannot be read"):
            read_json(path)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 100_000])
def test_depth_is_bounded(depth):
    """A deeply nested file ended in a RecursionError: at once, or in whatever walked the value later."""
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        with pytest.raises(ValueError, match=f"here: malformed JSON: nested more than {MAX_DEPTH} deep"):
            parse_json(opened * depth + "1" + closed * depth, "here")


def test_what_is_wide_or_just_deep_enough_is_read():
    wide, deep = json.dumps([[1]] * 5000), "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert len(parse_json(wide, "here")) == 5000
    assert parse_json(deep, "here")


def test_size_is_looked_at_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_BYTES", 10)
    file = tmp_path / "a.json"
    file.write_text('{"a": 123456}')
    with pytest.raises(ValueError, match=r"a\.json: has 13 bytes, more than the limit of 10"):
        read_json(file)

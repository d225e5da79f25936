"""How a codec's class is found again."""

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from zipper_lm.codecs import codec
from zipper_lm.codecs.codec import CODEC_FILE, ENTRY_POINTS, can_decode, codec_hash, load_codec
from zipper_lm.codecs.text import TextCodec


class Letters:
    """Somebody else's codec: only as much as loading needs."""

    kind = "letters"

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Letters":
        assert (Path(path) / CODEC_FILE).is_file()
        return cls()


def test_a_codec_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CODEC_FILE).write_text(json.dumps({"kind": "letters"}))
    with pytest.raises(ValueError, match=r"kind 'letters'; known kinds are .*'speech'.*'text'"):
        load_codec(tmp_path)

    def named(group: str) -> EntryPoints:
        assert group == ENTRY_POINTS
        return EntryPoints([EntryPoint("letters", f"{__name__}:Letters", group)])

    monkeypatch.setattr(codec, "entry_points", named)
    assert type(load_codec(tmp_path)).__name__ == "Letters"


def test_a_codec_that_decodes_no_empty_batch_can_decode_others() -> None:
    """It was tried out with an empty batch: another package's codec that refuses one lost its values in `generate`."""

    class Rows:
        def decode(self, ids: list[list[int]]) -> list[str]:
            longest = max(map(len, ids))
            return ["".join(map(str, row)).ljust(longest) for row in ids]

    with pytest.raises(ValueError, match="empty"):
        Rows().decode([])
    assert can_decode(Rows())  # type: ignore[arg-type]


def test_no_codec(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no codec\.json in"):
        load_codec(tmp_path)


def test_a_saved_codec_is_the_same_codec(tmp_path: Path) -> None:
    """A tokenizer's files say whether it came from a folder; the codec does not change by that."""
    codec = TextCodec.train(["one two"], vocab_size=32)
    codec.save_pretrained(tmp_path)
    assert codec_hash(load_codec(tmp_path)) == codec_hash(codec)
    assert codec_hash(TextCodec.train(["one two"], vocab_size=32, lower=False)) != codec_hash(codec)


def test_a_codec_is_told_by_what_its_ids_depend_on(tmp_path: Path) -> None:
    """Prepared data was refused when the model inside a codec came from another place, or a voice was changed."""

    class Units:
        def __init__(self, source: str, weights: str, speaker: int) -> None:
            self.said = {"model": {"source": source, "weights_hash": weights}, "speaker": speaker, "layout": {"bos": 1}}

        def save_pretrained(self, path: str) -> None:
            (Path(path) / "codec.json").write_text(json.dumps(self.said))
            (Path(path) / "vocoder").mkdir()
            (Path(path) / "vocoder" / "config.json").write_text(str(self.said["speaker"]))

    def told(*args: Any) -> str:
        return codec_hash(Units(*args))  # type: ignore[arg-type]

    assert told("someone/hubert", "a" * 64, 0) == told("elsewhere/hubert", "a" * 64, 1)
    assert told("someone/hubert", "a" * 64, 0) != told("someone/hubert", "b" * 64, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold a JSON object, holds a list"),
        ("{", "malformed JSON"),
        ('{"a":' * 2000 + "1" + "}" * 2000, "malformed JSON: nested"),
        ('{"kind": ["text"]}', r"kind \['text'\]"),
    ],
)
def test_a_codec_file_that_is_none_is_named(content: str, message: str, tmp_path: Path) -> None:
    """A list ended in an AttributeError, a deep one in a RecursionError, a list as kind in a TypeError."""
    (tmp_path / CODEC_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"codec\.json.*{message}"):
        load_codec(tmp_path)

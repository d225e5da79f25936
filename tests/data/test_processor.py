import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny import tiny_backbone, tiny_model

from zipper_lm import Document, Segment, ZipperModel, ZipperProcessor
from zipper_lm.codecs.codec import make_codec
from zipper_lm.data.collation import Specials


class Letters:
    """A codec of the twenty-six letters."""

    kind: ClassVar[str] = "letters"
    vocab_size, bos_id, eos_id, pad_id, rate = 29, 0, 1, 2, None

    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        for value in values:
            if not isinstance(value, str) or not (value.isascii() and value.islower()):
                raise ValueError(f"letters: cannot read {value!r}")
        return [[ord(c) - 94 for c in value] for value in values]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(chr(i + 94) for i in row) for row in ids]

    def save_pretrained(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "codec.json").write_text(json.dumps({"kind": self.kind}))


SPECIALS = {"text": Specials(0, 1, 2), "speech": Specials(5, 6, 7)}


def test_encode_and_collate() -> None:
    processor = ZipperProcessor({"text": Letters()}, SPECIALS)
    given = [Document([("text", "abc"), Segment("speech", ids=[9]), ("text", "z")])]
    encoded = processor.encode(given)
    assert [s.ids for s in encoded[0]] == [[3, 4, 5], [9], [28]]
    assert given[0][0].ids is None  # not changed
    batch = processor(given)
    assert batch["text"]["input_ids"].tolist() == [[0, 3, 4, 5, 1, 0, 28, 1]]
    assert list(processor.specials) == ["speech", "text"]


def test_decode_leaves_out_what_is_no_content() -> None:
    assert ZipperProcessor({"text": Letters()}).decode("text", [[0, 3, 1, 4, 30, -1], []]) == ["ab", ""]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document([("text", "ABC")]), "document 1: text: letters: cannot read 'ABC'"),
        (Document([("smell", "rose")]), "document 1: unknown modality 'smell'"),
        (Document([("speech", "a.wav")]), "no codec for modality 'speech'"),
        (Document([Segment("text", ids=[29])]), "document 1: text id 29 out of range, the codec has ids 0 to 28"),
    ],
)
def test_what_cannot_be_encoded(document: Document, message: str) -> None:
    processor = ZipperProcessor({"text": Letters()}, SPECIALS)
    with pytest.raises(ValueError, match=message):
        processor.encode([Document([("text", "abc")]), document])


def test_decode_leaves_out_what_lies_between_special_ids_and_units() -> None:
    """A published tower with ids that the codec has no use for may write them all the same."""
    processor = ZipperProcessor({"protein": make_codec("sequence", alphabet="LAGV", offset=4, bos=0, pad=1, eos=9)})
    assert processor.decode("protein", [[4, 3, 2, 7, 8, 0, 9, 30]]) == ["LV"]


def test_a_codec_needs_its_tower() -> None:
    with pytest.raises(ValueError, match=r"codecs for \['text'\]"):
        ZipperProcessor({"text": Letters()}, {"speech": SPECIALS["speech"]})


def test_round_trip(tmp_path: Path) -> None:
    ZipperProcessor({}, SPECIALS).save_pretrained(tmp_path / "new")
    assert ZipperProcessor.from_pretrained(tmp_path / "new").specials == SPECIALS
    with pytest.raises(ValueError, match=r"no processor_config.json"):
        ZipperProcessor.from_pretrained(tmp_path)


def test_a_codec_that_only_the_caller_has(tmp_path: Path) -> None:
    """It could be fused and saved, and never loaded again."""
    processor = ZipperProcessor({"text": Letters()}, SPECIALS)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="kind 'letters'"):
        ZipperProcessor.from_pretrained(tmp_path)
    again = ZipperProcessor.from_pretrained(tmp_path, codecs={"text": Letters()})
    assert again.encode([Document([("text", "abc")])])[0][0].ids == [3, 4, 5]


def test_encoding_keeps_all_of_a_segment() -> None:
    segment = Segment("text", ids=[3, 4], target=True, labels=[3, 5])
    assert ZipperProcessor({}, SPECIALS).encode([Document([segment])])[0][0] == segment


def test_a_model_with_codecs_reads_and_writes_values() -> None:
    model = tiny_model(codecs={"text": Letters()})
    written = model.generate(
        [Document([("text", "abc")])], ["text", "speech"], settings={"text": {"max_new_tokens": 4}}
    )
    assert written[0][0].value == "abc"
    text = written[0][1]
    assert text.value == "".join(chr(i + 94) for i in text.ids if 3 <= i < 29)
    assert written[0][2].value is None
    with pytest.raises(ValueError, match="letters: cannot read"):
        model.generate([Document([("text", "abc")])], [("text", "É")])
    towers = {"text": tiny_backbone("llama", 20), "speech": tiny_backbone("gpt2", 53)}
    with pytest.raises(ValueError, match="the codec has 29 ids, the backbone's vocabulary only 20"):
        ZipperModel.fuse(towers, codecs={"text": Letters()})


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", "..", ""])
def test_a_codec_is_a_towers_never_a_path(name: str, tmp_path: Path) -> None:
    """The name of a codec in a downloaded processor_config.json was read from as a path, and written to on saving."""
    ZipperProcessor({}, SPECIALS).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    said = json.loads(file.read_text())
    for change in ({"codecs": [name]}, {"codecs": [name], "specials": {**said["specials"], name: [0, 1, 2]}}):
        file.write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=r"processor_config\.json: .*(codecs for|is no tower's name)"):
            ZipperProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change", [{"codecs": None}, {"specials": [1]}, {"specials": {"text": [0, 1]}}, {"specials": {"text": "abc"}}]
)
def test_a_processor_that_says_something_else_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    ZipperProcessor({}, SPECIALS).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"processor_config\.json: "):
        ZipperProcessor.from_pretrained(tmp_path)

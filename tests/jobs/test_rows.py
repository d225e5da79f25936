"""What training measures on its encoded rows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tiny import tiny_model

from zipper_lm import Document, Segment, ZipSpec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.jobs.recipes.schema import ClipsRecipe, DataRecipe
from zipper_lm.jobs.rows import CHUNK, Joined, encode_rows, measure_stretch, training_rows, validation_rows


def test_stretch_is_measured_on_rows_and_documents() -> None:
    """Documents were left out: whoever brought a JSONL file had no stretch at all."""
    row = {"text": Segment("text", ids=[3] * 4), "speech": Segment("speech", ids=[3] * 39)}
    model = tiny_model()
    measure_stretch(model, [row])
    stretches = {(s.reader, s.source): s.stretch for s in model.config.zip_specs}
    assert stretches == {("text", "speech"): 0.125, ("speech", "text"): 8.0}
    assert model.zip_layer("speech", "text", 0).stretch == 8.0

    model = tiny_model()
    document = Document([row["speech"], row["text"], row["speech"]])
    measure_stretch(model, [document, Document([row["text"]])])
    assert {(s.reader, s.source): s.stretch for s in model.config.zip_specs}["speech", "text"] == 16.0


def test_what_is_excluded_is_not_validated_on_either() -> None:
    """A speaker who was left out still helped to choose the checkpoint."""
    rows = [{"text": str(i), "speaker": "ann" if i % 2 else "bob"} for i in range(10)]
    data = DataRecipe(source={"train": rows, "validation": rows}, exclude={"speaker": ["bob"]}, validation_limit=3)  # type: ignore[arg-type]
    assert [r["text"] for r in validation_rows(data)] == ["1", "3", "5"]
    assert {r["speaker"] for r in training_rows(data)} == {"ann"}
    assert [r["text"] for r in training_rows(replace(data, limit=2))] == ["1", "3"]
    data.exclude["speaker"].append("ann")
    with pytest.raises(ValueError, match=r"'validation' after data\.exclude"):
        validation_rows(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streaming": True, "fraction": 0.5}, r"data\.fraction=0\.5 cannot be drawn from a stream"),
        ({"streaming": True, "clips": ClipsRecipe(source="c")}, r"data\.clips cannot follow a stream"),
        ({"limit": 0}, r"data\.limit must be at least 1, got 0"),  # prepared data took it, and the last rows for -5
        ({"broken_limit": -1}, r"data\.broken_limit must be at least 0, got -1"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataRecipe(source="x", **fields)


def test_rows_stay_unread_until_they_are_encoded() -> None:
    """All rows of a data set were held at once, with the bytes of every sound, until the last was encoded."""
    alive: list[int] = []

    class Sound(str):
        def __del__(self) -> None:
            alive.remove(id(self))

    class Rows:
        """As many sounds as are asked for."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for _ in range(5 * CHUNK):
                sound = Sound("one")
                alive.append(id(sound))
                most.append(len(alive))
                yield {"text": "one", "label": sound}

    most: list[int] = []
    codec = TextCodec.train(["one"])
    encoded = encode_rows(ZipperProcessor({"text": codec}), Rows(), ["text"])
    assert len(encoded) == 5 * CHUNK
    assert max(most) <= 2 * CHUNK


def test_joined_rows() -> None:
    joined = Joined(["a", "b"], [], ["c"])
    assert [*joined] == ["a", "b", "c"]
    assert (joined[-1], joined[1:], len(joined)) == ("c", ["b", "c"], 3)
    with pytest.raises(IndexError):
        joined[3]


def test_a_stretch_that_was_given_stays() -> None:
    model = tiny_model(zips=ZipSpec(layers=2, stretch=3.0))
    measure_stretch(model, [{"text": Segment("text", ids=[3]), "speech": Segment("speech", ids=[3] * 9)}])
    assert {s.stretch for s in model.config.zip_specs} == {3.0}

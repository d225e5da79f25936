"""The rows that a recipe names, and what training measures on them."""

from dataclasses import replace
from typing import Any

import pytest
from tiny import tiny_model

from zipper_lm import Document, Segment, ZipSpec
from zipper_lm.jobs.recipes.schema import ClipsRecipe, DataRecipe
from zipper_lm.jobs.rows import DataSource, measure_stretch


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
    assert [r["text"] for r in DataSource(data).validation_rows()] == ["1", "3", "5"]
    assert {r["speaker"] for r in DataSource(data).training_rows()} == {"ann"}
    assert [r["text"] for r in DataSource(replace(data, limit=2)).training_rows()] == ["1", "3"]
    data.exclude["speaker"].append("ann")
    with pytest.raises(ValueError, match=r"'validation' after data\.exclude"):
        DataSource(data).validation_rows()


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


def test_a_stretch_that_was_given_stays() -> None:
    model = tiny_model(zips=ZipSpec(layers=2, stretch=3.0))
    measure_stretch(model, [{"text": Segment("text", ids=[3]), "speech": Segment("speech", ids=[3] * 9)}])
    assert {s.stretch for s in model.config.zip_specs} == {3.0}

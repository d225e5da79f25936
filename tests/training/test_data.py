"""What training measures on its encoded rows."""

from tiny import tiny_model

from zipper_lm import Document, Segment, ZipSpec
from zipper_lm.training.data import measure_stretch


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


def test_a_stretch_that_was_given_stays() -> None:
    model = tiny_model(zips=ZipSpec(layers=2, stretch=3.0))
    measure_stretch(model, [{"text": Segment("text", ids=[3]), "speech": Segment("speech", ids=[3] * 9)}])
    assert {s.stretch for s in model.config.zip_specs} == {3.0}

"""A batch that is none is refused by name, before a tower runs; `docs/api.md` promises it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import doc, tiny_backbone, tiny_model

from zipper_lm import Document, SingleDecoder, ZipperModel
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.batch_check import STREAM_KEYS
from zipper_lm.data.collation import collate
from zipper_lm.models.baseline.expand import expand

DOCUMENTS = [doc(("speech", [5, 6, 7]), ("text", [4, 9]), target=True), doc(("text", [4]), ("speech", [9, 8]))]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module", params=["ZipperModel", "SingleDecoder"])
def model(request: pytest.FixtureRequest) -> ZipperModel | SingleDecoder:
    if request.param == "ZipperModel":
        return tiny_model()
    codec = TextCodec.train(["one two three", "three one two"], vocab_size=31)
    return expand("text", tiny_backbone("llama", 31), {"text": codec, "speech": codec})


def set_to(key: str, value: Any) -> Change:
    return lambda batch: batch["text"].update({key: value(batch["text"][key]) if callable(value) else value})


CHANGES: list[tuple[Change, str]] = [
    *((lambda b, k=k: b["text"].pop(k), rf"batch\['text'\] lacks \['{k}'\]") for k in (*STREAM_KEYS, "involved")),
    *(
        (
            set_to(k, lambda t: t.float()),
            rf"batch\['text'\]\['{k}'\] is torch.float32, it must be a tensor of torch.int64",
        )
        for k in STREAM_KEYS
    ),
    *(
        (set_to(k, lambda t: t[:, :-1]), rf"batch\['text'\]\['{k}'\] is \[2, 3\], input_ids are \[2, 4\]")
        for k in STREAM_KEYS[1:]
    ),
    (set_to("involved", lambda t: t.long()), r"\['involved'\] is torch.int64, it must be a tensor of torch.bool"),
    (set_to("involved", lambda t: t[:, :1]), r"\['involved'\] is \[2, 1\], it must be \[2, 2\]"),
    (set_to("input_ids", lambda t: t[0]), r"\['input_ids'\] is \[4\], it must be \[batch, time\]"),
    (set_to("input_ids", lambda t: t.tolist()), r"\['input_ids'\] is list"),
    (set_to("colour", torch.zeros(2, 4)), r"batch\['text'\] has \['colour'\], which nothing reads"),
    (set_to("labels", lambda t: t.fill_(99)), "labels: text: token id 99 out of range"),
    (set_to("labels", lambda t: t.fill_(-1)), "labels: text: token id -1 out of range"),
    (set_to("handover", lambda t: t.fill_(3)), r"batch\['text'\]\['handover'\] has 3: it must be a tower from 0 to 1"),
    (set_to("input_ids", lambda t: t.fill_(99)), "text: token id 99 out of range"),
    (lambda b: b["text"].update({k: v[:1] for k, v in b["text"].items()}), r"numbers of rows: \{.*'text': 1"),
    (lambda b: b.update(text=b["text"]["input_ids"]), r"batch\['text'\] is a Tensor: it must hold"),
    (lambda b: b.update(smell=b.pop("text")), "unknown (tower|modality) 'smell'"),
    (lambda b: b.clear(), "no tower has any token"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_each_wrong_batch_is_named(model: Any, change: Change, message: str) -> None:
    """A missing key was a KeyError, a wrong shape or dtype an error of some backbone, a label out of range one of the
    GPU that ends the process."""
    batch = collate(DOCUMENTS, model.specials)
    model(batch)
    batch = {name: {k: v.clone() for k, v in stream.items()} for name, stream in batch.items()}
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(batch)


@pytest.mark.parametrize("batch", [None, [1], torch.zeros(2, 3, dtype=torch.long), {"input_ids": torch.zeros(2, 3)}])
def test_what_is_no_batch(model: Any, batch: Any) -> None:
    with pytest.raises(ValueError, match=r"batch(\['input_ids'\])? is a"):
        model(batch)


@pytest.mark.parametrize(
    ("documents", "kwargs", "message"),
    [
        ([], {}, "no documents"),
        (["one"], {}, "document 0 is a str"),
        ([DOCUMENTS[0], [("text", "one")]], {}, "document 1 is a list"),
        (DOCUMENTS[0], {}, "this is one Document"),
        (DOCUMENTS, {"side": "top"}, "side must be 'left' or 'right', got 'top'"),
        (DOCUMENTS, {"towers": ["text", "smell"]}, r"towers names \['smell'\]"),
        (DOCUMENTS, {"involved": [["text"]]}, "involved has 1 rows, there are 2 documents"),
        ([Document([("text", "one")])], {}, "has no ids"),
    ],
)
def test_what_cannot_be_collated(model: Any, documents: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(documents, model.specials, **kwargs)
    if not kwargs and documents and message != "has no ids":
        from zipper_lm import ZipperProcessor

        with pytest.raises(ValueError, match=message):
            ZipperProcessor({}, model.specials)(documents)

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, limits, often_ending, tiny_backbone, tiny_model
from transformers import GenerationConfig

from zipper_lm import Document, Segment, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion.zips import ZipLayer
from zipper_lm.generation.generate import StreamedToken

RAGGED = [doc(("speech", [5, 6, 7, 8])), doc(("text", [5, 6]), ("speech", [9]))]


def test_memory_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per zip layer once for every finished segment, and never while a segment is written."""
    model = tiny_model(gate=0.5)  # 2 directions, 3 layers
    widths: list[int] = []
    real = ZipLayer.remember

    def counting(self: ZipLayer, states: torch.Tensor, *rest: Any) -> Any:
        widths.append(states.shape[1])
        return real(self, states, *rest)

    monkeypatch.setattr(ZipLayer, "remember", counting)
    settings = limits(model, 20, min_new_tokens=20)
    model.generate([doc(("speech", [5, 6, 7, 8]))], ["text"], settings=settings)
    assert widths == [6] * 3
    widths.clear()
    model.generate([doc(("speech", [5, 6, 7, 8]))], ["text", "speech", "text"], settings=settings)
    # speech given, text written, speech written: each read once; of the second speech only the new tokens.
    assert widths == [6] * 3 + [22] * 3 + [22] * 3


def test_what_is_given_is_kept_and_not_changed() -> None:
    model = tiny_model(gate=0.5)
    before = ids_of(RAGGED)
    written = model.generate(RAGGED, ["text"], settings=limits(model, 3))
    assert ids_of(RAGGED) == before
    assert [row[:-1] for row in ids_of(written)] == before
    assert [d[-1].modality for d in written] == ["text", "text"]


def test_given_segments_in_a_schedule() -> None:
    model = tiny_model(gate=1.0)
    schedule = ["text", Segment("speech", ids=[9, 8, 7]), "text"]
    written = model.generate(RAGGED, schedule, settings=limits(model, 4))
    for row, given in zip(written, RAGGED):
        assert row.modalities[len(given) :] == ["text", "speech", "text"]
        assert row[-2].ids == [9, 8, 7]
        # The same in two calls: what was written and given is then simply given.
        again = model.generate([Document(row.segments[:-1])], ["text"], settings=limits(model, 4))
        assert ids_of(again) == ids_of([row])


def test_own_settings_for_each_tower() -> None:
    model = tiny_model(gate=0.5)
    settings = {"text": {"max_new_tokens": 3, "min_new_tokens": 3}, "speech": GenerationConfig(max_new_tokens=5)}
    row = model.generate(RAGGED[:1], ["text", "speech"], settings=settings)[0]
    assert len(row[1].ids) == 3
    assert len(row[2].ids) <= 5
    assert settings["speech"].eos_token_id is None  # type: ignore[union-attr]  # not changed
    special = model.specials
    assert not {special["text"].bos, special["text"].pad} & set(row[1].ids)


def test_documents_that_start_with_nothing() -> None:
    model = tiny_model(gate=1.0)
    written = model.generate([Document(), doc(("speech", [4])), Document()], ["text"], settings=limits(model, 5))
    assert written[0][0].ids == written[2][0].ids
    alone = model.generate([Document()], ["text", "speech"], settings=limits(model, 5))[0]
    assert alone.modalities == ["text", "speech"]
    assert model.generate([], ["text"]) == []


@pytest.mark.parametrize(
    ("documents", "schedule", "settings", "message"),
    [
        (RAGGED, ["smell"], {}, r"schedule names 'smell'.*\['speech', 'text'\]"),
        (RAGGED, [("smell", "rose")], {}, "schedule names 'smell'"),
        (RAGGED, "smell", {}, "schedule names 'smell'"),
        (RAGGED, [], {}, "non-empty list"),
        (RAGGED, ["text"], {"smell": {}}, r"settings name \['smell'\]"),
        (RAGGED, ["text"], {"speech": {"num_return_sequences": 2}}, "'speech': Greedy .* `num_return_sequences`"),
        (RAGGED, ["text"], {"speech": {"assistant_early_exit": 2}}, "assistant_early_exit=2"),
        (RAGGED, ["text"], {"speech": {"max_new_token": 2}}, r"settings for 'speech': unknown \['max_new_token'\]"),
        ([doc(("smell", [1]))], ["text"], {}, "unknown modality 'smell'"),
        ([doc(("text", [31]))], ["speech"], {}, "text: token id 31 out of range"),
        ([doc(("text", [-1]))], ["speech"], {}, "text: token id -1 out of range"),
        (RAGGED, [Segment("text", ids=[99])], {}, "text: token id 99 out of range"),
        ([Document([("text", "raw")])], ["speech"], {}, "no codec for modality 'text'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("processor", [True, False])
def test_impossible_requests(documents: list, schedule: object, settings: dict, message: str, processor: bool) -> None:
    model = tiny_model()
    if not processor:
        model.processor = None
        message = message.replace(
            "no codec for modality 'text'", "text has a raw value, but the model has no processor"
        )
    with pytest.raises(ValueError, match=message):
        model.generate(documents, schedule, settings=settings)


# --- who speaks next ---------------------------------------------------------------------------------------------


LAYOUTS = [
    doc(("text", [4, 5, 6]), ("speech", [5, 6, 7]), target=True),
    doc(("text", [20, 21]), ("text", [7]), ("speech", [9, 9]), target=True),
]


@pytest.fixture(scope="module")
def taught() -> ZipperModel:
    """A tiny model that has learned two layouts by heart."""
    torch.manual_seed(0)
    towers = {"text": tiny_backbone("llama", 31, 2), "speech": tiny_backbone("qwen3", 53, 2)}
    model = ZipperModel.fuse(towers, zips=ZipSpec(layers=1, gate_start=0.3), handover_weight=1.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = collate(LAYOUTS, model.specials)
    for _ in range(80):
        out = model(batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.loss < 0.5, "else this test says nothing"
    return model.eval()


def test_auto_follows_what_was_learned(taught: ZipperModel) -> None:
    starts = [Document(LAYOUTS[k].segments[:1]) for k in (0, 1, 1, 0)]
    written = taught.generate(starts, "auto", settings=limits(taught, 6))
    assert ids_of(written) == ids_of([LAYOUTS[k] for k in (0, 1, 1, 0)])  # in the order given, though rows part ways
    assert ids_of(taught.generate(starts[1:2], "auto", settings=limits(taught, 6))) == ids_of(LAYOUTS[1:])


def test_auto_from_nothing(taught: ZipperModel) -> None:
    """Every training document began with text."""
    written = taught.generate([Document()], "auto", max_segments=1, settings=limits(taught, 4))
    assert written[0].modalities == ["text"]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_max_segments(most: int) -> None:
    model = tiny_model(gate=0.5)
    with torch.no_grad():
        for head in model.handover.values():
            head[1].weight.zero_()
            head[1].bias.copy_(torch.tensor([0.0, 5.0, -5.0]))  # always text, never done
    written = model.generate(RAGGED, "auto", max_segments=most, settings=limits(model, 2))
    assert [d.modalities[len(g) :] for d, g in zip(written, RAGGED)] == [["text"] * most] * 2


# --- streaming ---------------------------------------------------------------------------------------------------


def test_a_stream_is_the_document() -> None:
    model = tiny_model(gate=1.0)
    document, schedule = RAGGED[1], ["text", "speech", "text"]
    expected = model.generate([document], schedule, settings=limits(model, 6))[0]
    tokens, stream = [], model.stream(document, schedule, settings=limits(model, 6))
    while True:
        try:
            tokens.append(next(stream))
        except StopIteration as end:
            result = end.value
            break
    assert ids_of([result]) == ids_of([expected])
    flat = [StreamedToken(s.modality, i, n) for n, s in enumerate(expected) if n >= 2 for i in s.ids or []]
    assert tokens == flat


@pytest.mark.parametrize(
    "more",
    [
        {"do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"forced_eos_token_id": 1},
    ],
    ids=str,
)
def test_a_streams_tokens_are_the_plain_calls(more: dict[str, object]) -> None:
    """Proposed tokens may be accepted together with EOS and beyond it: these are in no document."""
    model, given = often_ending(tiny_model(gate=0.5)), doc(("speech", [5, 6, 5, 6]), ("text", [9, 10, 9, 10, 9]))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model.generate(given, ["text", "speech", "text"], settings=limits(model, 8, **more))
        torch.manual_seed(seed)
        streamed = list(model.stream(given, ["text", "speech", "text"], settings=limits(model, 8, **more)))
        flat = [StreamedToken(s.modality, i, n) for n, s in enumerate(expected) if n >= 2 for i in s.ids or []]
        assert streamed == flat


def test_a_stream_keeps_to_the_autocast_around_it() -> None:
    """Its thread had none, as autocast is each thread's own: it wrote other tokens than `generate` beside it."""
    model = tiny_model(gate=0.5)
    seen: list[torch.dtype] = []
    model.tower("text").backbone.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[2].dtype))
    for half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            list(model.stream(RAGGED[0], ["text"], settings=limits(model, 2)))
        assert set(seen) == {torch.bfloat16 if half else torch.float32}
        seen.clear()


def test_ids_that_the_codec_has_not_are_not_written() -> None:
    """A tower with more ids than its codec wrote some that nothing can decode, and that `generate` refused to read."""
    model = tiny_model(gate=0.5)
    model.processor = SimpleNamespace(
        codecs={"speech": SimpleNamespace(vocab_size=11)}, encode=lambda documents: documents
    )  # type: ignore[assignment]
    settings = {"speech": {"max_new_tokens": 30, "do_sample": True}}
    written = model.generate([doc(("text", [5, 6]))] * 8, ["speech"], settings=settings, decode=False)
    ids = [i for d in written for i in d[-1].ids or []]
    assert len(ids) > 20
    assert max(ids) < 11


def test_a_stream_closed_early_stops_the_work() -> None:
    model = tiny_model(gate=1.0)
    steps = []
    model.tower("text").layers[0].register_forward_hook(lambda *_: steps.append(1))
    stream = model.stream(RAGGED[0], ["text"], settings=limits(model, 2000, min_new_tokens=2000))
    first = next(stream)
    stream.close()
    assert first.modality == "text"
    assert len(steps) < 1900
    done = len(steps)
    assert next(iter(model.stream(RAGGED[0], ["text"], settings=limits(model, 1)))) == first
    assert len(steps) > done


def test_an_error_reaches_the_reader_of_a_stream() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="schedule names 'smell'"):
        list(model.stream(RAGGED[0], ["smell"]))


def test_only_one_document_can_be_streamed() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="one document at a time, got 2"):
        model.generate(RAGGED, ["text"], on_token=lambda _: True)

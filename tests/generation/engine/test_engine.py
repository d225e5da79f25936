"""An engine writes what the plain path writes, token for token, whoever else it writes for."""

import gc
import os
import random
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import doc, ids_of, often_ending, open_gates, tiny_backbone, tiny_model

from zipper_lm import Document, Engine, Segment, ZipperModel, combine
from zipper_lm.fusion.interface import PADDING_FAULT
from zipper_lm.generation.engine import capture
from zipper_lm.generation.engine import step as step_module
from zipper_lm.generation.engine.handle import EngineClosed, EngineFull
from zipper_lm.generation.request import Request

RAGGED = [
    doc(("speech", [5, 6, 7, 8, 9, 10, 11])),
    doc(("text", [5, 6, 7, 8, 9])),
    doc(("text", [4]), ("speech", [12, 13]), ("text", [7, 8])),
    doc(("speech", [])),
]
WITH_IMAGES = [*RAGGED, doc(("image", [9, 8, 7]), ("text", [6])), doc()]
SAMPLED = {"do_sample": True, "seed": 7, "temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.01}
BEST_OF = {"do_sample": True, "seed": 3, "num_return_sequences": 3}
MORE: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.7},
    {"stop_threshold": 0.05},
    SAMPLED,
    {**SAMPLED, "guidance_scale": 0.6},
    BEST_OF,
    {"repetition_penalty": 1.5, "min_new_tokens": 3, "suppress_tokens": [5, 6]},
    {"output_scores": True},
]


def lively(towers: int = 2, **kwargs: Any) -> ZipperModel:
    return often_ending(tiny_model(towers, gate=1.0, **kwargs)).eval()


def limits(model: ZipperModel, **more: Any) -> dict[str, dict[str, Any]]:
    return {name: {"max_new_tokens": 9, **more} for name in model.names}


def segments_of(documents: list[Document]) -> list[Segment]:
    return [segment for document in documents for segment in document]


def check_same(model: ZipperModel, engine: Engine, documents: list[Document], schedule: Any, **more: Any) -> None:
    """The engine's ids and log-probabilities are the plain path's."""
    how = limits(model, **more)
    plain = model.generate(documents, schedule, settings=how)
    ours = model.generate(documents, schedule, settings=how, engine=engine)
    assert ids_of(ours) == ids_of(plain)
    for one, other in zip(segments_of(ours), segments_of(plain)):
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", MORE, ids=lambda more: ",".join(more) or "greedy")
@pytest.mark.parametrize(
    ("towers", "documents", "schedule"),
    [(2, RAGGED, ["text"]), (2, RAGGED, ["speech", "speech", "text", "speech"]), (3, WITH_IMAGES, ["image", "text"])],
)
def test_it_writes_what_the_plain_path_writes(
    towers: int, documents: list[Document], schedule: list[str], more: dict[str, Any]
) -> None:
    """Three rows for up to six documents, read in chunks of five tokens: some wait, and rows are used again."""
    model = lively(towers)
    with Engine(model, slots=3, compile=False, chunk=5) as engine:
        check_same(model, engine, documents, schedule, **more)


@pytest.mark.parametrize(
    ("kind", "more"), [("mistral", {}), ("lfm2", {"guidance_scale": 1.7}), ("lfm2", BEST_OF), ("mamba", {})]
)
def test_other_families(kind: str, more: dict[str, Any]) -> None:
    """A window smaller than the streams; a recurrent state in some layers or in all. Rows that rest wait for others
    (best of n), and what they have read goes on in a further segment: a state that was fed on meanwhile would not."""
    model = lively(kinds={"text": kind})
    with Engine(model, slots=3, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text", "text", "speech", "text"], **more)
        assert engine._lanes["text"].step is not None


def test_a_tower_that_is_not_captured_is_written_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are written beside it."""
    model = lively()
    interface = replace(model.tower("text").interface, faults=(PADDING_FAULT,))
    monkeypatch.setattr(model.tower("text"), "interface", interface)
    with Engine(model, slots=3, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text", "speech", "text"])
        assert engine._lanes["text"].step is None
        assert engine._lanes["speech"].step is not None


def test_the_model_says_who_speaks() -> None:
    model = lively(3)
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, WITH_IMAGES, "auto")


def test_given_segments_between() -> None:
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text", Segment("speech", ids=[9, 9, 8]), "text"])


def test_a_projection_before_another_layer_and_other_zips() -> None:
    from zipper_lm import ZipSpec

    zips = ZipSpec(layers=3, gate_start=1.0, positions="rotary", feed_forward=True, stretch=2.0, scale=1.5)
    model = lively(zips=zips)
    with Engine(model, slots=3, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text", "speech", "text"])


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_embeddings_that_others_read(text: str) -> None:
    """What enters the first layer is kept as it is written, beside layers' states or alone."""
    from zipper_lm import ZipSpec

    zips = [ZipSpec(layers=3, gate_start=1.0), ZipSpec(reader="speech", layers=[1, 4], source_layers=[-1, 2])]
    model = lively(kinds={"text": text}, zips=[*zips, ZipSpec(reader="text", source_layers="embeddings", layers=2)])
    with Engine(model, slots=3, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text", "speech", "text", "speech"])


@pytest.mark.parametrize("chunk", [2, 512])
def test_neighbours_that_others_read_with_a_token(chunk: int) -> None:
    """A segment is read in chunks, and the end of what was written after the rest: neighbours come later."""
    from zipper_lm import ZipSpec

    model = lively(zips=ZipSpec(layers=3, gate_start=1.0, context=2))
    with Engine(model, slots=3, compile=False, chunk=chunk) as engine:
        check_same(model, engine, RAGGED, ["text", "speech", "text", "speech"])


def test_adapters() -> None:
    model = tiny_model(2, gate=1.0, train={"text": "lora"})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model = often_ending(model).eval()
    with Engine(model, slots=3, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text", "speech"])


def test_lengths_of_the_whole_stream() -> None:
    """One document at a time: beside a longer one, the plain path counts padding."""
    model = lively()
    with Engine(model, slots=3, compile=False) as engine:
        for document in RAGGED:
            check_same(model, engine, [document], ["text"], min_length=12, max_length=20, max_new_tokens=None)
        how = limits(model, max_length=4, max_new_tokens=None)
        with pytest.raises(ValueError, match="max_length=4, but 8 tokens are read"):
            model.generate(RAGGED[2], ["text"], settings=how, engine=engine)


def test_half_precision() -> None:
    """In bfloat16 a row is rounded otherwise in a batch of another size, on the plain path, too: what parts there were
    two tokens alike likely. Among an engine's rows, neighbours change nothing."""
    model = lively().to(torch.bfloat16)
    draw = random.Random(0)
    documents = [doc(("speech", [draw.randint(3, 50) for _ in range(draw.randint(1, 20))])) for _ in range(24)]
    how = limits(model, output_scores=True)
    plain = [model.generate(d, ["text"], settings=how)[-1] for d in documents]
    found = []
    for slots in (4, 8):
        with Engine(model, slots=slots, compile=False) as engine:
            found.append([d[-1] for d in model.generate(documents, ["text"], settings=how, engine=engine)])
    for one, few, many in zip(plain, *found):
        assert few.ids == many.ids
        for place, (ours, theirs) in enumerate(zip(few.ids or [], one.ids or [])):
            assert few.logprobs is not None
            assert one.logprobs is not None
            assert abs(few.logprobs[place] - one.logprobs[place]) < 0.15
            if ours != theirs:
                break


def test_zips_that_were_trained_apart() -> None:
    """Each segment is written with the towers of its groups."""
    shared = tiny_backbone("llama", 31)
    parts = []
    for other, kind, seed in (("speech", "gpt2", 1), ("image", "qwen3", 2)):
        part = ZipperModel.fuse({"text": shared, other: tiny_backbone(kind, 41, seed=seed)})
        open_gates(part, 1.0)
        parts.append(part)
    model = combine(parts).eval()
    documents = [doc(("speech", [5, 6, 7])), doc(("image", [9, 8])), doc(("speech", [5]), ("image", [7, 8]))]
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, documents, ["text"])
        check_same(model, engine, documents[:1], ["text", "image"])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6))
def test_who_else_is_written_changes_nothing(seed: int) -> None:
    """Documents join and leave at random, some are cancelled, each has settings of its own."""
    draw = random.Random(seed)
    model = draw.choice(_LIVELY)
    documents = [draw.choice(WITH_IMAGES[:5]) for _ in range(6)]
    schedules = [[draw.choice(model.names) for _ in range(draw.randint(1, 3))] for _ in documents]
    chosen = [limits(model, **draw.choice(MORE[:7]), max_new_tokens=draw.randint(1, 12)) for _ in documents]
    wanted = [model.generate([d], s, settings=c)[0] for d, s, c in zip(documents, schedules, chosen)]
    with Engine(model, slots=draw.choice([3, 4, 6]), compile=False, chunk=draw.choice([1, 6, 256])) as engine:
        handles = []
        for document, schedule, how in zip(documents, schedules, chosen):
            handles.append(engine.submit(document, schedule, how))
            if draw.random() < 0.3:
                engine.submit(document, schedule, how).cancel()
            if draw.random() < 0.5:
                time.sleep(0.01)
        found = [handle.result(60) for handle in handles]
    assert ids_of(found) == ids_of(wanted)


_LIVELY = [lively(3), lively(3, kinds={"text": "lfm2", "image": "mamba"})]


def test_columns_are_used_again() -> None:
    """Long after the columns are full, rows are right: everything has moved left, again and again."""
    model = lively()
    with Engine(model, slots=3, compile=False) as engine:
        handles = [engine.submit(RAGGED[n % 4], ["text", "speech"], limits(model)) for n in range(40)]
        wanted = ids_of(model.generate(RAGGED, ["text", "speech"], settings=limits(model)))
        step = engine._lanes["text"].step
        assert [ids_of([h.result(60)])[0] for h in handles] == [wanted[n % 4] for n in range(40)]
        step = engine._lanes["text"].step
        assert step is not None
        assert step.rows.columns == 64


def test_tokens_come_as_they_are_written() -> None:
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        handle = engine.submit(RAGGED[0], ["text", "speech"], limits(model))
        heard = [(t.modality, t.segment, t.id) for t in handle]
        document = handle.result()
        assert heard == [(s.modality, n, i) for n, s in enumerate(document) if n for i in s.ids or []]
        several = engine.submit(RAGGED[0], ["text"], limits(model, do_sample=True, num_return_sequences=2))
        assert [t.id for t in several] == several.result()[-1].ids
        told: list[int] = []
        model.generate(
            [RAGGED[0]], ["text"], settings=limits(model), engine=engine, on_token=lambda t: told.append(t.id) or True
        )
        assert told == document[1].ids


def test_a_judge_chooses() -> None:
    model = lively()
    with Engine(model, slots=3, compile=False) as engine:
        how = limits(model, **BEST_OF)
        shortest = lambda documents, rows: [min(range(len(r)), key=lambda i: len(r[i].ids)) for r in rows]  # noqa: E731
        plain = model.generate(RAGGED, ["text", "speech"], settings=how, choose=shortest)
        ours = model.generate(RAGGED, ["text", "speech"], settings=how, choose=shortest, engine=engine)
        assert ids_of(ours) == ids_of(plain)

        def fails(documents: Any, rows: Any) -> list[int]:
            raise KeyError("no judge")

        with pytest.raises(KeyError, match="no judge"):
            model.generate([RAGGED[0]], ["text"], settings=how, choose=fails, engine=engine)
        check_same(model, engine, RAGGED, ["text"])  # it goes on


def test_who_is_cancelled_makes_room() -> None:
    """Also while it is read; its rows are free, and nobody waits for it."""
    model = lively()
    endless = limits(model, max_new_tokens=4000, min_new_tokens=4000)
    endless["speech"] |= {"max_new_tokens": 200, "min_new_tokens": 200}
    with Engine(model, slots=1, compile=False, chunk=4) as engine:
        first = engine.submit(RAGGED[0], ["text"], endless)
        next(iter(first))
        reading = engine.submit(doc(("speech", [5] * 200)), ["text"], endless)
        waiting = engine.submit(RAGGED[1], ["speech", "text"], limits(model))
        reading.cancel()
        first.cancel()
        assert ids_of([waiting.result(60)]) == ids_of(
            [model.generate(RAGGED[1], ["speech", "text"], settings=limits(model))]
        )
        for handle in (first, reading):
            with pytest.raises(CancelledError):
                handle.result(60)
        assert engine.pending == 0
        assert not engine._lanes["text"].sitting


def test_bounds() -> None:
    model = lively()
    with Engine(model, slots=2, compile=False, tokens=20, memory=6, limit=1) as engine:
        with pytest.raises(ValueError, match=r"'text'.* would read 9 tokens of 'speech', the engine has memory=6"):
            engine.submit(RAGGED[0], ["text"], limits(model))
        with pytest.raises(ValueError, match=r"'text': 1 tokens are read and up to 30 written.* tokens=20"):
            engine.submit(RAGGED[3], ["text"], limits(model, max_new_tokens=30))
        with pytest.raises(ValueError, match=r"its samples take 4 rows, the engine has slots=2"):
            engine.submit(
                RAGGED[3], ["text"], limits(model, do_sample=True, num_return_sequences=2, guidance_scale=2.0)
            )
        later = engine.submit(RAGGED[3], ["speech", "text"], limits(model, max_new_tokens=9, min_new_tokens=9))
        with pytest.raises(EngineFull, match="the limit is 1"):
            engine.submit(RAGGED[3], ["text"], limits(model))
        with pytest.raises(ValueError, match=r"would read \d+ tokens of 'speech', the engine has memory=6"):
            later.result(60)  # what is written counts, too
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit(RAGGED[3], ["text"])


def test_generate_waits_for_room_and_leaves_none_behind() -> None:
    """With more documents than the engine holds, `generate` raised EngineFull in the middle, and cancelled its own
    first ones for it."""
    model = lively()
    with Engine(model, slots=2, compile=False, limit=2) as engine:
        check_same(model, engine, [*RAGGED, *RAGGED], ["text", "speech"])
        assert engine.pending == 0


def test_whoever_waits_for_room_is_told_when_the_engine_ends() -> None:
    model = lively()
    endless = limits(model, max_new_tokens=4000, min_new_tokens=4000)
    with Engine(model, slots=1, compile=False, limit=1) as engine, ThreadPoolExecutor(1) as pool:
        first = engine.submit(RAGGED[0], ["text"], endless)
        next(iter(first))
        waits = pool.submit(engine.submit, RAGGED[1], ["text"], limits(model), wait=True)
        time.sleep(0.1)
        assert not waits.done()
        engine.close(cancel=True)
        with pytest.raises(EngineClosed):
            waits.result(60)


@pytest.mark.parametrize("where", ["choose", "on_token"])
def test_it_can_be_closed_by_what_it_calls(where: str) -> None:
    """It waited for the engine, which waited for it, for ever."""
    model = lively()
    closed = []

    def close(*_: Any) -> list[int]:
        if not closed:
            closed.append(True)
            engine.close()
        return [0]

    with Engine(model, slots=3, compile=False) as engine:
        how = limits(model, **BEST_OF) if where == "choose" else limits(model)
        given = {"choose": close} if where == "choose" else {"on_token": close}
        handle = engine.submit(RAGGED[0], ["text"], how, **given)
        assert len(handle.result(60)) == len(RAGGED[0]) + 1
    assert closed
    assert not engine.alive


@pytest.mark.parametrize("field", ["slots", "chunk", "tokens", "memory", "limit"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5])
def test_sizes_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Engine: {field} must be"):
        Engine(_LIVELY[0], **{field: value})


def test_what_is_refused() -> None:
    model = lively()
    with pytest.raises(ValueError, match="weights must be None, 'bf16' or 'int8', got 'int4'"):
        Engine(model, weights="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training mode"):
        Engine(model.train())
    model.eval()
    with Engine(model, compile=False) as engine, pytest.raises(ValueError, match="another model"):
        lively().generate(RAGGED, ["text"], engine=engine)
    with pytest.raises(ValueError, match="needs a ZipperModel"):
        Engine(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_closed_while_busy() -> None:
    model = lively()
    endless = limits(model, max_new_tokens=200, min_new_tokens=200)
    engine = Engine(model, slots=1, compile=False)
    running, waiting = (engine.submit(RAGGED[3], ["text"], endless) for _ in range(2))
    next(iter(running))
    engine.close(cancel=True)
    for handle in (running, waiting):
        with pytest.raises(CancelledError):
            handle.result(5)
    finished = Engine(model, slots=1, compile=False)
    handle = finished.submit(RAGGED[0], ["text"], limits(model))
    finished.close()  # what there is is finished
    assert handle.done()
    assert not finished.alive
    assert ids_of([handle.result()]) == ids_of([model.generate(RAGGED[0], ["text"], settings=limits(model))])


def test_weights_that_change_are_noticed() -> None:
    """Who is being written fails, rather than being written by two models; who comes after it is written by the new."""
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text", "speech"])
        before = ids_of(model.generate(RAGGED, ["text", "speech"], settings=limits(model)))
        endless = limits(model, max_new_tokens=150, min_new_tokens=150)
        handle = engine.submit(RAGGED[3], ["text", "speech"], endless)
        next(iter(handle))
        with torch.no_grad():
            for parameter in model.zips.parameters():
                parameter.mul_(-1.5)
        with pytest.raises(RuntimeError, match="weights changed"):
            handle.result(60)
        check_same(model, engine, RAGGED, ["text", "speech"])
        assert ids_of(model.generate(RAGGED, ["text", "speech"], settings=limits(model))) != before


def test_many_threads_submit() -> None:
    model = lively()
    wanted = ids_of(model.generate(RAGGED, ["text", "speech"], settings=limits(model)))
    found: dict[int, Any] = {}
    with Engine(model, slots=4, compile=False) as engine:

        def ask(number: int) -> None:
            found[number] = ids_of([engine.submit(RAGGED[number % 4], ["text", "speech"], limits(model)).result(60)])

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[n] for n in range(12)] == [[wanted[n % 4]] for n in range(12)]


def test_a_step_that_fails_takes_nobody_else_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a step: who sits there is told, and the engine writes on."""
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text"])
        step = engine._lanes["text"].step
        assert step is not None

        def fails() -> None:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(step, "logits_of", fails)
        with pytest.raises(torch.OutOfMemoryError):
            engine.submit(RAGGED[0], ["text"], limits(model)).result(60)
        check_same(model, engine, RAGGED, ["text"])


def test_a_document_that_cannot_sit_down_takes_nobody_else_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that a tensor did not take failed before the document had a row: it was not got rid of, and the engine
    died of that."""
    from zipper_lm.generation.engine.choice import Choice

    model, sit = lively(), Choice.sit
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text"])

        def fails(self: Choice, row: int, *how: Any, **more: Any) -> None:
            raise RuntimeError("value cannot be converted to type float without overflow")

        monkeypatch.setattr(Choice, "sit", fails)
        with pytest.raises(RuntimeError, match="without overflow"):
            engine.submit(RAGGED[0], ["text"], limits(model)).result(60)
        monkeypatch.setattr(Choice, "sit", sit)
        assert engine.alive
        check_same(model, engine, RAGGED, ["text"])


def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between segments the towers read one or two tokens each, those that no step has read."""
    model, sizes, plain = lively(), [], Request.read

    def noted(request: Request, batch: Any) -> None:
        if threading.current_thread().name == "zipper-engine":
            sizes.append(batch.numel())
        plain(request, batch)

    monkeypatch.setattr(Request, "read", noted)
    with Engine(model, slots=1, compile=False) as engine:
        check_same(model, engine, RAGGED[:1], ["text", "speech", "text", "speech"], min_new_tokens=5)
    assert len(sizes) > 3
    assert max(sizes[1:]) <= 2


def test_seeds_make_draws_the_same_alone_and_together() -> None:
    model = lively()
    how = limits(model, **SAMPLED)
    together = ids_of(model.generate(RAGGED, ["text", "speech"], settings=how))
    assert together == ids_of(model.generate(RAGGED, ["text", "speech"], settings=how))
    assert together[0] == ids_of(model.generate(RAGGED[:1], ["text", "speech"], settings=how))[0]
    assert together != ids_of(
        model.generate(RAGGED, ["text", "speech"], settings=limits(model, **{**SAMPLED, "seed": 8}))
    )
    assert (
        ids_of(model.generate([RAGGED[0]] * 2, ["text"], settings=how))[0]
        != ids_of(model.generate([RAGGED[0]] * 2, ["text"], settings=how))[1]
    ), "each document of a call draws for itself"


@pytest.mark.slow
def test_compiled() -> None:
    """Without a compiler the same step runs as it is, so this shows nothing there."""
    model = lively()
    with Engine(model, slots=3, compile=True) as engine:
        for more in (MORE[0], MORE[1], SAMPLED):
            check_same(model, engine, RAGGED, ["text", "speech"], **more)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The same step runs as it is, and it is said once."""
    model = lively()

    def broken(function: Any, **how: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with Engine(model, slots=3, compile=True) as engine:
        check_same(model, engine, RAGGED, ["text", "text"])
        check_same(model, engine, RAGGED, ["text"], **SAMPLED)
    assert sum("no C++ compiler" in record.message for record in caplog.records) == 1


def test_whoever_is_told_of_tokens_need_not_wait_for_them() -> None:
    """A server has no thread for each of its clients."""
    model, told = lively(), []
    with Engine(model, slots=2, compile=False) as engine:
        handle = engine.submit(RAGGED[0], ["text", "speech"], limits(model), on_token=told.append)
        document = handle.result()
        assert list(handle) == []
    assert [[t.id for t in told if t.segment == n] for n in (1, 2)] == [document[1].ids, document[2].ids]
    assert {t.modality for t in told} == {"text", "speech"}


def test_whoever_fails_fails_alone() -> None:
    """An error in one document's `on_token`, or `stop_strings` for a tower without a codec of text, was raised within
    the step: it ended every document that sat in it."""
    model = lively()
    long = limits(model, max_new_tokens=100, min_new_tokens=100)

    def fails(token: Any) -> None:
        raise KeyError("the client is gone")

    with Engine(model, slots=3, compile=False) as engine:
        beside = engine.submit(RAGGED[3], ["text"], long)
        next(iter(beside))
        with pytest.raises(KeyError, match="the client is gone"):
            engine.submit(RAGGED[3], ["text"], long, on_token=fails).result(60)
        with pytest.raises(ValueError, match="'text': stop_strings needs a codec of text"):
            engine.submit(RAGGED[3], ["text"], limits(model, stop_strings=["x"])).result(60)
        assert len(beside.result(60)[-1].ids or []) == 100


def test_others_are_written_while_somebody_chooses() -> None:
    """Samples kept their rows while a judge was asked. When others had filled the columns meanwhile, nothing could move
    left, as the oldest row did not: the step wrote behind its last column, and the engine ended. A judge that asks the
    engine itself waited for rows that it held."""
    model, asked = lively(), threading.Event()
    one = limits(model, min_new_tokens=9)
    wanted = ids_of([model.generate(RAGGED[3], ["text"], settings=one)])
    how = limits(model, **BEST_OF)
    with Engine(model, slots=3, compile=False) as engine:

        def judge(documents: Any, rows: Any) -> list[int]:
            asked.set()
            for _ in range(12):  # more tokens than there are columns
                assert ids_of([engine.submit(RAGGED[3], ["text"], one).result(60)]) == wanted
            return [1]

        found = engine.submit(RAGGED[0], ["text", "speech"], how, choose=judge).result(120)
        assert asked.is_set()
        plain = model.generate([RAGGED[0]], ["text", "speech"], settings=how, choose=lambda *_: [1])
        assert ids_of([found]) == ids_of(plain)


def test_who_is_cancelled_while_somebody_chooses() -> None:
    """Its rows were freed twice, and the engine ended."""
    model, go, asked = lively(), threading.Event(), threading.Event()

    def judge(documents: Any, rows: Any) -> list[int]:
        asked.set()
        go.wait(60)
        return [0]

    with Engine(model, slots=3, compile=False) as engine:
        handle = engine.submit(RAGGED[0], ["text", "speech"], limits(model, **BEST_OF), choose=judge)
        asked.wait(60)
        handle.cancel()
        with pytest.raises(CancelledError):
            handle.result(60)
        go.set()
        check_same(model, engine, RAGGED, ["text", "speech"])


def test_who_is_done_does_not_wait_for_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document whose last token was written went to the end of the line of those that read, chunk by chunk, and kept
    its rows until all had had their turn."""
    model, turns, done = lively(), [], []
    long = doc(("speech", [5] * 200))
    with Engine(model, slots=1, compile=False, chunk=4) as engine:
        plain = engine._turn
        monkeypatch.setattr(engine, "_turn", lambda: turns.append(0) or plain())
        lane = engine._lanes["text"]
        run = lane.run

        def noted() -> Any:
            found = run()
            done.extend([len(turns)] * len(found))
            return found

        monkeypatch.setattr(lane, "run", noted)
        short = engine.submit(RAGGED[3], ["text"], limits(model, max_new_tokens=60, min_new_tokens=60))
        short.add_done_callback(lambda _: done.append(len(turns)))
        readers = [engine.submit(long, ["text"], limits(model)) for _ in range(20)]
        short.result(60)
        assert len(readers) == sum(not reader.done() for reader in readers)
        engine.close(cancel=True)
    assert done == [done[0], done[0] + 1]


def test_least_lengths_together() -> None:
    """`min_length` counted beside `min_new_tokens`; transformers says that the latter takes precedence."""
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, RAGGED[1:2], ["text"], max_new_tokens=30, min_new_tokens=2, min_length=25)


def test_what_needs_no_rows_is_not_refused_for_them() -> None:
    """Beams are written on the plain path: how many rows a step has does not matter to them."""
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, RAGGED[:1], ["text"], num_beams=4, num_return_sequences=4)


def test_autocast() -> None:
    """Keys are float32 there beside values in bfloat16, which a cache of columns did not take: towers were not
    captured."""
    model = lively()
    with torch.autocast("cpu", torch.bfloat16), Engine(model, slots=2, compile=False) as engine:
        assert engine.submit(RAGGED[0], ["text", "speech"], limits(model)).result(60)
        assert {name: capture.fault for name, capture in engine._captures.items()} == {"text": None, "speech": None}


@pytest.mark.parametrize("half", [False, True])
def test_autocast_is_held_to_what_half_precision_keeps(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor without products of bfloat16 they round by how many rows they have: no tower was captured."""
    monkeypatch.setattr(capture, "_distance", lambda *_: 0.02)
    model = lively()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert (capture.learn_capture(model, "text").fault is None) == half


def test_a_step_that_was_too_small_is_gone_before_the_next() -> None:
    """Its hooks refer to it, so it stayed until the collector came by, and both were there at once."""
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        check_same(model, engine, RAGGED, ["text"])
        gc.disable()
        try:
            step = weakref.ref(engine._lanes["text"].step)
            engine.submit(RAGGED[0], ["text"], limits(model, max_new_tokens=100)).result(60)
            assert step() is None
        finally:
            gc.enable()


def test_the_plain_path_is_said_once_for_a_setting(caplog: pytest.LogCaptureFixture) -> None:
    """It was said, and remembered, once for each value: a server's clients may give a thousand."""
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        for seconds in (10.0, 11.0, 12.0):
            model.generate(RAGGED[0], ["text"], settings=limits(model, max_time=seconds), engine=engine)
        assert len(engine._said) == 1
    assert sum("without a captured step" in record.message for record in caplog.records) == 1


def test_training_mode_is_noticed() -> None:
    """What was read then was read with dropout."""
    model = lively()
    try:
        with Engine(model, slots=1, compile=False) as engine:
            long = limits(model, max_new_tokens=150, min_new_tokens=150)
            handle = engine.submit(RAGGED[3], ["text", "speech"], long)
            next(iter(handle))
            model.train()
            with pytest.raises(RuntimeError, match="training mode"):
                handle.result(60)
    finally:
        model.eval()


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_nobody_reads_more_than_a_chunk_between_two_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance a tower's own past was read whole by the bare tower, and a family that cannot go on by several
    tokens read a document whole: others stood still. What has to be read whole is read in another thread now."""
    model, sizes = lively(kinds={"text": kind}), []
    for tower in model.towers.values():

        def noted(ids: torch.Tensor, *args: Any, plain: Any = tower.forward, **how: Any) -> Any:
            if threading.current_thread().name == "zipper-engine":
                sizes.append(ids.shape[1])
            return plain(ids, *args, **how)

        monkeypatch.setattr(tower, "forward", noted)
    document = doc(("text", [5, 6, 7, 8] * 10), ("speech", [9, 8] * 10))
    with Engine(model, slots=2, compile=False, chunk=5) as engine:
        engine._fault("text", None), engine._fault("speech", None)
        sizes.clear()
        check_same(model, engine, [document], ["text", "speech"], guidance_scale=1.5)
    assert max(sizes) <= 8  # a trial's pasts, or a chunk


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told() -> None:
    """It has the engine, but not its thread: a document waited for ever."""
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        engine.submit(RAGGED[3], ["text"], limits(model)).result(60)
        if (child := os.fork()) == 0:
            code = 1
            try:
                engine.submit(RAGGED[3], ["text"], limits(model))
            except EngineClosed as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("schedule", [["text"], ["speech", ("text", [5, 6]), "speech"], "auto"])
@pytest.mark.parametrize("enough", [1, 4, 11])
def test_who_has_heard_enough_gets_what_they_heard(schedule: Any, enough: int) -> None:
    """The plain path returned the document so far when `on_token` said no (and a token that nobody had heard yet); the
    engine raised CancelledError."""
    model = lively()
    entries = (
        schedule if schedule == "auto" else [s if isinstance(s, str) else Segment(s[0], ids=s[1]) for s in schedule]
    )
    document = doc(("speech", [5, 6, 7]), ("text", [4]))

    def written(**how: Any) -> tuple[list[tuple[str, list[int]]], int]:
        told: list[int] = []

        def on_token(token: Any) -> bool:
            told.append(token.id)
            return len(told) < enough

        whole = model.generate(document, entries, settings=limits(model), on_token=on_token, **how)
        return ids_of([whole])[0], len(told)

    with Engine(model, slots=2, compile=False) as engine:
        ours, told = written(engine=engine)
    plain, as_many = written()
    assert told == as_many
    assert [name for name, _ in ours] == [name for name, _ in plain]
    assert ours[:-1] == plain[:-1]
    last = ours[-1][1]
    assert last == plain[-1][1][: len(last)]
    assert len(plain[-1][1]) - len(last) in (0, 1)


def test_only_who_draws_without_a_seed_takes_one_of_torchs() -> None:
    """A greedy document moved the state of torch's generator, and so what a training beside it drew."""
    model = lively()
    with Engine(model, slots=1, compile=False) as engine:
        for more, moves in ({}, False), ({"do_sample": True, "seed": 3}, False), ({"do_sample": True}, True):
            before = torch.get_rng_state()
            engine.submit(RAGGED[0], ["text"], limits(model, **more)).result(60)
            assert torch.equal(before, torch.get_rng_state()) is not moves


def test_after_a_few_mixes_of_settings_one_step_does_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mix of settings that came was compiled, up to 128 times, while others waited."""
    monkeypatch.setattr(step_module, "MOST", 1)
    model = lively()
    with Engine(model, slots=4, compile=False) as engine:
        for more in MORE:
            check_same(model, engine, RAGGED, ["text"], **more)
        step = engine._lanes["text"].step
        assert step is not None
        assert len(step.run_of) == 2

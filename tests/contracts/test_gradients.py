"""Contract 5: after an evaluation pass, training gives every trainable tensor a finite gradient, frozen ones none."""

import pytest
import torch
from tiny import doc, limits, open_gates, tiny_backbone, tiny_model

from zipper_lm import ZipperModel, ZipSpec
from zipper_lm.data.collation import Batch, collate
from zipper_lm.fusion import reading

DOCUMENTS = [
    doc(("speech", [5, 6, 7, 8]), ("text", [4, 9, 3]), ("speech", [4, 5]), target=True),
    doc(("text", [4, 9]), ("speech", [9, 8, 7, 6, 5]), ("text", [5, 6]), target=True),
]
LONELY = [*DOCUMENTS, doc(("text", [7, 8]), target=True), doc(("speech", [7, 8, 9, 10, 11, 12]), target=True)]


def evaluate(model: ZipperModel, batch: Batch) -> None:
    with torch.no_grad():
        model(batch)
    model.generate([DOCUMENTS[0]], ["text", "speech"], settings=limits(model, 3))


@pytest.mark.parametrize("towers", [2, 3])
@pytest.mark.parametrize("choice", [{}, {"text": "full", "speech": "lora"}], ids=str)
@pytest.mark.parametrize("feed_forward", [False, True])
def test_every_trainable_tensor(towers: int, choice: dict[str, str], feed_forward: bool) -> None:
    model = tiny_model(towers, zips=ZipSpec(layers=2, feed_forward=feed_forward), train=choice)
    open_gates(model, 0.1)
    with torch.no_grad():  # LoRA's second matrix starts at zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    extra = [] if towers == 2 else [doc(("image", [3, 4]), ("text", [3]), ("speech", [7]), ("image", [9]), target=True)]
    batch = collate(LONELY + extra, model.specials)
    evaluate(model, batch)
    model.train()
    model(batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_closed_gates_start_moving() -> None:
    """At zero the gates themselves get a gradient, or nothing would ever start."""
    model = tiny_model()
    batch = collate(DOCUMENTS, model.specials)
    evaluate(model, batch)
    model(batch).loss.backward()
    gates = [p for n, p in model.zips.named_parameters() if "gate" in n]
    assert gates
    assert all(g.grad is not None and g.grad.any() for g in gates)


def test_float32_zips_over_bfloat16_towers() -> None:
    backbones = {"text": tiny_backbone("llama", 31).bfloat16(), "speech": tiny_backbone("gpt2", 53)}
    model = ZipperModel.fuse(backbones, zips=ZipSpec(layers=2))
    open_gates(model, 0.1)
    assert {p.dtype for p in model.zips.parameters()} == {torch.float32}
    batch = collate(LONELY, model.specials)
    evaluate(model, batch)
    out = model(batch)
    assert out.logits["text"].dtype == torch.bfloat16
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["sinusoid", "rotary", "none"])
def test_who_sees_nothing_gets_exactly_nothing(
    dtype: torch.dtype, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one tower, and first segments: zero update, no NaN in value or gradient, and no gradient through it."""
    monkeypatch.setattr(reading, "rows_that_see", lambda *_: None)  # rows that see nothing would be left out
    zips = ZipSpec(layers=2, feed_forward=True, positions=positions, gate_start=0.7)  # type: ignore[arg-type]
    model = tiny_model(zips=zips)
    open_gates(model, 0.7)
    model.to(dtype)
    batch = collate(LONELY, model.specials)
    updates = []
    for layer in model.zips["text"]["speech"]:
        layer.register_forward_hook(lambda _m, _a, out: updates.append(out) if isinstance(out, torch.Tensor) else None)
    out = model(batch)
    assert out.loss.isfinite()
    for update in updates:
        update.retain_grad()
    out.loss.backward()
    first = batch["text"]["segments"] == 0  # of a document's first segment nothing came before
    lonely = batch["text"]["involved"].sum(1) < 2
    for update in updates:
        assert update.dtype == dtype
        assert (update[first] == 0).all()
        assert (update[lonely] == 0).all()
        assert update[0].any()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


def test_a_batch_that_sees_nothing_trains_nothing() -> None:
    model = tiny_model(zips=ZipSpec(layers=2, feed_forward=True, gate_start=0.7))
    batch = collate([doc(("text", [7, 8]), target=True), doc(("speech", [5]), target=True)], model.specials)
    model(batch).loss.backward()
    for name, parameter in [*model.zips.named_parameters(), *model.input_projections.named_parameters()]:
        assert parameter.grad is None or not parameter.grad.any(), name


def test_autocast() -> None:
    model = tiny_model(gate=0.3)
    batch = collate(LONELY, model.specials)
    full = model(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(full.item(), rel=0.1)
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("choice", [{}, {"text": "full", "speech": "lora"}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(choice: dict[str, str], reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(gate=0.3, train=choice)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        batch = collate(LONELY, model.specials)
        model(batch).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda m, name=name: f"{name}: {m}")

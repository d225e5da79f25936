"""A step whose documents share rows is the step of a row for each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_model
from tiny_steps import GUIDED, Step, check_as_near_as_it_rounds, check_same, one_step

from zipper_lm import Document, Segment, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion.interface import learn
from zipper_lm.fusion.packing import check_packing
from zipper_lm.fusion.reading import State, read
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.zipper import ZipperModel

FULL = {"text": "full", "speech": "full", "image": "full"}
RAGGED: list[list[tuple[str, int, bool]]] = [  # modality, tokens, whether it is a target
    [("speech", 11, False), ("text", 3, True)],
    [("text", 2, False), ("speech", 5, True)],
    [("speech", 4, False), ("text", 5, True)],
    [("text", 1, False), ("speech", 2, True), ("text", 3, True)],
    [("text", 6, True)],
    [("speech", 2, False), ("text", 0, True)],
    [("text", 4, False), ("speech", 3, True)],
    [("text", 2, False), ("speech", 1, True), ("text", 1, True)],
]
PICTURED = [[("image", 4, False), ("text", 3, True)], [("text", 2, False), ("image", 3, True), ("speech", 2, True)]]


def made(shapes: list[list[tuple[str, int, bool]]]) -> list[Document]:
    """Documents of these shapes, with ids drawn once for all."""
    draw = torch.Generator().manual_seed(0)
    return [
        Document(
            Segment(name, ids=torch.randint(4, 30, (count,), generator=draw).tolist(), target=target)
            for name, count, target in shape
        )
        for shape in shapes
    ]


def zipper(kind: str, towers: int = 2, **more: Any) -> ZipperModel:
    """A model of towers of one family that are trained, without dropout, whose zips matter."""
    kinds = {"text": kind, "speech": kind, "image": "llama"}
    names = list(kinds)[:towers]
    model = tiny_model(towers, gate=0.5, kinds=kinds, train={n: FULL[n] for n in names}, **more)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "mistral"])
def test_gradients_are_those_of_a_row_for_each_document(kind: str) -> None:
    """Of learned and of rotary positions, and of windows smaller than the documents."""
    steps = [one_step(8, 1, zipper(kind), made(RAGGED), GUIDED, packing) for packing in (True, False)]
    assert {"loss_text", "loss_speech", "loss_handover", "loss_guided_attention"} < steps[1][1].keys()
    check_same(*steps)


def test_a_neighbours_segment_is_the_same() -> None:
    """Of a zip with `context`: what stands beside a token in a row may be another document's."""
    zips = ZipSpec(layers=3, gate_start=0.5, context=3)
    steps = [one_step(8, 1, zipper("llama", zips=zips), made(RAGGED), GUIDED, packing) for packing in (True, False)]
    check_same(*steps)


@pytest.mark.parametrize(
    ("towers", "more"),
    [
        (3, {}),
        (2, {"gradient_accumulation_steps": 2}),
        (2, {"gradient_checkpointing": True}),
        (2, {"lora": True}),
    ],
    ids=["three towers", "accumulation", "checkpointing", "lora"],
)
def test_so_they_are_however_a_model_is_trained(towers: int, more: dict[str, Any]) -> None:
    accumulated = more.pop("gradient_accumulation_steps", 1)
    lora = {"train": {"text": "lora", "speech": "frozen"}} if more.pop("lora", False) else {}
    documents = made(RAGGED + (PICTURED if towers == 3 else []))
    steps = []
    for packing in (True, False):
        if lora:
            model = tiny_model(gate=0.5, kinds={"speech": "qwen3"}, **lora)
            adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
            torch.manual_seed(1)
            for parameter in adapters.values():
                torch.nn.init.normal_(parameter.data, std=0.3)
            assert adapters
        else:
            model = zipper("llama", towers)
        batch = -(-len(documents) // accumulated)
        steps.append(one_step(batch, accumulated, model, documents, GUIDED, packing, **more))
    check_same(*steps)


def test_bfloat16_is_as_near_as_it_rounds() -> None:
    """Each tensor was held to three per cent of its largest number: on a processor without products of bfloat16 a scale
    of positions, whose gradient is a sum of what cancels, was off by nine, and packing had no part in it."""
    packed, plain = (one_step(8, 1, zipper("llama"), made(RAGGED), None, on, bf16=True) for on in (True, False))
    check_as_near_as_it_rounds(packed, plain, one_step(8, 1, zipper("llama"), made(RAGGED)))


def test_a_single_decoder_too() -> None:
    def step(packing: bool) -> Step:
        def codec(size: int) -> Any:
            return SimpleNamespace(kind="ids", vocab_size=size, bos_id=0, eos_id=1, pad_id=2)

        torch.manual_seed(0)
        model = expand("text", tiny_backbone("gemma2", 31), {"text": codec(31), "speech": codec(31)})
        return one_step(8, 1, model, made(RAGGED), packing=packing)

    check_same(step(True), step(False))


def test_there_is_less_to_compute() -> None:
    """Else all of this would test rows of one document."""
    documents, specials = made(RAGGED), zipper("llama").specials
    packed, plain = (collate(documents, specials, packing=on) for on in (True, False))
    assert packed["text"]["input_ids"].shape[0] == 6 < plain["text"]["input_ids"].shape[0] == 8
    assert packed.numel() < 0.85 * plain.numel()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_logits_are_those_of_a_row_for_each_document(attention: str) -> None:
    """FlexAttention takes block masks. On a CPU it has no backward pass; that is tried in tests/test_on_a_gpu.py."""
    model = zipper("mistral", 3).eval()
    documents = made(RAGGED + PICTURED)
    plain, packed = (collate(documents, model.specials, packing=on) for on in (False, True))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(plain).logits
        model.set_attn_implementation(attention)
        model.check_packing()
        found = model(packed).logits
    assert model.tower("text").backbone.config._attn_implementation == attention
    for name in plain:
        for number in range(len(documents)):
            here, alone = packed[name]["documents"] == number, plain[name]["segments"][number] >= 0
            torch.testing.assert_close(found[name][here], expected[name][number][alone], rtol=1e-4, atol=1e-4)


def test_towers_of_several_trainings_too() -> None:
    """A segment is computed with the towers of its groups, which are looked for in its own document."""
    model = zipper("llama", 3).eval()
    model.config.groups = [["text", "speech"], ["text", "image"]]
    documents = made(RAGGED + PICTURED + [[("image", 2, False), ("speech", 2, False), ("text", 3, True)]])
    plain, packed = (collate(documents, model.specials, packing=on) for on in (False, True))
    with torch.no_grad():
        assert float(model(packed).loss) == pytest.approx(float(model(plain).loss), rel=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_what_runs_on_into_the_next_document_is_refused_by_name(kind: str) -> None:
    model = tiny_model(kinds={"text": kind})
    with pytest.raises(ValueError, match=r"training.packing: tower 'text': (Mamba|Lfm2)ForCausalLM .* leave"):
        one_step(4, 1, model, packing=True)


def test_masks_that_leak_are_found() -> None:
    """The trial has to see what it looks for: a family that forgets where documents begin."""
    backbone = tiny_backbone("llama", 31)
    check_packing("it", backbone, learn(backbone))
    interface, inner = learn(backbone), backbone.model.forward
    backbone.model.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="lets documents that share a row see each other"):
        check_packing("it", backbone, interface)
    backbone.config.attention_chunk_size = 8192
    with pytest.raises(ValueError, match="attends by chunks of a row"):
        check_packing("it", backbone, interface)


def test_rows_that_documents_share_are_not_gone_on_with() -> None:
    model = zipper("llama")
    batch = collate(made(RAGGED), model.specials, packing=True)
    with pytest.raises(ValueError, match="documents that share rows cannot be gone on with"):
        read(model, batch, State())
    del batch["text"]["documents"]
    with pytest.raises(ValueError, match="share rows in all of its towers or in none"):
        model(batch)

"""What only a GPU can show; skipped where there is none. Where there is one, other tests train and load on it, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import plain_recipe, say, tiny_recipe, workshop
from transformers import AutoModelForCausalLM

from tests.codecs.test_hubert_units import LAYER, WIDTH, encoder
from tests.codecs.test_neural_audio import CODEBOOKS, build, sound
from tests.codecs.test_unit_vocoder import network, published
from tests.codecs.test_vq_image import pictures, save_emu, save_janus
from tests.tiny import ids_of, limits, often_ending, tiny_model
from zipper_lm import Document, Engine, Segment, ZipperModel
from zipper_lm.codecs.codec import make_codec
from zipper_lm.codecs.pretrained import RunsModel
from zipper_lm.data.collation import collate
from zipper_lm.evaluation.preservation import verify
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.reader import build as build_recipe
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.load import load
from zipper_lm.training.memory import OutOfMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ALIKE = 0.95
"""Of ids that have to be the same on both devices: convolutions in TF32 put a few vectors nearer to another code."""


def share_alike(here: list[list[int]], there: list[list[int]]) -> float:
    assert [len(row) for row in here] == [len(row) for row in there]
    return float(np.mean(np.concatenate(here) == np.concatenate(there)))


def reads_and_writes_alike(codec: Any, values: list[Any], tolerance: float) -> None:
    """Ids of the values, and values of those ids, are the CPU's on a GPU; the model is there."""
    assert isinstance(codec, RunsModel)
    here = codec.encode(values)
    back = codec.decode(here)
    codec.to("cuda")
    assert {p.device.type for p in codec.model.parameters()} == {"cuda"}
    assert share_alike(here, codec.encode(values)) >= ALIKE
    for mine, theirs in zip(back, codec.decode(here)):
        assert np.asarray(mine).shape == np.asarray(theirs).shape
        assert np.abs(np.float32(mine) - np.float32(theirs)).mean() <= tolerance * max(1e-6, np.abs(mine).max())


@pytest.mark.parametrize("family", CODEBOOKS)
def test_neural_audio(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    reads_and_writes_alike(make_codec("neural-audio", source=str(tmp_path)), [sound(0.5), sound(0.8, seed=1)], 0.02)


def test_units_of_an_encoder_and_a_vocoder(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path / "encoder")
    np.save(tmp_path / "km.npy", np.random.default_rng(0).standard_normal((12, WIDTH)).astype(np.float32))
    vocoder = published(network(), tmp_path / "vocoder")
    codec = make_codec(
        "hubert-units",
        source=str(tmp_path / "encoder"),
        layer=LAYER,
        codebook=str(tmp_path / "km.npy"),
        vocoder=str(vocoder),
        normalize=True,
    )
    reads_and_writes_alike(codec, [sound(0.5), sound(0.8, seed=1)], 0.02)


@pytest.mark.parametrize(("save", "size"), [(save_emu, {"height": 8, "width": 8}), (save_janus, {})])
def test_pictures(save: Callable[[Path], Path], size: dict[str, int], tmp_path: Path) -> None:
    codec = make_codec("vq-image", source=str(save(tmp_path)), **size)
    side = size.get("height", 6)
    reads_and_writes_alike(codec, pictures(side, side), 0.02)


def test_greedy_search_writes_what_it_writes_on_a_cpu() -> None:
    """In float32, rows of several lengths, in both directions."""
    model = often_ending(tiny_model(gate=0.5)).eval()
    given = {
        target: [Document([Segment(source, ids=list(range(3, 3 + n)))]) for n in (2, 7, 12)]
        for source, target in (("text", "speech"), ("speech", "text"))
    }
    settings = limits(model, 20)
    here = {t: ids_of(model.generate(d, [t], settings=settings)) for t, d in given.items()}
    model.to("cuda")
    assert here == {t: ids_of(model.generate(d, [t], settings=settings)) for t, d in given.items()}


@pytest.mark.parametrize("architecture", ["zipper", "single-decoder"])
def test_fused_in_bfloat16(architecture: str, tmp_path: Path) -> None:
    """Checkpoints in bfloat16, trained under autocast: what is trained is float32 and moves, the frozen tower keeps its
    dtype and its bits, and the model reads and writes."""
    towers: dict[str, Any] = {}
    for name in ("text", "speech"):
        source = tmp_path / name
        source.mkdir()
        for file in (workshop() / name).iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
        towers[name] = {"source": str(source), "train": "full" if name == "speech" else "frozen"}
    if architecture == "single-decoder":
        towers["text"]["train"] = "full"
    plain = plain_recipe(tmp_path / "model", towers=towers, architecture=architecture)
    plain["training"]["arguments"]["bf16"] = True
    record = fuse(build_recipe(FuseRecipe, plain))
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    model = load(tmp_path / "model")
    assert next(model.parameters()).device.type == "cuda"
    dtypes = {p.dtype for p in model.parameters()}
    if architecture == "zipper":
        assert isinstance(model, ZipperModel)
        assert record["frozen_unchanged"] == {"text": True}
        assert {p.dtype for p in model.tower("text").backbone.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.tower("speech").backbone.parameters()} == {torch.float32}
        reports = {r.name: r for r in verify(ZipperModel.from_pretrained(tmp_path / "model"), tmp_path / "model")}
        assert reports["text"].identical
        assert not reports["speech"].identical
    else:
        assert isinstance(model, SingleDecoder)
        assert dtypes == {torch.float32}
    given = [Document([Segment("speech", value=say("one six"))])]
    written = model.generate(given, ["text"], settings={"text": {"max_new_tokens": 4}})
    assert [s.modality for s in written[0]] == ["speech", "text"]


def test_two_runs_are_one(tmp_path: Path) -> None:
    """The same recipe twice gives the same weights to the bit, so that a comparison between GPUs' runs is one of
    recipes."""
    weights = []
    for name in ("first", "second"):
        fuse(tiny_recipe(tmp_path / name, training={"steps": 3, "corrupt": 0.3}))
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_documents_share_rows_by_block_masks_of_flex_attention() -> None:
    """Loss and gradients are those of a row for each document, attended by SDPA."""
    draw = torch.Generator().manual_seed(0)
    lengths = [(90, 12), (20, 3), (33, 6), (41, 9), (7, 2), (64, 11)]
    ids = [[torch.randint(4, 30, (n,), generator=draw).tolist() for n in pair] for pair in lengths]
    documents = [Document([Segment("speech", ids=s), Segment("text", ids=t, target=True)]) for s, t in ids]
    kinds, train = {"text": "mistral", "speech": "llama"}, {"text": "full", "speech": "full"}
    found = []
    for packing in (False, True):
        model = tiny_model(gate=0.5, kinds=kinds, train=train).to("cuda")
        if packing:
            model.set_attn_implementation("flex_attention")
            model.check_packing()
        loss = model(collate(documents, model.specials, packing=packing).to("cuda")).loss
        loss.backward()
        found.append((float(loss), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    for name, gradient in found[0][1].items():
        off = (found[1][1][name] - gradient).norm()
        assert off <= 0.01 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("packing", [False, True])
def test_losses_and_gradients_wait_for_nothing(packing: bool) -> None:
    """What would wait for the GPU raises instead."""
    model = tiny_model(gate=0.5, train={"text": "full", "speech": "full"}, handover_weight=1.0).train().to("cuda")
    pairs = [([5, 6, 7], [8, 9]), ([4], [5, 6, 7, 8]), ([9, 3], [4])]
    documents = [Document([Segment("text", ids=t), Segment("speech", ids=s, target=True)]) for t, s in pairs]
    batch = collate(documents, model.specials, packing=packing)
    model(batch.to("cuda")).loss.backward()  # what is made once may be waited for
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch.to("cuda")).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_an_engine_writes_what_the_plain_path_writes(compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    """By a CUDA graph of each step: that there is none would be said."""
    model = often_ending(tiny_model(gate=1.0)).eval().to("cuda")
    documents = [Document([Segment("speech", ids=list(range(4, 4 + n)))]) for n in (7, 3, 5, 1)]
    with Engine(model, slots=3, compile=compiled) as engine:
        for more in ({}, {"guidance_scale": 1.7}, {"do_sample": True, "seed": 7}, {"repetition_penalty": 1.5}):
            settings = limits(model, 9, **more)
            plain = model.generate(documents, ["text", "speech"], settings=settings)
            written = model.generate(documents, ["text", "speech"], settings=settings, engine=engine)
            assert ids_of(written) == ids_of(plain)
    assert "no CUDA graph" not in caplog.text


@pytest.mark.parametrize("both", [False, True])
def test_towers_apart(both: bool, tmp_path: Path) -> None:
    """On the CPU and a GPU, and on two GPUs: loss, gradients and what is written are those of one device."""
    if both and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    here = often_ending(tiny_model(gate=0.5, train={"text": "full"}))
    here.save_pretrained(tmp_path / "model", bundle_towers=True)
    devices = {"text": "cuda:1" if both else "cpu", "speech": "cuda:0"}
    there = ZipperModel.from_pretrained(tmp_path / "model", device_map=devices)
    assert {n: str(there.tower(n).device) for n in there.names} == devices
    given = [("text", [3, 4, 5, 6]), ("speech", [7, 8, 9])]
    documents = [Document([Segment(n, ids=ids, target=True) for n, ids in order]) for order in (given, given[::-1])]
    batch = collate(documents, here.specials)
    losses = [model.train()(batch).loss for model in (here, there)]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4)
    for loss in losses:
        loss.backward()
    mine, theirs = dict(here.named_parameters()), dict(there.named_parameters())
    for name, parameter in mine.items():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs[name].grad.cpu(), parameter.grad, rtol=1e-2, atol=1e-4)
    prompts = [Document([Segment("text", ids=[3, 4, 5])]), Document([Segment("speech", ids=[7, 8])])]
    for prompt, schedule in zip(prompts, (["speech", "text"], ["text", "speech"])):
        how = {"settings": {n: {"max_new_tokens": 8} for n in here.names}}
        written = [ids_of([model.eval().generate(prompt, schedule, **how)]) for model in (here, there)]
        assert written[0] == written[1]


def test_a_recipe_with_towers_apart(tmp_path: Path) -> None:
    plain = plain_recipe(tmp_path / "output")
    plain["towers"] = {
        "text": {"source": plain["towers"]["text"], "device": "cpu"},
        "speech": plain["towers"]["speech"],
    }
    plain["towers"]["speech"]["device"] = "cuda:0"
    record = fuse(build_recipe(FuseRecipe, plain))
    assert record["steps"] == 2
    model = load(tmp_path / "output")
    assert isinstance(model, ZipperModel)
    verify(model)


def test_a_step_that_does_not_fit_is_told_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row takes a third of the memory that is free while it is read: four do not fit, two do."""
    forward = ZipperModel.forward
    torch.cuda.empty_cache()
    share = torch.cuda.mem_get_info()[0] // 3

    def hungry(self: ZipperModel, batch: Any, **kwargs: Any) -> Any:
        rows = max(len(side["input_ids"]) for side in batch.values()) if self.training else 0
        held = torch.empty(rows * share, dtype=torch.uint8, device="cuda")
        output = forward(self, batch, **kwargs)
        del held
        return output

    monkeypatch.setattr(ZipperModel, "forward", hungry)
    fits = r"training\.batch_size 2 with training\.arguments\.gradient_accumulation_steps 2"
    with pytest.raises(OutOfMemory, match=rf"out of memory on cuda:0 in step 1, with 4 rows .*{fits}"):
        fuse(tiny_recipe(tmp_path / "m"))

"""A plan says what a step will take: it is held against a step that is taken."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny import tiny_backbone
from tiny_recipes import plain_recipe
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from zipper_lm.cli import app
from zipper_lm.cli.plan import text_of
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.data.tasks import parse_task
from zipper_lm.fusion import backbones
from zipper_lm.jobs.cost.devices import DEVICES, find_device
from zipper_lm.jobs.cost.lengths import Lengths, make_rows, read_lengths
from zipper_lm.jobs.cost.outline import _unmade, outline
from zipper_lm.jobs.cost.plan import parameters, plan
from zipper_lm.jobs.cost.step import count_step
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import CodecRecipe, FuseRecipe
from zipper_lm.jobs.towers import build_model
from zipper_lm.training.parameters import parameter_groups
from zipper_lm.training.trainer import DocumentCollator
from zipper_lm.utils import products
from zipper_lm.utils.counting import Counting

LENGTHS = {"text": 21, "speech": 33, "image": 9}
TWO = {"text": 21, "speech": 33}
SIZES = {"text": 31, "speech": 53, "image": 41}


def recipe_of(
    folder: Path,
    kinds: dict[str, str],
    train: dict[str, str] | None = None,
    zips: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **more: Any,
) -> FuseRecipe:
    """A recipe over towers that are written here."""
    towers: dict[str, Any] = {}
    for name, kind in kinds.items():
        tiny_backbone(kind, SIZES[name]).save_pretrained(folder / name)
        towers[name] = {"source": str(folder / name), "train": (train or {}).get(name, "frozen")}
    names = list(kinds)
    plain = {
        "towers": towers,
        "data": str(folder / "nothing"),
        "tasks": {f"{names[1]}->{names[0]}": 1.0, "->".join(names): 1.0},
        "zips": [{"layers": 3, **(zips or {})}],
        "training": {"steps": 10, "batch_size": 4, **(training or {})},
        "output": str(folder / "output"),
        **more,
    }
    return build(FuseRecipe, plain)


def taken(recipe: FuseRecipe) -> tuple[float, nn.Module]:
    """Operations of a step that is taken, with values, by torch's own counter, the mean over tasks; and the model."""
    model = cast(Any, build_model(recipe))
    model.train()
    if recipe.training.arguments.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    rows = make_rows(model, Lengths([LENGTHS], None), recipe.training.batch_size, 0)
    mixture = mixture_of(recipe, rows, model)
    counted = []
    for start in range(0, len(rows), recipe.training.batch_size):
        documents = [mixture[n] for n in range(start, start + recipe.training.batch_size)]
        batch = DocumentCollator(model.specials)(documents)["batch"]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(batch, return_logits=False).loss.backward()
        counted.append(counter.get_total_flops())
    return sum(counted) / len(counted), model


def mixture_of(recipe: FuseRecipe, rows: Any, model: Any) -> Any:
    return TaskMixture(rows, recipe.tasks, seed=recipe.seed, towers=model.names)


CASES: dict[str, Any] = {
    "llama and gpt2, one trained": ({"text": "llama", "speech": "gpt2"}, {"speech": "full"}, {}, {}),
    "LoRA, feed-forward, checkpointing": (
        {"text": "qwen3", "speech": "mistral"},
        {"text": "lora", "speech": "lora"},
        {"feed_forward": True, "projection": "mlp"},
        {"arguments": {"gradient_checkpointing": True}},
    ),
    "all frozen, rotary": ({"text": "gemma2", "speech": "llama"}, {}, {"positions": "rotary"}, {}),
    "three towers, hybrid and recurrent": (
        {"text": "lfm2", "speech": "gpt2", "image": "mamba"},
        {"text": "full"},
        {"positions": "none"},
        {},
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if number > 1 else []) for number, case in enumerate(CASES)]
)
def test_operations_of_a_step(case: str, tmp_path: Path) -> None:
    """Within one per cent of torch's counter over a step that is taken, and so are parameters."""
    kinds, train, zips, training = CASES[case]
    recipe = recipe_of(tmp_path, kinds, train, zips, training)
    if len(kinds) == 2:  # one task, so that all batches are alike
        recipe = with_fields(recipe, tasks={"speech->text": 1.0})
    else:
        recipe = with_fields(recipe, tasks={"text->speech->image": 1.0})
    tasks = {template: parse_task(template, list(kinds)) for template in recipe.tasks}
    model = outline(recipe)
    step = count_step(model, recipe, tasks, Lengths([LENGTHS], None))
    flops, real = taken(recipe)
    assert sum(step.flops.values()) == pytest.approx(flops, rel=0.01)
    found = parameters(model)
    for kind, wanted in (("trained", True), ("frozen", False)):
        of = sum(p.numel() for p in real.parameters() if p.requires_grad is wanted)
        assert sum(part[kind] for part in found.values()) == of


def test_losses_beside_the_model_s_own(tmp_path: Path) -> None:
    """A plan's model has no codecs, and torch tells no shape of what CTC keeps: every recipe with joint CTC was
    refused, those of the demo and of a real LLM among them."""
    task = "speech->text"
    beside = {"ctc": {task: 1.0}, "aligned_attention": {task: 1.0}, "forward_sum": {task: 1.0}, "fade_out": 0.5}
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"}, {"text": "full"}, tasks={task: 1.0})
    tasks, lengths = {task: parse_task(task, ["text", "speech"])}, Lengths([TWO], None)
    alone = count_step(outline(recipe), recipe, tasks, lengths)
    more = with_fields(recipe, training=replace(recipe.training, **beside))
    step = count_step(outline(more), more, tasks, lengths)
    assert alone.calls < step.calls
    assert sum(alone.flops.values()) < sum(step.flops.values())
    # Three layers' heads: forward, and backward to weights and memory; 4 letters a token fit in 3 places of 35 tokens.
    spells = 3 * 6 * 4 * 35 * 3 * 257 * tiny_backbone("llama", 31).config.hidden_size
    with_ctc = with_fields(recipe, training=replace(recipe.training, ctc={task: 1.0}))
    spelled = count_step(outline(with_ctc), with_ctc, tasks, lengths)
    assert sum(spelled.flops.values()) - sum(alone.flops.values()) == pytest.approx(spells, rel=0.01)
    count_step(outline(with_ctc), with_ctc, tasks, Lengths([{"text": 30, "speech": 6}], None))  # each token one letter


def with_fields(recipe: FuseRecipe, **fields: Any) -> FuseRecipe:
    return replace(recipe, **fields)


def test_memory_of_a_step(tmp_path: Path) -> None:
    """The peak, gradients and the optimizer's state are those of a step that is taken, with values."""
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"}, {"speech": "full"})
    recipe = with_fields(recipe, tasks={"speech->text": 1.0})
    tasks = {template: parse_task(template, ["text", "speech"]) for template in recipe.tasks}
    step = count_step(outline(recipe), recipe, tasks, Lengths([LENGTHS], None))
    model = cast(Any, build_model(recipe))
    mixture = mixture_of(recipe, make_rows(model, Lengths([LENGTHS], None), 4, 0), model)
    batch = DocumentCollator(model.specials)([mixture[n] for n in range(4)])["batch"]
    model.train()
    with Counting([*model.parameters(), *model.buffers()]) as counting:
        model(batch, return_logits=False).loss.backward()
    assert step.activations + step.gradients == pytest.approx(counting.peak, rel=0.02)
    groups = parameter_groups(model, tower_learning_rate=1e-3, weight_decay=0.0)
    assert step.gradients == sum(p.nbytes for group in groups for p in group["params"])
    assert step.optimizer == pytest.approx(2 * step.gradients, rel=0.05)  # two numbers for each that has a gradient


def test_a_single_decoder(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"}, {"text": "full"}, architecture="single-decoder")
    device = find_device("h100")
    told = plan(recipe, lambda dtypes: device, lengths=TWO, ways=False)
    assert told["parameters"]["decoder"]["frozen"] == 0
    assert told["flops"]["step"] > 0


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are enough: towers may be as large as they like, and not be there."""
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"})
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(backbones, "load_backbone", None)
    large = {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 2, "vocab_size": 100_000}
    text = tmp_path / "text" / "config.json"
    text.write_text(json.dumps({**json.loads(text.read_text()), **large, "head_dim": 128, "num_attention_heads": 64}))
    told = plan(recipe, lambda dtypes: DEVICES["a100"], lengths=TWO, processes=[8, 64], ways=False)
    assert told["parameters"]["text"]["frozen"] > 3e9
    assert told["memory"]["weights"] > 12e9
    assert told["memory"]["fits"]
    assert [(row["processes"], row["kind"]) for row in told["processes"]] == [
        *((8, "ddp"), (8, "fsdp")),
        *((64, "ddp"), (64, "fsdp")),
    ]


@pytest.mark.slow
def test_what_fits(tmp_path: Path) -> None:
    """Of what is changed to save memory, each takes less, and a batch as large as is said to fit, fits."""
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"}, {"speech": "full"})
    tiny = find_device("a100", memory=0.004)
    told = plan(recipe, lambda dtypes: tiny, lengths=TWO)
    ways = {row["way"]: row for row in told["ways"]}
    assert set(ways) == {"training.arguments.gradient_checkpointing=true", "towers.speech.train=lora"}
    for row in ways.values():
        assert row["memory"]["total"] < told["memory"]["total"]
    largest = told["memory"]["largest_batch"]
    assert largest > 0
    for batch, fits in ((largest, True), (2 * largest + 8, False)):
        other = with_fields(recipe, training=with_fields(recipe.training, batch_size=batch))
        assert plan(other, lambda dtypes: tiny, lengths=TWO, ways=False)["memory"]["fits"] is fits


def test_a_dtype_that_a_device_multiplies_slowly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of a bfloat16 tower on a processor with AVX2 alone said 23 hours, not that float32 takes minutes."""
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"}, {"speech": "lora"})
    text = with_fields(recipe.towers["text"], config={"dtype": "bfloat16"})
    arguments = {**recipe.training.arguments, "gradient_checkpointing": True}  # one way less to look at
    training = with_fields(recipe.training, arguments=arguments, interleave=0.1)
    recipe = with_fields(recipe, towers={**recipe.towers, "text": text}, training=training)
    a100 = DEVICES["a100"]
    monkeypatch.setattr(products, "is_multiplied_here", lambda dtype: False)  # here; it is of no matter there
    slow = with_fields(a100, peak={**a100.peak, "bfloat16": a100.peak["float32"] / 100})
    assert not plan(recipe, lambda dtypes: a100, lengths=TWO)["ways"]
    told = plan(recipe, lambda dtypes: slow, lengths=TWO)
    (row,) = told["ways"]
    assert row["way"] == "towers.text.config.dtype=float32"
    assert row["step_seconds"] < told["time"]["step"]
    assert row["memory"]["weights"] > told["memory"]["weights"]
    assert not caplog.records
    rounded = with_fields(recipe, training=with_fields(training, arguments={**arguments, "bf16": True}))
    (row,) = plan(rounded, lambda dtypes: slow, lengths=TWO)["ways"]
    assert row["way"] == "towers.text.config.dtype=float32 training.arguments.bf16=false"


@pytest.mark.slow
def test_the_prefix_cache(tmp_path: Path) -> None:
    """A frozen tower below its first zip is not computed."""
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"}, {"speech": "full"}, {"layers": [3]})
    towers = {n: with_fields(t, input_projection="none") for n, t in recipe.towers.items()}
    zips = [with_fields(recipe.zips[0], reader="text", source="speech", layers=[3], source_layers=[3])]
    recipe = with_fields(recipe, towers=towers, zips=zips, tasks={"speech->text": 1.0})
    told = plan(recipe, lambda dtypes: DEVICES["a100"], lengths=TWO)
    (row,) = [row for row in told["ways"] if row["way"] == "training.prefix_cache=memory"]
    assert row["step_seconds"] < told["time"]["step"]


def test_lengths_of_data(tmp_path: Path) -> None:
    """Of data that is there, rows are encoded; of a modality that is given, they are not."""
    recipe = build(FuseRecipe, plain_recipe(tmp_path / "output"))
    found = read_lengths(recipe, ["speech", "text"], {})
    assert found.count == 12
    assert len({row["speech"] for row in found.rows}) > 1
    assert {row["speech"] for row in read_lengths(recipe, ["speech", "text"], {"speech": 7}).rows} == {7}


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain_recipe(tmp_path / "output")))
    given = [str(tmp_path / "recipe.yaml"), "training.steps=7", "--flops", "1e9", "--processes", "8,512", "--json"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", FutureWarning)
        run = CliRunner().invoke(app, ["plan", *given])
    assert run.exit_code == 0, run.output
    assert not [w for w in warned if issubclass(w.category, FutureWarning)]  # a way to save memory has an old name
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["time"]["steps"] == 7
    assert told["time"]["step"] == pytest.approx(told["flops"]["step"] / 1e9)
    assert not (tmp_path / "output").exists()
    lines = text_of(told)
    assert all(len(line) <= 80 for line in lines), "\n".join(lines)
    assert any("512 fsdp" in line for line in lines)
    assert any(line.startswith("a step takes ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "cannot read"),
        (["RECIPE", "--device", "abacus"], "--device='abacus': must be one of"),
        (["RECIPE", "--lengths", "smell=3"], "--lengths names 'smell'"),
        (["RECIPE", "--lengths", "text=0"], "text=0: must be at least 1"),
        (["RECIPE", "--lengths", "text"], "write NAME=TOKENS"),
        (["RECIPE", "--processes", "8,many"], "'many' is no whole number"),
        (["RECIPE", "--processes", "0", "--device", "l4"], "must be at least 1"),
        (["RECIPE", "--flops", "-1"], "--flops=-1.0: must be above 0"),
        (["RECIPE", "--device", "l4", "--utilisation", "2"], "must be at most 1"),
        (["RECIPE", "--flops", "1e9", "--utilisation", "0.5"], "has no effect"),
        (["RECIPE", "--interconnect", "0"], "must be above 0"),
        (["RECIPE", "towers.text=/nowhere/tower", "--lengths", "text=3,speech=4"], "towers.text: no config"),
        (["RECIPE", "data=/nowhere/data"], "say how long rows are: --lengths"),
        (
            ["RECIPE", "towers.text.quantization={quant_method: torchao}", "--lengths", "text=3,speech=4"],
            "quantization",
        ),
    ],
)
def test_what_cannot_be(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "RECIPE").write_text(json.dumps(plain_recipe(tmp_path / "output")))
    given = [str(tmp_path / "RECIPE") if argument == "RECIPE" else argument for argument in arguments]
    run = CliRunner().invoke(app, ["plan", *given])
    assert run.exit_code == 2, run.output
    assert said in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_units_of_an_encoder_are_counted_before_they_are_fitted() -> None:
    """With a source it asked the codec to be made, of no sounds, and every recipe with units of Whisper was refused."""
    codec = CodecRecipe(kind="speech-units", source="openai/whisper-tiny.en", options={"units": 50, "layer": 4})
    assert _unmade("speech", codec).vocab_size == 53
    text = CodecRecipe(kind="text", source="/nowhere/tokenizer", options={"vocab_size": 99})
    with pytest.raises(ValueError, match=r"towers\.text\.pretrain\.codec \(text\): how many ids"):
        _unmade("text", text)


def test_more_processes_send_more_and_hold_less(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"text": "llama", "speech": "gpt2"}, {"speech": "full"})
    slow = {"lengths": TWO, "processes": [1, 2, 8, 512], "interconnect": 0.001, "ways": False}
    rows = plan(recipe, lambda dtypes: DEVICES["a100"], **slow)["processes"]
    by = {(row["processes"], row["kind"]): row for row in rows}
    assert by[1, "ddp"]["sent"] == by[1, "fsdp"]["sent"] == 0
    assert by[512, "fsdp"]["sent"] == pytest.approx(1.5 * by[512, "ddp"]["sent"])
    assert by[512, "fsdp"]["memory"] < by[2, "fsdp"]["memory"] < by[2, "ddp"]["memory"]
    assert by[512, "ddp"]["efficiency"] < by[2, "ddp"]["efficiency"] < by[1, "ddp"]["efficiency"] == 1
    least, most = by[8, "ddp"]["step_seconds"]
    assert most == pytest.approx(by[1, "ddp"]["step_seconds"][0] + by[8, "ddp"]["sent"] / 1e6)
    assert least == max(by[1, "ddp"]["step_seconds"][0], by[8, "ddp"]["sent"] / 1e6)


def test_a_device_is_tried() -> None:
    here = find_device(dtypes=("float32",))
    assert here.peak["float32"] > 1e8
    assert here.memory > 1e8
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()

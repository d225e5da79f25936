"""Training with what a frozen tower computes below its first zip kept, in memory or on the disk."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import open_gates, tiny_backbone
from tiny_recipes import tiny_recipe
from tiny_steps import DOCUMENTS, Documents
from torch.utils.data import Dataset
from transformers import TrainingArguments

from zipper_lm import Document, Segment, TowerSpec, ZipperModel, ZipSpec
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.checks import check_recipe
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.training import prefix_cache
from zipper_lm.training.prefix_store import key_of
from zipper_lm.training.trainer import ZipperTrainer

ZIPS = [
    ZipSpec(reader="text", source="speech", layers=[2, 3], source_layers=[0, 3]),
    ZipSpec(reader="speech", source="text", layers=[1, 3], source_layers=[0, 3]),
]


def made(tmp_path: Path, seed: int = 0, train: Mapping[str, str] | None = None, **text: Any) -> ZipperModel:
    folder = tmp_path / f"text{seed}"
    tiny_backbone("llama", 31, 4, seed).save_pretrained(folder)
    spec = TowerSpec(source=str(folder), **({"input_projection": "none"} | text))
    torch.manual_seed(0)
    towers: Any = {"text": spec, "speech": tiny_backbone("gpt2", 53, 4)}
    model = ZipperModel.fuse(towers, zips=ZIPS, train=dict(train or {"speech": "full"}))
    open_gates(model, 0.3)
    return model


def trainer_of(
    model: ZipperModel, tmp_path: Path, documents: Dataset[Document] | None = None, steps: int = 3, **how: Any
) -> ZipperTrainer:
    own = {"corrupt", "history_dropout", "packing", "prefix_cache", "prefix_folder"}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=steps,
        per_device_train_batch_size=how.pop("batch", 2),
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{k: v for k, v in how.items() if k not in own},
    )
    chosen = documents or Documents(DOCUMENTS)
    return ZipperTrainer(model, arguments, chosen, **{k: v for k, v in how.items() if k in own})


def trained(
    tmp_path: Path, documents: Dataset[Document] | None = None, **how: Any
) -> tuple[ZipperTrainer, list[float]]:
    trainer = trainer_of(made(tmp_path), tmp_path, documents, **how)
    trainer.train()
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def hits(trainer: ZipperTrainer) -> set[float]:
    return {line["prefix_cache/text"] for line in trainer.state.log_history if "prefix_cache/text" in line}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"gradient_accumulation_steps": 2, "batch": 1},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"history_dropout": 0.3},
        {"history_dropout": {"text": 0.4, "speech": 0.3}},
        {"packing": True, "batch": 4},
    ],
    ids=str,
)
def test_training_is_the_same(how: dict[str, Any], tmp_path: Path) -> None:
    """Every loss of several epochs, and all weights. Noise in what the trained tower reads leaves the frozen one be;
    what a frozen one misreads, drawn anew in each epoch, had cost a run beside a large LLM its prefix cache."""
    rough = {"abs": 3e-2} if "bf16" in how else {"abs": 1e-4}
    plain, losses = trained(tmp_path, steps=4, **how)
    for mode in ("memory", "disk"):
        kept, same = trained(tmp_path, steps=4, prefix_cache=mode, prefix_folder=tmp_path / "prefixes", **how)
        assert hits(kept) == {1.0}
        assert same == pytest.approx(losses, **rough)
        for (name, a), b in zip(plain.model.named_parameters(), kept.model.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=5e-3 if "bf16" in how else 2e-4, msg=name)
    assert hits(plain) == set()


def computed(model: ZipperModel) -> list[int]:
    """Fills with how many tokens pass the text tower's first layer, each time that they do."""
    tokens: list[int] = []
    model.tower("text").layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    return tokens


def test_each_stream_is_computed_once(tmp_path: Path) -> None:
    documents = Documents([*DOCUMENTS, *DOCUMENTS])  # the same again
    model = made(tmp_path)
    trainer = trainer_of(model, tmp_path, documents, prefix_cache="memory")
    tokens = computed(model)
    trainer.keep_prefixes()
    distinct = {tuple(s.ids) for d in DOCUMENTS for s in d if s.modality == "text"}
    assert sum(tokens) == 1 + sum(len(ids) + 2 for ids in distinct)  # one to learn sizes
    tokens.clear()
    trainer.train()
    assert tokens == []


def test_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another run over the same tower, which adds what they lack; not by one over other weights or layers."""
    monkeypatch.setattr(prefix_cache, "PART_BYTES", 1024)
    folder = tmp_path / "prefixes"

    def tokens_of(documents: list[Document], model: ZipperModel) -> int:
        trainer = trainer_of(model, tmp_path, Documents(documents), prefix_cache="disk", prefix_folder=folder)
        tokens = computed(model)
        trainer.keep_prefixes()
        assert trainer.prefixes.stores["text"].of(key_of([0, 4, 9, 1])) is not None
        return sum(tokens)

    assert tokens_of(DOCUMENTS[:2], made(tmp_path)) == 1 + 4 + 7  # one to learn sizes
    assert len(list(folder.rglob("*.safetensors"))) == 2  # of so few bytes each
    monkeypatch.setattr(prefix_cache, "PART_BYTES", 8192)
    assert tokens_of(DOCUMENTS, made(tmp_path)) == 1 + (4 + 7) + 5 + 3  # one stream of each file is computed again
    assert len(list(folder.rglob("*.safetensors"))) == 3
    assert tokens_of(DOCUMENTS, made(tmp_path)) == 1 + (4 + 7) + 3
    tokens_of(DOCUMENTS[:2], made(tmp_path, seed=1))
    tokens_of(DOCUMENTS[:2], made(tmp_path, input_projection="residual", input_projection_layer=1))
    assert len(list(folder.iterdir())) == 3


def test_an_interrupted_computation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written stays, whole; nothing else is left behind."""
    monkeypatch.setattr(prefix_cache, "PART_BYTES", 1024)
    folder, write = tmp_path / "prefixes", prefix_cache.write_states

    def interrupted(*args: Any) -> Path:
        if list(folder.rglob("*.safetensors")):
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(prefix_cache, "write_states", interrupted)
    how: dict[str, Any] = {"prefix_cache": "disk", "prefix_folder": folder}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(made(tmp_path), tmp_path, **how).keep_prefixes()
    assert [f.suffix for f in folder.rglob("*") if f.is_file()] == [".safetensors"]
    monkeypatch.setattr(prefix_cache, "write_states", write)
    text = io.StringIO()
    trainer_of(made(tmp_path), tmp_path, **how).keep_prefixes(Console(file=text, width=200))
    assert "first zip: 1 streams are there" in text.getvalue()
    assert "first zip: 3 streams, 12 tokens, 2 states of 32 each, 0.00293 MiB, files in" in text.getvalue()


def test_states_of_long_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this run reads stay, however old they are."""
    monkeypatch.setattr(prefix_cache, "PART_BYTES", 1024)
    folder, long_ago = tmp_path / "prefixes", time.time() - 2 * 24 * 3600

    def keep(seed: int, documents: list[Document] = DOCUMENTS) -> str:
        text = io.StringIO()
        how: dict[str, Any] = {"prefix_cache": "disk", "prefix_folder": folder}
        trainer_of(made(tmp_path, seed=seed), tmp_path, Documents(documents), **how).keep_prefixes(Console(file=text))
        return text.getvalue()

    keep(0)
    first = set(folder.rglob("*.safetensors"))
    monkeypatch.setenv("ZIPPER_PREFIXES_GIB", "0")
    assert "deleted" not in keep(1), "all were used today"
    second = set(folder.rglob("*.safetensors")) - first
    for file in first | second:
        os.utime(file, (long_ago, long_ago))
    assert "deleted" in keep(1, DOCUMENTS[:2])
    left = set(folder.rglob("*.safetensors"))
    assert left
    assert left < second
    assert all(time.time() - file.stat().st_mtime < 3600 for file in left)
    monkeypatch.setenv("ZIPPER_PREFIXES_GIB", "a lot")
    with pytest.raises(ValueError, match="ZIPPER_PREFIXES_GIB must be a number"):
        keep(1)


@pytest.mark.parametrize("spoil", ["cut", "weights", "shape", "other"])
def test_files_that_are_not_right(spoil: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"prefix_cache": "disk", "prefix_folder": tmp_path / "prefixes"}
    trainer_of(made(tmp_path), tmp_path, **how).keep_prefixes()
    (file,) = (tmp_path / "prefixes").rglob("*.safetensors")
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif spoil == "weights":
        save_file({**tensors, "states": tensors["states"] + 1}, file, told)
    elif spoil == "shape":
        save_file({**tensors, "lengths": tensors["lengths"] + 1}, file, told)
    else:
        save_file(tensors, file, {**told, "of": "0" * 64})
    with pytest.raises(ValueError, match=rf"{file.name}: .*delete it"):
        trainer_of(made(tmp_path), tmp_path, **how).keep_prefixes()


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed, with the numbers."""
    full = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    model = made(tmp_path)
    trainer, tokens = trainer_of(model, tmp_path, prefix_cache="memory"), computed(model)
    with pytest.raises(
        ValueError, match=r"'text' \(4 streams, 19 tokens, 2 states of 32 each, 0.00464 MiB\) .* memory"
    ):
        trainer.keep_prefixes()
    assert sum(tokens) == 1
    monkeypatch.setattr(prefix_cache.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"do not fit into files in .*prefixes"):
        trainer_of(model, tmp_path, prefix_cache="disk", prefix_folder=tmp_path / "prefixes").keep_prefixes()
    assert not (tmp_path / "prefixes").exists()


@pytest.mark.parametrize(
    ("text", "how", "says"),
    [
        ({"input_projection": "residual"}, {}, "towers.text.input_projection is 'residual'"),
        ({}, {"corrupt": 0.1}, "training.corrupt is 0.1"),
        ({}, {"corrupt": {"text": 0.2}}, "training.corrupt is 0.2"),
        ({}, {"prefix_cache": {"speech": "disk"}}, "towers.speech.train is 'full'"),
        ({}, {"prefix_cache": {"image": "disk"}}, r"names 'image', but the towers are \['speech', 'text'\]"),
        ({}, {"prefix_cache": "tape"}, "must be 'memory' or 'disk', got 'tape'"),
        ({"train": {"text": "lora"}}, {}, "is for frozen towers; all are trained"),
        ({}, {"prefix_cache": "disk"}, "needs a folder"),
    ],
)
def test_what_would_change_states_is_refused(
    text: dict[str, Any], how: dict[str, Any], says: str, tmp_path: Path
) -> None:
    train = {"speech": "full", **text.pop("train", {})}
    model = made(tmp_path, train=train, **text)
    with pytest.raises(ValueError, match=says):
        trainer_of(model, tmp_path, **({"prefix_cache": "memory"} | how)).keep_prefixes()


def projected(recipe: FuseRecipe, kind: str) -> FuseRecipe:
    """With another input projection of text."""
    return replace(recipe, towers=recipe.towers | {"text": replace(recipe.towers["text"], input_projection=kind)})


@pytest.mark.parametrize(
    ("settings", "more", "says"),
    [
        ({"corrupt": {"text": 0.2}}, {}, "training.corrupt is 0.2"),
        ({"history_dropout": {"txt": 0.2}}, {}, r"training.history_dropout names \['txt'\]"),
        ({"interleave": 0.5}, {}, "training.interleave=0.5 with training.prefix_cache"),
        ({"join": {"speech->text": 0.5}}, {}, "training.join=0.5 of 'speech->text' with training.prefix_cache"),
        ({}, {"tasks": {"text->speech->text": 1.0}}, r"it names \['text'\] twice"),
        ({}, {"architecture": "single-decoder"}, "architecture 'single-decoder'"),
        ({"prefix_cache": {"speech": "memory"}}, {}, "towers.speech.train is 'full'"),
        ({}, {"projection": "residual"}, "towers.text.input_projection is 'residual'"),
    ],
)
def test_a_recipe_is_refused_before_anything_is_made(
    settings: dict[str, Any], more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    projection = more.pop("projection", "none")
    recipe = projected(tiny_recipe(tmp_path / "m", training={"prefix_cache": "memory", **settings}, **more), projection)
    with pytest.raises(ValueError, match=says):
        check_recipe(recipe)


def test_a_run_that_goes_on_reads_the_files_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so; the losses are those of a run without."""
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    record: dict[str, Any] = {}
    told = {}
    for mode in (None, "disk", "again"):
        text = io.StringIO()
        recipe = tiny_recipe(tmp_path / f"m{mode}", training={"steps": 3, "prefix_cache": mode and "disk"})
        record[str(mode)] = fuse(projected(recipe, "none"), console=Console(file=text, width=200))
        told[mode] = text.getvalue()
    losses = {mode: [line["loss"] for line in run["history"] if "loss" in line] for mode, run in record.items()}
    assert losses["disk"] == pytest.approx(losses["None"], abs=1e-4)
    assert losses["again"] == losses["disk"]
    assert "below its first zip" not in told[None]
    assert "streams are there" not in told["disk"]
    assert "streams are there" in told["again"]
    assert list((tmp_path / "cache" / "prefixes").rglob("*.safetensors"))


def test_noise_in_another_tower_is_none_of_its_business(tmp_path: Path) -> None:
    trainer = trainer_of(made(tmp_path), tmp_path, prefix_cache={"text": "memory"}, corrupt={"speech": 0.5})
    trainer.train()
    assert hits(trainer) == {1.0}


class _Changing(Documents):
    """Documents of which one is another in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Document:
        document = super().__getitem__(index)
        if index or not self.epoch:
            return document
        return Document([replace(s, ids=[*s.ids, 3 + self.epoch]) for s in document])


def test_a_stream_that_was_not_there_is_computed(tmp_path: Path) -> None:
    """Its whole batch is, and the log says how many had all of theirs kept."""
    _, losses = trained(tmp_path, _Changing(DOCUMENTS), steps=6)
    kept, same = trained(tmp_path, _Changing(DOCUMENTS), steps=6, prefix_cache="memory")
    assert same == pytest.approx(losses, abs=1e-4)
    assert hits(kept) == {0.0, 1.0}


def test_every_task_of_a_row_is_kept(tmp_path: Path) -> None:
    """Of tasks one is drawn in each epoch; streams of the others would be lacking later."""
    rows = [{s.modality: Segment(s.modality, ids=s.ids) for s in d} for d in DOCUMENTS]
    mixture = TaskMixture(rows, {"speech->text": 1.0, "->speech": 3.0})
    trainer = trainer_of(made(tmp_path), tmp_path, mixture, steps=8, prefix_cache="memory")  # type: ignore[arg-type]
    trainer.train()
    assert hits(trainer) <= {0.0, 1.0}  # of batches without text nothing is to be kept
    store = trainer.prefixes.stores["text"]
    assert all(key_of([0, *row["text"].ids, 1]) in store for row in rows)

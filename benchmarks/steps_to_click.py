"""Steps to click: how many optimizer steps pass until a task is done at all, and how much that is luck.

What training waits for is that cross-attention finds which part of the source belongs to which part of what is written.
Until then the loss creeps and nearly every word is wrong; then the error rate falls. Counted are the steps until the
word error rate on validation rows is below 50 %: each task is trained alone, seed by seed, and stopped there, or at a
cap. Sound is heard by the recipe's judge.

    python benchmarks/steps_to_click.py WORK RECORD                   the demo's towers, sentences, voices and judge
    python benchmarks/steps_to_click.py WORK RECORD --recipe FILE     those of a recipe; --set key=value changes it

    --text FOLDER             another text tower, such as a real language model, with its tokenizer beside it
    --candidate NAME --change key=value ...      what is tried, under a name of its own

Towers that a recipe has made are made once, in WORK. The record, one JSON file, is written after every run; what is
there is not run again, and further candidates, towers and seeds join it. A summary is the last line of the output.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from zipper_lm.data.tasks import parse_task
from zipper_lm.demo import run as demo
from zipper_lm.demo.build import ASSETS
from zipper_lm.demo.sizes import DemoSizes
from zipper_lm.jobs.failures import losses_on, some_batches
from zipper_lm.jobs.fuse import make_trainer, train
from zipper_lm.jobs.materials import Materials, check, gather
from zipper_lm.jobs.recipes.reader import read_recipe, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.training.recipe import BESIDE
from zipper_lm.training.trainer import ZipperTrainer
from zipper_lm.utils.files import as_json, new_file
from zipper_lm.utils.places import public

CLICK = 50.0
"""Word error rate in per cent below which a task is being done."""
AS_IT_IS = "as it is"
DEMO = "zipper demo"


def demo_material(work: Path, console: Console) -> Path:
    """The demo's recipe as a file, and its pairs beside it, made once."""
    sizes = DemoSizes()
    sizes = replace(sizes, fusion=replace(sizes.fusion, evaluate_every=sizes.fusion.steps))  # so that it has validation
    if not (work / "data").is_dir():
        demo.write_data(work / "data", sizes.corpus(), sizes, console)
    with new_file(work / "demo.yaml", overwrite=True) as file:
        file.write_text(as_json(to_mapping(demo.demo_recipe(work, ASSETS, sizes))), encoding="utf-8")
    return work / "demo.yaml"


def recipe_of(file: Path, given: argparse.Namespace, task: str, seed: int, output: Path) -> FuseRecipe:
    """The recipe of one run: one task, a short look at what is held out, and towers that stay in WORK."""
    tower = [f"towers.text={{source: {json.dumps(given.text)}}}"] if given.text else []
    recipe = read_recipe(file, [*tower, *given.set, *given.change, f"seed={seed}"], FuseRecipe)
    towers = {
        name: replace(tower, source=str(given.work / name)) if tower.pretrain is not None else tower
        for name, tower in recipe.towers.items()
    }
    # Of the losses beside the main one, those of a task that is not trained would be refused.
    beside: dict[str, Any] = {
        name: {template: weight for template, weight in getattr(recipe.training, name).items() if template == task}
        for name in BESIDE
    }
    if not any(beside.values()):
        beside["fade_out"] = None
    return replace(
        recipe,
        towers=towers,
        tasks={task: 1.0},
        scored=None,
        data=replace(recipe.data, validation_limit=given.rows),
        training=replace(recipe.training, evaluate_every=None, save_every=None, patience=None, **beside),
        output=str(output),
    )


class Watch(TrainerCallback):
    """Scores a trainer's model every so many steps, and stops training at the click or the cap.

    Attributes:
        curve: of each look the step, the word error rate in per cent, and the loss in nats a token, on held-out rows.
    """

    def __init__(self, trainer: ZipperTrainer, materials: Materials, task: str, every: int, cap: int) -> None:
        self.trainer, self.model, self.every, self.cap = trainer, materials.model, every, cap
        self.writes = parse_task(task).targets[-1]
        self.held_out = some_batches(materials.model, [task], trainer.args.train_batch_size, materials.validation)
        self.curve: list[tuple[int, float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, where it is due."""
        if state.global_step % self.every:
            return
        rate = self.trainer.evaluate()["eval_wer"]
        loss = losses_on(self.model, self.held_out)[self.writes]
        self.curve.append((state.global_step, round(rate, 1), round(loss, 3)))
        control.should_training_stop = rate < CLICK or state.global_step >= self.cap


def one_run(recipe: FuseRecipe, every: int, cap: int, console: Console) -> dict[str, Any]:
    """Train until the click or the cap."""
    started = time.time()
    plan = check(recipe)
    materials = gather(plan, console, lambda: None)
    if materials.scorer is None or not materials.scorer.tasks:
        raise ValueError(f"data: {recipe.data.source} has no validation rows that {list(recipe.tasks)} is scored on")
    trainer = make_trainer(plan, materials)
    watch = Watch(trainer, materials, next(iter(recipe.tasks)), every, cap)
    trainer.add_callback(watch)
    train(trainer, plan, console)
    step, rate, _ = watch.curve[-1]
    return {"click": step if rate < CLICK else None, "curve": watch.curve, "seconds": round(time.time() - started)}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and worst of the seeds of each tower, task and candidate; null is: not within the cap."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        key = run["tower"], run["task"], run["candidate"]
        found.setdefault(key, []).append(math.inf if run["click"] is None else run["click"])
    return [
        {**dict(zip(("tower", "task", "candidate"), key)), "clicks": clicks}
        | {"median": statistics.median(clicks), "worst": max(clicks)}
        for key, clicks in found.items()
    ]


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--recipe", type=Path, help="of zipper fuse; default the demo's")
    parser.add_argument("--set", nargs="*", default=[], help="changes to the recipe, for all candidates")
    parser.add_argument("--text", help="folder or Hub id of the text tower")
    parser.add_argument("--candidate", default=AS_IT_IS)
    parser.add_argument("--change", nargs="*", default=[], help="what the candidate changes")
    parser.add_argument("--tasks", nargs="+", default=["speech->text", "text->speech"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--every", type=int, default=50, help="steps from look to look")
    parser.add_argument("--cap", type=int, default=1000, help="steps after which a run is given up")
    parser.add_argument("--rows", type=int, default=40, help="of the validation split")
    given = parser.parse_args()
    if bool(given.change) != (given.candidate != AS_IT_IS):
        parser.error("--candidate names what --change changes: give both or neither")
    return given


def main() -> None:
    """Run what is missing and write the record."""
    given, console = arguments(), Console(stderr=True)
    given.work.mkdir(parents=True, exist_ok=True)
    named = str(given.recipe.name) if given.recipe else DEMO
    settings = {"recipe": named, "set": public(given.set), "every": given.every, "cap": given.cap, "rows": given.rows}
    record: dict[str, Any] = {"settings": settings, "candidates": {}, "runs": []}
    if given.record.is_file():
        record = json.loads(given.record.read_text(encoding="utf-8"))
    tried = record["candidates"].setdefault(given.candidate, public(given.change))
    if record["settings"] != settings or tried != public(given.change):
        raise SystemExit(f"{given.record} is of {record['settings']} and {tried}; name another file")
    file = given.recipe or demo_material(given.work, console)
    about = {"tower": Path(given.text).name if given.text else "small", "candidate": given.candidate}
    done = [(run["tower"], run["candidate"], run["task"], run["seed"]) for run in record["runs"]]
    for seed in given.seeds:
        for task in given.tasks:
            if (*about.values(), task, seed) in done:
                continue
            with tempfile.TemporaryDirectory(dir=given.work) as folder:
                recipe = recipe_of(file, given, task, seed, Path(folder) / "model")
                run = {**about, "task": task, "seed": seed, **one_run(recipe, given.every, given.cap, console)}
            record["runs"].append(run)
            with new_file(given.record, overwrite=True) as written:
                written.write_text(as_json(record) + "\n", encoding="utf-8")
            console.print(f"{about['candidate']}, {task}, seed {seed}: {run['click']} {run['curve']}", markup=False)
    print(as_json({"settings": settings, "summary": summary(record["runs"])}))


if __name__ == "__main__":
    main()

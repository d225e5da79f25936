"""Three towers: fused at once on all three pairs, or two pairs trained apart and combined; same towers, same data.

zipper corpus spoken-digit-images data/spoken-digit-images --source RECORDINGS-OF-SINGLE-DIGITS
python benchmarks/joint_or_combined.py data/spoken-digit-images WORK docs/runs/three-towers.json --seeds 1 2 3

Every direction is trained on as many documents either way: a pair has a third of the joint run's steps (two of its
six directions). Towers are pre-trained once. Goes on where it was cut off; a finished seed is not run again. The record
is the last line of the output, too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zipper_lm.data.sources.readers import read_rows
from zipper_lm.data.tasks import parse_task
from zipper_lm.evaluation.judges import judge_for
from zipper_lm.evaluation.scoring import score_task
from zipper_lm.experiments.run import trained
from zipper_lm.jobs.recipes.reader import read_recipe, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.models.combine import combine
from zipper_lm.models.load import load
from zipper_lm.models.records import generation_settings
from zipper_lm.utils.files import as_json, new_file

RECIPE = Path(__file__).parent.parent / "examples" / "three-towers.yaml"
PAIRS = ["speech->text", "text->speech", "image->text", "text->image"]
CHAINS = ["speech->text->image", "image->text->speech"]
DIRECT = ["speech->image", "image->speech"]


def recipe_of(data: str, work: Path, seed: int, changes: list[str], towers: tuple[str, ...] = ()) -> FuseRecipe:
    """The joint recipe, or that of one pair of its towers, with a share of the steps as large as its share of tasks."""
    recipe = read_recipe(RECIPE, [f"data={data}", f"seed={seed}", *changes], FuseRecipe)
    named = {n: replace(t, source=str(work / n)) for n, t in recipe.towers.items() if n in towers or not towers}
    tasks = {t: w for t, w in recipe.tasks.items() if set(parse_task(t).modalities) <= set(named)}
    steps = round(recipe.training.steps * sum(tasks.values()) / sum(recipe.tasks.values()))
    training = replace(recipe.training, steps=steps, evaluate_every=steps)
    output = str(work / f"{'-'.join(towers) or 'joint'}-{seed}")
    settings = {n: s for n, s in recipe.generation.items() if n in named}
    return replace(recipe, towers=named, tasks=tasks, training=training, output=output, generation=settings)


def scores(model: Any, settings: dict[str, Any], data: str, tasks: list[str], seed: int) -> dict[str, Any]:
    """Every task on the test split; sounds and pictures by independent judges."""
    rows = list(read_rows(data, split="test"))
    judges = {m: judge_for(data, modality=m) for m in ("speech", "image")}
    found = {}
    for task in tasks:
        torch.manual_seed(seed)
        judge = judges.get(parse_task(task).targets[-1])
        found[task] = score_task(model, rows, task, judge=judge, settings=settings).summary()
    return found


def one_seed(data: str, work: Path, seed: int, changes: list[str]) -> dict[str, Any]:
    """Both ways, scored."""
    first = recipe_of(data, work, seed, changes)
    console = Console(stderr=True)
    joint = trained(first, work, console)
    pairs = [recipe_of(data, work, seed, changes, towers) for towers in (("text", "speech"), ("text", "image"))]
    apart = [trained(recipe, work, console) for recipe in pairs]
    model = load(first.output)
    record = {"joint": {"seconds": joint["seconds"], "steps": joint["steps"]}}
    record["joint"]["scores"] = scores(model, generation_settings(first.output), data, PAIRS + CHAINS + DIRECT, seed)
    together = combine([load(recipe.output) for recipe in pairs])
    settings = {n: s for recipe in pairs for n, s in recipe.generation.items()}
    record["combined"] = {"seconds": sum(r["seconds"] for r in apart), "steps": [r["steps"] for r in apart]}
    record["combined"]["scores"] = scores(together, settings, data, PAIRS + CHAINS, seed)
    return record


def main() -> None:
    """Run what is missing and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("work", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], help="changes to the recipe, for a short trial")
    given = parser.parse_args()
    record: dict[str, Any] = {"seeds": {}}
    if given.output.is_file():
        record = json.loads(given.output.read_text(encoding="utf-8"))
    for seed in given.seeds:
        if str(seed) in record["seeds"]:
            continue
        record["seeds"][str(seed)] = one_seed(given.data, given.work, seed, given.set)
        recipe = read_recipe(RECIPE, given.set, FuseRecipe)
        record["recipe"] = {k: v for k, v in to_mapping(recipe).items() if k != "output"}
        with new_file(given.output, overwrite=True) as file:
            file.write_text(as_json(record) + "\n", encoding="utf-8")
    print(as_json(record))


if __name__ == "__main__":
    main()

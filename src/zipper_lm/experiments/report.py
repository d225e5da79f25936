"""`zipper report`: the records of experiments as one page of tables with spread, and curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zipper_lm.evaluation.scoring import SHORT_NAMES
from zipper_lm.evaluation.word_error_rate import paired_interval
from zipper_lm.experiments.plan import PLAIN, Experiment, points_of
from zipper_lm.experiments.run import PLAN_FILE
from zipper_lm.files import new_file
from zipper_lm.recipe import build

Cell = list[dict[str, Any]]
"""The records of one arm at one point, a seed each."""


@dataclass(frozen=True)
class Results:
    """The records of one experiment.

    Attributes:
        name: of its folder. experiment: what was planned. cells: by (point, arm). trials: how many records of trials.
    """

    name: str
    experiment: Experiment
    cells: dict[tuple[str, str], Cell]
    trials: int


def read_results(folder: str | Path) -> Results:
    """What `run_experiment` wrote; records of arms, points, seeds or tasks that the plan no longer has are left out.

    Raises:
        ValueError: if there is no experiment.
    """
    folder = Path(folder)
    if not (folder / PLAN_FILE).is_file():
        raise ValueError(f"{folder}: no {PLAN_FILE} there; run zipper experiment first")
    experiment = build(Experiment, json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")))
    cells: dict[tuple[str, str], Cell] = defaultdict(list)
    trials = 0
    for file in sorted(folder.glob("*--*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        run = record["run"]
        if run["arm"] not in experiment.arms or run["point"] not in points_of(experiment):
            continue  # of an earlier plan
        if run["reported"]:
            if run["seed"] not in experiment.seeds or not set(experiment.tasks) <= set(record["scores"]):
                continue
            cells[run["point"], run["arm"]].append(record)
        else:
            trials += 1
    return Results(folder.name, experiment, dict(cells), trials)


def write_report(folders: Sequence[str | Path], page: str | Path) -> None:
    """One page in Markdown: what there is, then each experiment, with a picture beside it if it has several points.

    Args:
        folders: results of experiments. page: the file to write; replaced if it is there.

    Raises:
        ValueError: as `read_results`.
    """
    page = Path(page)
    found = [read_results(folder) for folder in folders]
    parts = [
        "# Results\n\nWritten by `zipper report` from the raw records; no number here is typed by hand.\n"
        "WER in per cent on the test split: mean over seeds, least and most in brackets; without, of one run.\n",
        "| experiment | question | runs |\n|---|---|---|",
        *(f"| [{r.name}](#{r.name}) | {r.experiment.question} | {_runs(r)} |" for r in found),
        "",
    ]
    for results in found:
        parts.append(_section(results))
        if len(points_of(results.experiment)) > 1 and results.cells:
            picture = page.with_name(f"{page.stem}-{results.name}.png")
            with new_file(picture, overwrite=True) as file:
                draw(results, file)
            parts.append(f"![{results.experiment.question}]({picture.name})\n")
    with new_file(page, overwrite=True) as file:
        file.write_text("\n".join(parts), encoding="utf-8")


def _runs(results: Results) -> str:
    """How many of those that were planned."""
    experiment = results.experiment
    wanted = len(points_of(experiment)) * len(experiment.arms) * len(experiment.seeds)
    return f"{sum(map(len, results.cells.values()))} of {wanted}"


def _section(results: Results) -> str:
    experiment = results.experiment
    lines = [
        f"## {results.name}\n",
        f"{experiment.question}\n",
        f"    zipper experiment experiments/{results.name}.yaml\n",
        f"{_runs(results)} runs, seeds {', '.join(map(str, experiment.seeds))}; {results.trials} trials before them, "
        "chosen on validation.\n",
    ]
    if experiment.notes:
        lines += [*(f"- {note}" for note in experiment.notes), ""]
    for task in experiment.tasks:
        lines += [f"### {results.name}: {task}\n", table(results, task)]
        if differences := _differences(results, task):
            lines += ["", differences]
        if steps := _by_step(results, task):
            lines += ["", steps]
        lines.append("")
    if experiment.paper:
        lines += ["In the paper (arXiv 2405.18669):\n", *(f"- {found}" for found in experiment.paper), ""]
    if kept := _preservation(results):
        lines += [f"### {results.name}: what was kept\n", kept, ""]
    return "\n".join(lines)


def _by_step(results: Results, task: str) -> str:
    """Validation WER in the course of training, at the last point, if some arm was evaluated three times or more: how
    soon each comes to where."""
    point, key = points_of(results.experiment)[-1], f"eval_wer/{SHORT_NAMES.get(task, task)}"
    courses: dict[str, dict[int, list[float]]] = {}
    for arm in results.experiment.arms:
        course: dict[int, list[float]] = defaultdict(list)
        for record in results.cells.get((point, arm), []):
            for entry in record["validation"]:
                if key in entry:
                    course[entry["step"]].append(entry[key])
        courses[arm] = course
    if max(map(len, courses.values())) < 3:
        return ""
    steps = sorted({step for course in courses.values() for step in course})
    rows = [
        [str(step), *(spread(course[step]) if step in course else "" for course in courses.values())] for step in steps
    ]
    where = "" if point == PLAIN else f", at {point}"
    return f"In the course of training{where} (validation split):\n\n{_grid(['step', *courses], rows)}"


def _preservation(results: Results) -> str:
    """Perplexity of each modality alone before and after fusion, at the last point; frozen towers are compared bit by
    bit instead."""
    point = points_of(results.experiment)[-1]
    rows: list[list[str]] = []
    for arm in results.experiment.arms:
        cell = results.cells.get((point, arm), [])
        for name in sorted({n for r in cell for n in r["perplexity_after"]}):
            before, after = ([r[f"perplexity_{when}"][name] for r in cell] for when in ("before", "after"))
            rows.append([arm, name, _constant(before), spread(after)])
        for name in sorted({n for r in cell for n in r["frozen_unchanged"]}):
            same = all(r["frozen_unchanged"].get(name, False) for r in cell)
            rows.append([arm, f"{name}, frozen", "", "bit-identical in every run" if same else "CHANGED"])
    if not rows:
        return ""
    where = "" if point == PLAIN else f"At {point}. "
    heads = ["arm", "modality", "perplexity before", "after"]
    return f"{where}Perplexity per token on each modality alone, on the validation split.\n\n{_lines(heads, rows)}"


def table(results: Results, task: str) -> str:
    """WER of arms by points, in Markdown."""
    arms = list(results.experiment.arms)
    extras = ["oracle_wer", "judge_wer_on_originals"]
    found = [e for e in extras if any(e in r["scores"][task] for cell in results.cells.values() for r in cell)]
    heads = [*arms, *(e.replace("_", " ").removesuffix(" wer") for e in found)]
    rows = []
    for point in points_of(results.experiment):
        cells = [results.cells.get((point, arm), []) for arm in arms]
        texts = [spread([r["scores"][task]["wer"] for r in cell]) for cell in cells]
        texts += [_constant([r["scores"][task][extra] for cell in cells for r in cell]) for extra in found]
        rows.append([point, *texts])
    return _grid([results.experiment.axis or "data", *heads], rows)


def _grid(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, on its side where it would be wider than long."""
    if len(heads) - 1 > 2 * len(rows):
        heads, *rows = (list(column) for column in zip(heads, *rows))
    return _lines(heads, rows)


def _lines(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def spread(values: Sequence[float]) -> str:
    """Mean, least and most in brackets; without them it is one value."""
    if not values:
        return "not run"
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def _constant(values: Sequence[float]) -> str:
    """As `spread`, of what is alike in all runs but for exceptions."""
    return spread(values[:1] if len({f"{value:.1f}" for value in values}) == 1 else values)


def _differences(results: Results, task: str) -> str:
    """The first arm against each other one, at the same point and, with less data, against their last point; over the
    seeds that both have."""
    first, *others = results.experiment.arms
    points = points_of(results.experiment)
    pairs = [(point, point) for point in points] + [(point, points[-1]) for point in points[:-1]]
    lines = [_difference(results, task, (a, first), (b, other)) for a, b in pairs for other in others]
    return "\n".join(line for line in lines if line)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two cells on the seeds that both have.

    Attributes:
        difference, low, high: ours minus theirs in points of WER, and its 95 % paired bootstrap interval.
        ours, theirs: WER in per cent, mean over the seeds.
        relative: the difference in per cent of theirs; above: of what is above the codec alone, `None` where that is
            not known, or nothing is.
        seeds: how many.
    """

    difference: float
    low: float
    high: float
    ours: float
    theirs: float
    relative: float
    above: float | None
    seeds: int


def compare(mine: Cell, other: Cell, task: str) -> Comparison | None:
    """One cell minus another; `None` without a common seed."""
    ours, theirs = ({r["run"]["seed"]: r["scores"][task] for r in cell} for cell in (mine, other))
    if not (seeds := sorted(ours.keys() & theirs.keys())):
        return None
    references = ours[seeds[0]]["references"]
    assert all(x[s]["references"] == references for x in (ours, theirs) for s in seeds), "one test split"
    a, b = ([x[s]["hypotheses"] for s in seeds] for x in (ours, theirs))
    difference, low, high = paired_interval(references, a, b)
    rates = [float(np.mean([x[s]["wer"] for s in seeds])) for x in (ours, theirs)]
    above = None
    if all("oracle_wer" in x[s] for x in (ours, theirs) for s in seeds):
        floors = [float(np.mean([x[s]["oracle_wer"] for s in seeds])) for x in (ours, theirs)]
        left = [rate - floor for rate, floor in zip(rates, floors)]
        above = _relative(*left) if min(left) > 0 else None  # else there is nothing to take a share of
    return Comparison(
        difference=difference,
        low=low,
        high=high,
        ours=rates[0],
        theirs=rates[1],
        relative=_relative(*rates),
        above=above,
        seeds=len(seeds),
    )


def number_of_seeds(found: Comparison) -> str:
    """In words."""
    return f"{found.seeds} seed{'s' * (found.seeds != 1)}"


def _difference(results: Results, task: str, mine: tuple[str, str], other: tuple[str, str]) -> str:
    """One cell (point, arm) minus another, in words; empty without a common seed."""
    found = compare(results.cells.get(mine, []), results.cells.get(other, []), task)
    if found is None:
        return ""
    (point, arm), (elsewhere, against) = mine, other
    if point == PLAIN:
        names = f"{arm} minus {against}"
    elif point == elsewhere:
        names = f"at {point}, {arm} minus {against}"
    else:
        names = f"{arm} at {point} minus {against} at {elsewhere}"
    above = "" if found.above is None else f", {found.above:+.0f} % of what is above the codec alone"
    return (
        f"- {names}: {found.difference:+.1f} points (95 % paired bootstrap {found.low:+.1f} to {found.high:+.1f}; "
        f"{found.relative:+.0f} % relative{above}), {number_of_seeds(found)}."
    )


def _relative(ours: float, theirs: float) -> float:
    return 100 * (ours - theirs) / max(theirs, 1e-9)


def draw(results: Results, picture: Path) -> None:
    """One panel a task: WER over points, the mean a line, least to most a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, points = results.experiment.tasks, points_of(results.experiment)
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(6.5 * len(tasks), 4.2), constrained_layout=True, squeeze=False
    )
    for axes, task in zip(panels[0], tasks):
        for arm in results.experiment.arms:
            at = [i for i, p in enumerate(points) if results.cells.get((p, arm))]
            rates = [[r["scores"][task]["wer"] for r in results.cells[points[i], arm]] for i in at]
            if not at:
                continue
            (line,) = axes.plot(at, [np.mean(r) for r in rates], marker="o", label=arm)
            axes.fill_between(at, [min(r) for r in rates], [max(r) for r in rates], color=line.get_color(), alpha=0.2)
        axes.set_xticks(range(len(points)), points)
        axes.set_xlabel(results.experiment.axis)
        axes.set_ylabel("test WER (%)")
        axes.set_title(task)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # where all points are alike, they are not cut in half
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)

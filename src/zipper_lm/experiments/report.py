"""`zipper report`: the records of experiments as one page of tables with spread, and curves."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zipper_lm.evaluation.forgetting import FORGETTING
from zipper_lm.evaluation.scoring import SHORT_NAMES
from zipper_lm.experiments.comparison import compare
from zipper_lm.experiments.curves import draw
from zipper_lm.experiments.plan import PLAIN, cells_of, points_of
from zipper_lm.experiments.records import Results, read_results
from zipper_lm.utils.files import check_output, new_file


def write_report(
    files: Sequence[str | Path], page: str | Path, *, pictures: str | Path | None = None, overwrite: bool = False
) -> None:
    """One page in Markdown: what there is, then each experiment, with a picture of it if it has several points.

    Args:
        files: records of experiments. page: the file to write. pictures: folder for the pictures, named after the
            experiments; default beside the page, and after it too. overwrite: replace the page and the pictures.

    Raises:
        ValueError: as `read_results`, if two files have one name, or if the page or a picture exists and `overwrite` is
            false.
    """
    page = Path(page)
    found = [read_results(file) for file in files]
    if twice := sorted(name for name, count in Counter(r.name for r in found).items() if count > 1):
        raise ValueError(f"results: {twice} is the name of several files; sections and pictures are named after them")
    drawn = {
        r.name: page.with_name(f"{page.stem}-{r.name}.png") if pictures is None else Path(pictures) / f"{r.name}.png"
        for r in found
        if len(points_of(r.experiment)) > 1 and r.cells
    }
    for file in (page, *drawn.values()):
        check_output(file, overwrite, folder=False)
    parts = [
        f"# {found[0].name if len(found) == 1 else 'Results'}\n",
        "Written by `zipper report` from the raw records; no number in a table is typed by hand.\n"
        "WER in per cent on the test split: mean over seeds, least and most in brackets; without, of one run.\n"
        "Differences are of the seeds that both arms have, in points of WER, relative to the other arm's WER, and to "
        "what of it is above that of the codec alone. Their 95 % interval is over test rows (paired bootstrap) and "
        "seeds (Student's t, which of two seeds says little); of one seed it is over rows alone, and says nothing of "
        "another seed. Each is of one comparison: of many, some leave out zero by chance.\n",
    ]
    if len(found) > 1:
        parts += [overview({f"#{r.name}": r for r in found}), ""]
    for results in found:
        parts += [f"## {results.name}\n"] * (len(found) > 1)
        parts.append(_section(results))
        if picture := drawn.get(results.name):
            with new_file(picture, overwrite) as file:
                draw(results, file)
            place = os.path.relpath(picture.resolve(), page.resolve().parent)
            parts.append(f"![{results.experiment.question}]({Path(place).as_posix()})\n")
    with new_file(page, overwrite) as file:
        file.write_text("\n".join(parts), encoding="utf-8")


def overview(found: Mapping[str, Results]) -> str:
    """A table with a row an experiment, in Markdown.

    Args:
        found: where each is told, and its records.
    """
    rows = [
        [f"[{r.name}]({place})", r.experiment.question, r.experiment.finding, _runs(r)] for place, r in found.items()
    ]
    return _lines(["experiment", "question", "finding", "runs"], rows)


def _runs(results: Results) -> str:
    """How many of those that were planned."""
    experiment = results.experiment
    wanted = len(cells_of(experiment)) * len(experiment.seeds)
    return f"{sum(map(len, results.cells.values()))} of {wanted}"


def _section(results: Results) -> str:
    experiment = results.experiment
    lines = [
        f"{experiment.question}\n",
        *([f"**{experiment.finding}**\n"] if experiment.finding else []),
        f"    zipper experiment experiments/{results.name}.yaml\n",
        f"{_runs(results)} runs, seeds {', '.join(map(str, experiment.seeds))}; {results.trials} trials before them, "
        "chosen on validation.\n",
    ]
    if results.failed:
        lines += [f"Diverged, and are in no table: {', '.join(results.failed)}.\n"]
    if experiment.notes:
        lines += [*(f"- {note}" for note in experiment.notes), ""]
    if experiment.forgetting and (found := headline(results)):
        lines += [f"### {results.name}: what is learned, and what is forgotten\n", found, ""]
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
        if course:
            courses[arm] = course
    if max(map(len, courses.values()), default=0) < 3:
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
            before, after = ([_told(r[f"perplexity_{when}"][name]) for r in cell] for when in ("before", "after"))
            rows.append([arm, name, _constant(before), spread(after)])
        for name in sorted({n for r in cell for n in r["frozen_unchanged"]}):
            same = all(r["frozen_unchanged"].get(name, False) for r in cell)
            rows.append([arm, f"{name}, frozen", "", "bit-identical in every run" if same else "CHANGED"])
    if not rows:
        return ""
    where = "" if point == PLAIN else f"At {point}. "
    heads = ["arm", "modality", "perplexity before", "after"]
    return f"{where}Perplexity per token on each modality alone, on the validation split.\n\n{_lines(heads, rows)}"


def headline(results: Results) -> str:
    """At each point, what every arm writes and says wrong, and what its text decoder has forgotten, in Markdown; empty
    if no record tells of it."""
    tasks = results.experiment.tasks
    cells = {
        (point, arm): cell for point, arm in cells_of(results.experiment) if (cell := results.cells.get((point, arm)))
    }
    if not any(FORGETTING in r for cell in cells.values() for r in cell):
        return ""
    judged = [task for task in tasks if any("oracle_wer" in r["scores"][task] for cell in cells.values() for r in cell)]
    twice = [t for t in tasks if any("second_judge" in r["scores"][t] for cell in cells.values() for r in cell)]
    heads = [results.experiment.axis or "data", "arm"]
    for task in tasks:
        heads += [f"{task}, WER %", *[f"{task}, above the codec"] * (task in judged)]
        heads += [f"{task}, as the second judge hears it", f"{task}, above the codec by it"] * (task in twice)
    heads += [
        "perplexity of other text",
        "times what it was",
        "answers that stay the same, %",
        "right before, %",
        "right after, %",
    ]
    rows = []
    for (point, arm), cell in cells.items():
        row = [point, arm]
        for task in tasks:
            scores = [r["scores"][task] for r in cell]
            row += [spread([s["wer"] for s in scores]), *[_above(scores)] * (task in judged)]
            if task in twice:
                second = [s["second_judge"] for s in scores if "second_judge" in s]
                row += [spread([s["wer"] for s in second]), _above(second)]
        rows.append([*row, *_forgotten([f for r in cell if "after" in (f := r.get(FORGETTING, {}))])])
    told = (
        "The text decoder is asked as itself, without zips, and so is the checkpoint that it came from: perplexity a "
        "token on text that no run trained on, and plain questions, answered greedily. Above the codec: points of WER "
        "beyond what the same judge makes of the codec's copies of the originals."
    )
    return f"{told}\n\n{_lines(heads, rows)}"


def _above(scores: Sequence[Mapping[str, Any]]) -> str:
    return spread([s["wer"] - s["oracle_wer"] for s in scores if "oracle_wer" in s])


def _forgotten(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last cells of a row of `headline`: perplexity, its growth, answers kept, right ones before and after."""
    after, before = ([_told(f[when]["perplexity"]) for f in found] for when in ("after", "before"))
    times = [f"{value:.3g}" for value in (min(r), max(r))] if (r := [a / b for a, b in zip(after, before)]) else []
    kept = [100 * f["same_answers"] / f["questions"] for f in found]
    right = [[100 * f[when]["right"] / f["questions"] for f in found] for when in ("before", "after")]
    if not found:
        return ["not measured"] * 5
    return [spread(after), " to ".join(dict.fromkeys(times)), spread(kept), *map(_constant, right)]


def _told(perplexity: float | None) -> float:
    """JSON knows no infinity."""
    return math.inf if perplexity is None else perplexity


def table(results: Results, task: str) -> str:
    """WER of arms by points, in Markdown."""
    arms = list(results.experiment.arms)
    extras = ["oracle_wer", "judge_wer_on_originals"]
    found = [e for e in extras if any(e in r["scores"][task] for cell in results.cells.values() for r in cell)]
    heads = [*arms, *(e.replace("_", " ").removesuffix(" wer") for e in found)]
    rows, planned = [], cells_of(results.experiment)
    for point in points_of(results.experiment):
        cells = [results.cells.get((point, arm), []) for arm in arms]
        texts = [
            spread([r["scores"][task]["wer"] for r in cell]) if cell or (point, arm) in planned else ""
            for arm, cell in zip(arms, cells)
        ]
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
    """The first arm against each other one, at the same point, and, with less data, against the last point of those of
    another architecture; over the seeds that both have."""
    first, *others = results.experiment.arms
    kind = {arm: r["recipe"]["architecture"] for (_, arm), cell in results.cells.items() for r in cell}
    foreign = [arm for arm in others if {first, arm} <= kind.keys() and kind[arm] != kind[first]]
    points = points_of(results.experiment)
    beside = [((point, first), (point, other)) for point in points for other in others]
    ahead = [((point, first), (points[-1], other)) for point in points[:-1] for other in foreign]
    parts = [
        (f"{first} minus each other arm", beside),
        (f"{first} minus each arm of another architecture at {points[-1]}", ahead),
    ]
    tables = []
    for told, pairs in parts:
        if rows := [row for mine, other in pairs if (row := _difference(results, task, mine, other))]:
            heads = [results.experiment.axis or "data", "other arm", first, "other", "points", "95 % interval"]
            heads += ["relative, %", "above codec, %", "seeds"]
            tables.append(f"{told}:\n\n{_lines(heads, rows)}")
    return "\n\n".join(tables)


def _difference(results: Results, task: str, mine: tuple[str, str], other: tuple[str, str]) -> list[str]:
    """A row: one cell (point, arm) minus another; empty without a common seed."""
    found = compare(results.cells.get(mine, []), results.cells.get(other, []), task)
    if found is None:
        return []
    above = "" if found.above is None else f"{found.above:+.0f}"
    rates = [f"{found.ours:.1f}", f"{found.theirs:.1f}", f"{found.difference:+.1f}"]
    interval = f"{found.low:+.1f} to {found.high:+.1f}"
    seeds = str(found.seeds) if found.judges < 2 else f"{found.seeds}; {found.judges} judges"
    return [mine[0], other[1], *rates, interval, f"{found.relative:+.0f}", above, seeds]

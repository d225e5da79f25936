"""The pages say what the raw records under docs/runs say."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from zipper_lm.experiments.plan import cells_of, read_experiment, recipe_of, run_hash, runs_of, trials_of
from zipper_lm.experiments.report import write_report
from zipper_lm.experiments.run import still_holds
from zipper_lm.jobs.recipes.reader import to_mapping

ROOT = Path(__file__).parent.parent
ORDER = (
    "data-curve-long",
    "more-seeds",
    "converged",
    "augmentation",
    "pseudo-labels",
    "positions",
    "early-stopped-tower",
    "equal-exposure",
    "strong-tower",
    "more-steps",
    "data-curve-cpu",
    "main-cpu",
    "few-pairs",
    "digit-images",
    "window",
    "window-digits",
    "ablations-cpu",
    "digit-images-long",
    "sounds-cpu",
    "sounds-variants",
)
sys.path.insert(0, str(ROOT / "benchmarks"))  # as it is for a script there
fill_docs = runpy.run_path(str(ROOT / "benchmarks" / "fill_docs.py"))


@pytest.mark.parametrize("name", fill_docs["PAGES"])
def test_every_result_block_is_its_record(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- results:" in page
    assert fill_docs["filled"](page) == page, "run: python benchmarks/fill_docs.py"


def test_a_changed_number_is_found_and_an_unknown_block_refused():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = page.replace("| speech to text | ", "| speech to text | 1", 1)
    assert changed != page
    assert fill_docs["filled"](changed) == page
    with pytest.raises(ValueError, match="no block 'moon'"):
        fill_docs["filled"]("<!-- results:moon -->\n<!-- end of results -->")


def test_the_results_page_is_what_the_records_say(tmp_path):
    folders = [ROOT / "results" / name for name in ORDER]
    assert {f.name for f in folders} == {f.name for f in (ROOT / "results").iterdir()}, "every experiment is told"
    write_report(folders, tmp_path / "results.md")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    command = (
        "zipper report " + " ".join(f"results/{f.name}" for f in folders) + " --output docs/results.md --overwrite"
    )
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == page, f"run: {command}"
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in (ROOT / "docs").glob("results-*.png")}


@pytest.mark.parametrize("folder", sorted(p for p in (ROOT / "results").iterdir()), ids=lambda p: p.name)
def test_every_record_is_of_its_experiment_as_it_stands(folder):
    """An experiment file that was changed after its runs would claim what was not run."""
    experiment = read_experiment(ROOT / "experiments" / f"{folder.name}.yaml")
    known = {}
    for arm in experiment.arms.values():
        assert set(arm.trials) == set(next(iter(experiment.arms.values())).trials), "as many trials for each arm"
    for point, name in cells_of(experiment):
        runs = [*trials_of(experiment, name, point)]
        for trial in experiment.arms[name].trials or [""]:
            runs += runs_of(experiment, name, point, trial)
        known |= {run_hash(experiment, run): run for run in runs}
    records = list(folder.glob("*--*.json"))
    assert records
    for file in records:
        record = json.loads(file.read_text(encoding="utf-8"))
        run = known[record["run_hash"]]
        assert run.name == file.stem
        assert still_holds(record["recipe"], to_mapping(recipe_of(experiment, run, "")))

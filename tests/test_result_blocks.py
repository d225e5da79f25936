"""The pages say what the raw records under docs/runs and results say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from zipper_lm.experiments.packing import pack
from zipper_lm.experiments.plan import cells_of, read_experiment, recipe_of, run_hash, runs_of, trials_of
from zipper_lm.experiments.records import read_records
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
sys.path.insert(0, str(ROOT / "tools"))  # as it is for a script there
fill_docs = runpy.run_path(str(ROOT / "tools" / "fill_docs.py"))


@pytest.mark.parametrize("name", fill_docs["PAGES"])
def test_every_result_block_is_its_record(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- results:" in page
    assert fill_docs["filled"](page) == page, "run: python tools/fill_docs.py"


def test_a_changed_number_is_found_and_an_unknown_block_refused():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = page.replace("| speech to text | ", "| speech to text | 1", 1)
    assert changed != page
    assert fill_docs["filled"](changed) == page
    with pytest.raises(ValueError, match="no block 'moon'"):
        fill_docs["filled"]("<!-- results:moon -->\n<!-- end of results -->")


def test_the_results_page_is_what_the_records_say(tmp_path):
    files = [ROOT / "results" / f"{name}.jsonl" for name in ORDER]
    assert set(files) == set((ROOT / "results").glob("*.jsonl")), "every experiment is told"
    write_report(files, tmp_path / "results.md")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    command = "zipper report " + " ".join(f"results/{f.name}" for f in files) + " --output docs/results.md --overwrite"
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == page, f"run: {command}"
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in (ROOT / "docs").glob("results-*.png")}


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.jsonl")), ids=lambda p: p.stem)
def test_every_record_is_of_its_experiment_as_it_stands(file, monkeypatch):
    """An experiment file that was changed after its runs would claim what was not run."""
    monkeypatch.chdir(ROOT)
    experiment = read_experiment(Path("experiments") / f"{file.stem}.yaml")
    plan, records = read_records(file)
    assert plan == to_mapping(experiment)
    assert records
    assert pack(plan, records.values()) == file.read_text(encoding="utf-8")
    known = {}
    for arm in experiment.arms.values():
        assert set(arm.trials) == set(next(iter(experiment.arms.values())).trials), "as many trials for each arm"
    for point, name in cells_of(experiment):
        runs = [*trials_of(experiment, name, point)]
        for trial in experiment.arms[name].trials or [""]:
            runs += runs_of(experiment, name, point, trial)
        known |= {run_hash(experiment, run): run for run in runs}
    for name, record in records.items():
        run = known[record["run_hash"]]
        assert run.name == name
        assert still_holds(record["recipe"], to_mapping(recipe_of(experiment, run, "")))

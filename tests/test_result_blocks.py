"""The pages say what the raw records under docs/runs and results say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from zipper_lm.experiments.packing import pack
from zipper_lm.experiments.plan import Experiment, cells_of, read_experiment, recipe_of, run_hash, runs_of, trials_of
from zipper_lm.experiments.records import read_records, read_results
from zipper_lm.experiments.run import still_holds
from zipper_lm.jobs.recipes.reader import build, to_mapping

ROOT = Path(__file__).parent.parent
FIGURE = re.compile(r"\d+\.\d+")
sys.path.insert(0, str(ROOT / "tools"))  # as it is for a script there
fill_docs = runpy.run_path(str(ROOT / "tools" / "fill_docs.py"))


@pytest.mark.parametrize("name", fill_docs["PAGES"])
def test_every_result_block_is_its_record(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- results:" in page
    assert fill_docs["filled"](page) == page, "run: python tools/fill_docs.py"


def test_a_changed_number_is_found_and_an_unknown_block_refused():
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    changed = page.replace("| speech to text | ", "| speech to text | 1", 1)
    assert changed != page
    assert fill_docs["filled"](changed) == page
    with pytest.raises(ValueError, match="no block 'moon'"):
        fill_docs["filled"]("<!-- results:moon -->\n<!-- end of results -->")


def test_every_experiment_is_told():
    names = set(fill_docs["EXPERIMENTS"])
    for suffix in (".jsonl", ".md"):
        assert {f.stem for f in (ROOT / "results").iterdir() if f.suffix == suffix} == names
    assert {f.stem for f in (ROOT / "docs" / "curves").iterdir()} < names


def test_the_readme_stays_short():
    """It had grown to 244 lines with five tables. It has one, and the rest has pages."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert len(re.findall(r"^\|[-| ]+\|$", readme, re.M)) == 1


def test_records_and_results_stay_small():
    """They were 12 MB in 468 files, and the page of them had 1908 lines."""
    assert sum(f.stat().st_size for f in (ROOT / "results").iterdir()) < 4e6
    assert len((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", fill_docs["EXPERIMENTS"])
def test_the_tables_of_an_experiment_are_what_its_records_say(name, tmp_path):
    page = fill_docs["write_page"](name, tmp_path)
    assert page.read_bytes() == (ROOT / "results" / page.name).read_bytes(), "run: python tools/fill_docs.py"
    curves = tmp_path / "docs" / "curves" / f"{name}.png"
    assert curves.exists() == (ROOT / "docs" / "curves" / curves.name).exists()


@pytest.mark.parametrize("name", fill_docs["EXPERIMENTS"])
def test_every_figure_of_a_finding_stands_in_its_tables(name):
    """Findings are typed by hand; tables are not."""
    figures = FIGURE.findall(read_results(ROOT / "results" / name).experiment.finding)
    page = (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
    told = {figure for line in page.splitlines() if line.startswith("|") for figure in FIGURE.findall(line)}
    assert figures
    assert set(figures) <= told


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.jsonl")), ids=lambda p: p.stem)
def test_every_record_is_of_its_experiment_as_it_stands(file, monkeypatch):
    """An experiment file that was changed after its runs would claim what was not run."""
    monkeypatch.chdir(ROOT)
    experiment = read_experiment(Path("experiments") / f"{file.stem}.yaml")
    plan, records = read_records(file)
    assert to_mapping(build(Experiment, plan)) == to_mapping(experiment)  # a key that was new since has its default
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


LOG = ROOT / "docs" / "LOG.md"
ENTRIES = re.findall(r"^## ([^\n]+)\n\n(.+?)(?=\n## |\Z)", LOG.read_text(encoding="utf-8"), re.M | re.S)


def figures_in(target: Path) -> set[str]:
    """Numbers with a decimal in a page or a recipe, or in records, rounded as a page may."""
    files = sorted(target.rglob("*.json*")) if target.is_dir() else [target]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    found = FIGURE.findall(text)
    if files[0].suffix in (".json", ".jsonl"):
        found = [f"{float(figure):.{digits}f}" for figure in found for digits in (1, 2)]
    return set(found)


def test_the_log_is_newest_first():
    dates = [title[:10] for title, _ in ENTRIES]
    assert len(dates) > 40
    assert dates[:-1] == sorted(dates[:-1], reverse=True)


@pytest.mark.parametrize(("title", "entry"), ENTRIES, ids=[title for title, _ in ENTRIES])
def test_every_figure_of_the_log_is_recorded_or_said_not_to_be(title, entry):
    for item in re.split(r"^- ", entry, flags=re.M)[1:]:
        if "not recorded" in " ".join(item.lower().split()):
            continue
        links = re.findall(r"\]\(([^)#\s]+)", item)
        assert links or not re.search(r"\d", item), "neither a record nor the word that there is none"
        told: set[str] = set().union(*(figures_in((LOG.parent / link).resolve()) for link in links))
        assert set(FIGURE.findall(item)) <= told

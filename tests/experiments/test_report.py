"""Records to a page: tables, spread, differences, and what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_experiment import plan

from zipper_lm.experiments.plan import PLAIN, points_of, read_experiment
from zipper_lm.experiments.records import Results, keep, read_results
from zipper_lm.experiments.report import _by_step, _differences, _preservation, _runs, spread, table, write_report
from zipper_lm.experiments.run import run_experiment
from zipper_lm.jobs.recipes.reader import to_mapping

OURS = {"recipe": {"architecture": "zipper"}}


def test_how_soon_each_comes_to_where(tmp_path: Path) -> None:
    experiment = read_experiment(plan(tmp_path))

    def record(course: dict[int, float]) -> dict[str, Any]:
        return {"validation": [{"step": n, "eval_wer/speech->text": wer, "eval_wer": 0.0} for n, wer in course.items()]}

    cells = {
        ("all", "zipper"): [record({5: 40.0, 10: 20.0, 15: 8.0}), record({5: 50.0, 10: 20.0, 15: 10.0})],
        ("all", "single"): [record({10: 90.0, 20: 30.0})],
        ("half", "zipper"): [record({1: 1.0})],
    }
    text = _by_step(Results("contest", experiment, cells, 0), "asr")
    assert "validation split" in text
    assert text.splitlines()[-4:] == [
        "| 5 | 45.0 (40.0 to 50.0) |  |",
        "| 10 | 20.0 (20.0 to 20.0) | 90.0 |",
        "| 15 | 9.0 (8.0 to 10.0) |  |",
        "| 20 |  | 30.0 |",
    ]
    few = {key: [record({5: 40.0, 10: 20.0})] for key in cells}
    assert _by_step(Results("contest", experiment, few, 0), "asr") == ""


def test_one_run_is_told_from_several_alike() -> None:
    """Two runs with the same errors looked like one."""
    assert (spread([]), spread([3.0]), spread([3.0, 3.0])) == ("not run", "3.0", "3.0 (3.0 to 3.0)")


def test_what_was_too_large_for_a_number_is_told(tmp_path: Path) -> None:
    """JSON has no infinity: a record says null of a perplexity that overflowed."""
    experiment = read_experiment(plan(tmp_path, points={}))
    record = {"perplexity_before": {"text": 8.0}, "perplexity_after": {"text": None}, "frozen_unchanged": {}}
    told = _preservation(Results("contest", experiment, {(PLAIN, "single"): [record]}, 0))
    assert told.splitlines()[-1] == "| single | text | 8.0 | inf |"


def test_many_arms_are_read_from_top_to_bottom(tmp_path: Path) -> None:
    """Sixteen arms at one point made a table of one line, 17 columns wide."""

    def told(points: dict[str, Any]) -> list[str]:
        experiment = read_experiment(plan(tmp_path, points=points))
        scores = {"tts": {"wer": 20.0, "oracle_wer": 5.0}}
        cells = {(point, "zipper"): [{"scores": scores}, {"scores": scores}] for point in points_of(experiment)}
        return table(Results("contest", experiment, cells, 0), "tts").splitlines()

    rate = "20.0 (20.0 to 20.0)"
    head = "| share of the pairs |"
    assert told({}) == [
        f"{head} {PLAIN} |",
        "| --- | --- |",
        f"| zipper | {rate} |",
        "| single | not run |",
        "| oracle | 5.0 |",
    ]
    assert told({"half": [], "all": []}) == [
        f"{head} zipper | single | oracle |",
        "| --- | --- | --- | --- |",
        f"| half | {rate} | not run | 5.0 |",
        f"| all | {rate} | not run | 5.0 |",
    ]


def test_an_arm_that_is_compared_at_some_points_only(tmp_path: Path) -> None:
    """112 runs were said to be missing from a table of 26, most of which nobody wanted."""
    arms: dict[str, Any] = {"zipper": {}, "single": {"points": ["all"]}}
    experiment = read_experiment(plan(tmp_path, arms=arms, tasks=["asr"], seeds=[1]))
    results = Results("contest", experiment, {}, 0)
    assert table(results, "asr").splitlines()[2:] == ["| half | not run |  |", "| all | not run | not run |"]
    assert _runs(results) == "0 of 3"


def test_records_of_an_earlier_plan_are_left_out_of_the_report(tmp_path: Path) -> None:
    file = plan(tmp_path, arms={"zipper": {}}, points={}, tasks=["asr"])
    run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", Console(quiet=True))
    keep(tmp_path / "results", plan=to_mapping(read_experiment(file)) | {"seeds": [2]})
    assert [[r["run"]["seed"] for r in cell] for cell in read_results(tmp_path / "results").cells.values()] == [[2]]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    """The curves of the second stood in the section of the first, too: pictures are named after files."""
    for place in ("a", "b"):
        file = plan(tmp_path, arms={"zipper": {}}, points={}, tasks=["asr"])
        keep(tmp_path / place / "x", plan=to_mapping(read_experiment(file)))
    with pytest.raises(ValueError, match=r"\['x'\] is the name of several files"):
        write_report([tmp_path / "a" / "x", tmp_path / "b" / "x"], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_what_is_not_run_yet_is_said(tmp_path: Path) -> None:
    keep(tmp_path / "results", plan={"question": "q", "recipe": "r", "arms": {"a": {}}, "tasks": ["asr"]})
    write_report([tmp_path / "results"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "not run" in page
    assert "0 of 3 runs" in page
    keep(tmp_path / "more", plan={"question": "r", "recipe": "r", "arms": {"a": {}}, "tasks": ["asr"]})
    write_report([tmp_path / "results", tmp_path / "more.jsonl"], tmp_path / "both.md")
    assert "| [more](#more) | r |  | 0 of 3 |" in (tmp_path / "both.md").read_text()
    (tmp_path / "page.md").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        write_report([tmp_path / "results"], tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "mine"
    write_report([tmp_path / "results"], tmp_path / "page.md", overwrite=True)
    with pytest.raises(ValueError, match="run zipper experiment first"):
        write_report([tmp_path / "none"], tmp_path / "page.md")


@pytest.mark.parametrize(("oracle", "above"), [(5.0, "+200"), (10.0, ""), (25.0, "")])
def test_no_share_of_nothing(oracle: float, above: str, tmp_path: Path) -> None:
    """A rate no higher than that of the codec alone gave differences of billions of per cent, or of the wrong sign."""
    experiment = read_experiment(plan(tmp_path, arms={"a": {}, "b": {}}, points={}, tasks=["tts"], seeds=[1]))
    said = {"references": ["one two"] * 5, "hypotheses": ["one two"] * 5, "oracle_wer": oracle}
    cells = {
        (PLAIN, arm): [{**OURS, "run": {"seed": 1}, "scores": {"tts": {**said, "wer": wer}}}]
        for arm, wer in (("a", 20.0), ("b", 10.0))
    }
    row = _differences(Results("results", experiment, cells, 0), "tts").splitlines()[-1]
    assert row.split(" | ")[-3:] == ["+100", above, "1 |"]


def heard(seed: int, references: list[str], originals: float) -> dict[str, Any]:
    run = {"seed": seed, "arm": "a", "point": "all"}
    said = {"references": references, "hypotheses": references, "wer": 0.0, "judge_wer_on_originals": originals}
    return {**OURS, "run": run, "scores": {"tts": said}}


def test_what_different_judges_heard_is_told(tmp_path: Path) -> None:
    """One cell of a page had two judges, one of which errs a quarter more often, and nothing said so."""
    experiment = read_experiment(plan(tmp_path, arms={"a": {}, "b": {}}, points={}, tasks=["tts"]))
    one, other = heard(1, ["one"], 3.3), heard(1, ["one"], 4.1)
    for cell, said in ((one, "1"), (other, "1; 2 judges")):
        cells = {(PLAIN, "a"): [one], (PLAIN, "b"): [cell]}
        row = _differences(Results("results", experiment, cells, 0), "tts").splitlines()[-1]
        assert row.split(" | ")[-1] == f"{said} |"


def test_other_test_rows_are_refused(tmp_path: Path) -> None:
    """A corpus that was made anew between two runs ended the report in an AssertionError."""
    experiment = read_experiment(plan(tmp_path, arms={"a": {}, "b": {}}, points={}, tasks=["tts"]))
    cells = {(PLAIN, "a"): [heard(1, ["one"], 3.3)], (PLAIN, "b"): [heard(1, ["two"], 3.3)]}
    with pytest.raises(ValueError, match="not scored on the same rows"):
        _differences(Results("results", experiment, cells, 0), "tts")


def test_each_difference_is_a_row_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    """Forty sentences, one a pair of arms and shares, were read by nobody."""
    experiment = read_experiment(plan(tmp_path, points={"half": [], "all": []}, tasks=["asr"], seeds=[1, 2]))

    def record(seed: int, wrong: int, kind: str = "zipper") -> dict[str, Any]:
        said = ["one"] * (10 - wrong) + ["two"] * wrong
        return {
            "recipe": {"architecture": kind},
            "run": {"seed": seed},
            "scores": {"asr": {"references": ["one"] * 10, "hypotheses": said, "wer": 10.0 * wrong}},
        }

    other = "single-decoder"
    cells = {
        ("half", "zipper"): [record(1, 6), record(2, 0)],
        ("half", "single"): [record(1, 8, other)],
        ("all", "zipper"): [record(1, 1)],
        ("all", "single"): [record(1, 3, other), record(2, 1, other)],
    }
    beside, ahead = _differences(Results("contest", experiment, cells, 0), "asr").split("\n\nzipper minus each arm ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (beside + "\n" + ahead).splitlines()]
    told = {(row[0], row[2], row[3], row[4], row[6], row[8]) for row in rows if row and row[1] == "single"}
    assert told == {
        ("half", "60.0", "80.0", "-20.0", "-25", "1"),
        ("all", "10.0", "30.0", "-20.0", "-67", "1"),
        ("half", "30.0", "20.0", "+10.0", "+50", "2"),
    }
    assert ahead.startswith("of another architecture at all:")
    alike = {key: [{**r, **OURS} for r in cell] for key, cell in cells.items()}
    alone = _differences(Results("contest", experiment, alike, 0), "asr")
    assert alone == beside, "less data is compared with another architecture alone: the rest were two thirds of a page"

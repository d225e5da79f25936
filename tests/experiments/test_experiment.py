"""An experiment from its file to its page: what is run, what is not run again, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console
from tiny_experiment import plan
from tiny_recipes import workshop

from zipper_lm.evaluation.judges import load_judge
from zipper_lm.experiments import run as run_module
from zipper_lm.experiments.plan import (
    PLAIN,
    Experiment,
    before_of,
    before_place,
    points_of,
    read_experiment,
    recipe_of,
    run_hash,
    runs_of,
    trials_of,
    whole,
)
from zipper_lm.experiments.records import keep, read_records, read_results
from zipper_lm.experiments.report import write_report
from zipper_lm.experiments.run import differences, run_experiment, still_holds
from zipper_lm.jobs.recipes.reader import build, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.training.base import Diverged


def test_runs_differ_in_what_the_file_says(tmp_path: Path) -> None:
    experiment = read_experiment(plan(tmp_path), ["training.steps=3"])
    assert points_of(experiment) == ["half", "all"]
    assert [r.name for r in trials_of(experiment, "zipper", "half")] == [
        "zipper--half--trial-slow--seed0",
        "zipper--half--trial-fast--seed0",
    ]
    assert trials_of(experiment, "single", "half") == []
    first, second = runs_of(experiment, "zipper", "half", "fast")
    assert [first.name, second.name] == ["zipper--half--seed1", "zipper--half--seed2"]
    recipe = recipe_of(experiment, second, tmp_path / "out")
    assert (recipe.seed, recipe.data.fraction, recipe.training.learning_rate) == (2, 0.5, 1e-2)
    assert recipe.training.steps == 3, "the command line has the last word over what all runs share"
    (single, _) = runs_of(experiment, "single", "all")
    assert recipe_of(experiment, single, "out").architecture == "single-decoder"
    hashes = {run_hash(experiment, r) for r in [first, second, single, *trials_of(experiment, "zipper", "half")]}
    assert len(hashes) == 5


def test_from_file_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read_experiment(plan(tmp_path))
    fused: list[str] = []
    real = run_module.fuse

    def counted(recipe: Any, **kwargs: Any) -> Any:
        fused.append(Path(recipe.output).name)
        if len(fused) == 4:
            raise KeyboardInterrupt
        return real(recipe, **kwargs)

    monkeypatch.setattr(run_module, "fuse", counted)
    console = Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path / "results", tmp_path / "work", console)
    records = run_experiment(experiment, tmp_path / "results", tmp_path / "work", console)
    assert len(fused) == 1 + 4 + 8, "two trials at two points, eight runs; only the interrupted one comes twice"
    assert len(set(fused)) == 12
    again = run_experiment(experiment, tmp_path / "results", tmp_path / "work", console)
    assert len(fused) == 13
    assert again == json.loads(json.dumps(records))
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {"locks"}, "models are dropped when they are scored"

    record = records[0]
    assert record["run"]["trial"] in ("slow", "fast")
    _, kept = read_records(tmp_path / "results")
    tried = {name: kept[f"zipper--half--trial-{name}--seed0"]["validation_score"] for name in ("slow", "fast")}
    assert tried[record["run"]["trial"]] == min(tried.values())
    assert {"asr", "tts"} == set(record["scores"])
    assert record["recipe"]["output"] == "", "a record names no place of the machine that made it"
    assert str(tmp_path / "work") not in json.dumps(record)
    assert len(record["scores"]["asr"]["references"]) == 4
    assert "oracle_wer" in record["scores"]["tts"]
    assert record["scores"]["tts"]["judge"] == load_judge(workshop() / "judge").digest()
    assert record["frozen_unchanged"] == {"text": True}
    assert {"torch", "cores", "python"} <= set(record["made_with"])
    assert "scored_with" not in record

    write_report([tmp_path / "results"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "8 of 8 runs, seeds 1, 2; 4 trials before them" in page
    assert "Which writes better?" in page
    assert "\n| half | single | " in page
    assert "| zipper | text, frozen |  | bit-identical in every run |" in page
    assert "| single | text |" in page, "what the single decoder forgets is told"
    assert (tmp_path / "page-results.png").stat().st_size > 5000
    for cell in read_results(tmp_path / "results").cells.values():
        assert [r["run"]["seed"] for r in cell] == [1, 2]


def test_what_is_forgotten_is_measured_and_told(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_text('{"text": "six six one"}\n{"text": "two one six"}\n')
    (tmp_path / "questions.jsonl").write_text('{"text": "one two", "answers": ["six"]}\n{"text": "six"}\n')
    measured = {"forgetting": "other", "questions": "questions.jsonl", "second_judge": str(workshop() / "judge")}
    arms = {"zipper": {}, "single": {"set": ["architecture=single-decoder", "training.learning_rate=1"]}}
    read = read_experiment(plan(tmp_path, arms=arms, points={"all": []}, seeds=[1], **measured))
    plain = read_experiment(plan(tmp_path, arms=arms, points={"all": []}, seeds=[1]))
    assert run_hash(read, runs_of(read, "zipper", "all")[0]) != run_hash(plain, runs_of(plain, "zipper", "all")[0])
    zipper, single = run_experiment(read, tmp_path / "results", tmp_path / "work", Console(quiet=True))
    assert zipper["forgetting"]["same_answers"] == zipper["forgetting"]["questions"] == 2
    assert zipper["forgetting"]["before"] == zipper["forgetting"]["after"] == single["forgetting"]["before"]
    assert single["forgetting"]["after"]["perplexity"] > 1.5 * single["forgetting"]["before"]["perplexity"]
    second = zipper["scores"]["tts"]["second_judge"]
    assert {"wer", "cer", "judge", "oracle_wer", "judge_wer_on_originals"} == second.keys()
    assert second["wer"] == zipper["scores"]["tts"]["wer"], "it is the same judge here"
    write_report([tmp_path / "results"], tmp_path / "page.md")
    (row,) = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| all | zipper |")]
    assert " | 1 | 100.0 | " in row
    broken = read_experiment(plan(tmp_path, forgetting="nowhere"))
    with pytest.raises(ValueError, match="no file or folder"):
        run_experiment(broken, tmp_path / "more", tmp_path / "work", Console(quiet=True))
    with pytest.raises(ValueError, match="asked only beside a text"):
        read_experiment(plan(tmp_path, questions="questions.jsonl"))


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model was full of NaN, and was scored; now that it stops, the runs after it are made all the same."""
    experiment = read_experiment(plan(tmp_path, points={"all": []}, seeds=[1]))
    fused: list[str] = []
    real = run_module.fuse

    def diverging(recipe: Any, **kwargs: Any) -> Any:
        fused.append(Path(recipe.output).name)
        if "slow" in fused[-1] or "single" in fused[-1]:
            raise Diverged("training diverged at step 1 [documents 3]")
        return real(recipe, **kwargs)

    monkeypatch.setattr(run_module, "fuse", diverging)
    records = run_experiment(experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True))
    assert {r["run"]["arm"]: r.get("failed") for r in records} == {
        "zipper": None,
        "single": "training diverged at step 1 [documents 3]",
    }
    assert records[0]["run"]["trial"] == "fast", "a trial that diverged is not chosen"
    assert run_experiment(experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True)) == records
    assert len(fused) == 4
    write_report([tmp_path / "results"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "Diverged, and are in no table: single--all--seed1, zipper--all--trial-slow--seed0." in page


def test_only_some_runs_and_the_trials_that_they_need(tmp_path: Path) -> None:
    experiment = read_experiment(plan(tmp_path))
    records = run_experiment(
        experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True), only="zipper--half--*2"
    )
    assert [record["run"]["seed"] for record in records] == [2]
    assert set(read_records(tmp_path / "results")[1]) == {
        "zipper--half--trial-slow--seed0",
        "zipper--half--trial-fast--seed0",
        "zipper--half--seed2",
    }
    more = tmp_path / "more"
    arms: dict[str, Any] = {"zipper": {"points": ["half"]}, "single": {}}
    with pytest.raises(ValueError, match="no run has a name like 'zipper--all"):
        run_experiment(read_experiment(plan(tmp_path, arms=arms)), more, tmp_path / "work", only="zipper--all*")
    with pytest.raises(ValueError, match=r"only: no run has a name like 'zippr\*'; there are zipper--half--seed1, "):
        run_experiment(experiment, more, tmp_path / "work", Console(quiet=True), only="zippr*")
    assert not list(tmp_path.glob("*more*"))


def test_processes_share_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process is at is left to it and waited for, and whatever does not depend on it is done meanwhile."""
    experiment = read_experiment(plan(tmp_path, points={}, seeds=[1]))
    (trial, _) = trials_of(experiment, "zipper", PLAIN)
    fused: list[str] = []
    real = run_module.fuse

    def counted(recipe: Any, **kwargs: Any) -> Any:
        fused.append(Path(recipe.output).name)
        return real(recipe, **kwargs)

    monkeypatch.setattr(run_module, "fuse", counted)
    work = tmp_path / "work"
    (work / "locks").mkdir(parents=True)
    other = FileLock(work / "locks" / f"{trial.name}.lock")
    other.acquire()
    monkeypatch.setattr(run_module.time, "sleep", lambda _: other.release())
    records = run_experiment(experiment, tmp_path / "results", work, Console(quiet=True))
    assert len(records) == 2
    assert fused.index("single--all--seed1") < fused.index(trial.name) < fused.index("zipper--all--seed1")
    assert len(set(fused)) == len(fused) == 4


def test_pseudo_labels_are_written_by_a_model_of_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms, trials and seeds have one each, made under the work folder, and no record names that."""
    arms = {"alone": {}, "labelled": {"set": ["pseudo_labels={task: speech->text, limit: 5}"]}}
    experiment = read_experiment(plan(tmp_path, arms=arms, points={}))
    fused: list[str] = []
    real = run_module.fuse

    def counted(recipe: Any, **kwargs: Any) -> Any:
        fused.append(Path(recipe.output).parent.name)
        return real(recipe, **kwargs)

    monkeypatch.setattr(run_module, "fuse", counted)
    records = run_experiment(experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True))
    assert fused == ["work"] * 2 + ["labellers", "work"] * 2
    assert records[2]["recipe"]["pseudo_labels"]["model"] == "labeller"
    hashes = {run_hash(experiment, r) for arm in arms for r in runs_of(experiment, arm, PLAIN)}
    assert hashes == {r["run_hash"] for r in records}
    assert len(hashes) == 4


def test_trials_may_be_shorter(tmp_path: Path) -> None:
    experiment = read_experiment(plan(tmp_path, trial_set=["training.steps=7"]))
    (trial, _), (run, _) = trials_of(experiment, "zipper", "all"), runs_of(experiment, "zipper", "all", "slow")
    assert [recipe_of(experiment, r, "out").training.steps for r in (trial, run)] == [7, 1]
    assert recipe_of(experiment, trial, "out").training.learning_rate == 1e-6


def test_an_arm_may_start_from_a_model_trained_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the data in what all runs have held for that model, too: it saw less than the towers."""
    arms = {"seen": {"set": ["architecture=single-decoder"], "before": ["tasks={->text: 1}", "training.steps=2"]}}
    shared = ["training.steps=1", "data.fraction=0.9", "data.limit=8"]
    file = plan(tmp_path, arms=arms, tasks=["asr"], seeds=[1], set=shared)
    labelled = read_experiment(file, ["pseudo_labels={task: speech->text}"])
    first = before_of(labelled, "seen")
    assert first is not None
    assert recipe_of(labelled, first, "").pseudo_labels is None
    fused: list[Any] = []
    real = run_module.fuse

    def noted(recipe: Any, **kwargs: Any) -> Any:
        fused.append(recipe)
        return real(recipe, **kwargs)

    monkeypatch.setattr(run_module, "fuse", noted)
    records = run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", Console(quiet=True))
    before, *others = fused
    assert before.tasks == {"->text": 1}
    assert (before.data.fraction, before.data.limit) == (1.0, None), "all the unaligned data, whatever is aligned"
    assert [r.towers["text"].source for r in others] == [before.output] * 2
    assert len(records) == 2
    run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", Console(quiet=True))
    assert len(fused) == 3
    # A model in a work folder that had moved was trained anew, over the old one: its record holds paths.
    (tmp_path / "work").rename(tmp_path / "moved")
    kept = tmp_path / "results.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    kept.write_text("".join(line for line in lines if '"point":"all"' not in line))
    run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "moved", Console(quiet=True))
    assert len(fused) == 4
    assert fused[-1].towers["text"].source == str(tmp_path / "moved" / "before" / Path(before.output).name)


def test_what_several_runs_need_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is at the towers, then at the model that the arm starts from, when this one comes to them."""
    arms = {"seen": {"set": ["architecture=single-decoder"], "before": ["tasks={->text: 1}", "training.steps=2"]}}
    experiment = read_experiment(plan(tmp_path, arms=arms, points={}, tasks=["asr"], seeds=[1]))
    before = before_of(experiment, "seen")
    assert before is not None
    work, made, told = tmp_path / "work", [], []
    names = [f"before-{Path(before_place(experiment, before, work)).name}", "towers"]
    (work / "locks").mkdir(parents=True)
    others = {name: FileLock(work / "locks" / f"{name}.lock") for name in names}
    for other in others.values():
        other.acquire()
    at_last = threading.Timer(60, lambda: [other.release(force=True) for other in others.values()])
    at_last.daemon = True
    at_last.start()  # or a test that fails would wait for ever

    class Listener(Console):
        def print(self, *texts: Any, **_: Any) -> None:
            for name in names:
                if texts == (f"waiting for another process: {name}",):
                    told.append((name, len(made)))
                    others[name].release()

    monkeypatch.setattr(run_module, "make_towers", lambda *_: made.append("towers"))
    real = run_module.fuse
    monkeypatch.setattr(run_module, "fuse", lambda r, **k: made.append(r.output) or real(r, **k))
    run_experiment(experiment, tmp_path / "results", work, Listener(quiet=True))
    at_last.cancel()
    assert told == [(names[0], 0), (names[1], 0)]
    assert [Path(m).name for m in made] == [
        "towers",
        Path(before_place(experiment, before, work)).name,
        "towers",
        "seen--all--seed1",
    ]


def test_towers_are_made_once_from_all_the_data_and_never_mistaken(tmp_path: Path) -> None:
    """Towers used to lie where the recipe says, whatever had made them: one experiment took another's for its own."""
    file = plan(tmp_path, arms={"zipper": {}}, tasks=["asr"], seeds=[1])
    pretrain = {"codec": {"kind": "text", "options": {"vocab_size": 32}}, "training": {"steps": 1, "batch_size": 2}}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {"source": "outputs/text", "pretrain": {**pretrain, "backbone": small}}
    changes = [f"towers.text={json.dumps(made)}"]
    experiment = read_experiment(file, changes)
    sources = {
        recipe_of(experiment, run, "", tmp_path / "work").towers["text"].source
        for point in ("half", "all")
        for run in runs_of(experiment, "zipper", point)
    }
    assert len(sources) == 1, "the same towers at every share"
    other = read_experiment(file, [*changes, "towers.text.pretrain.training.steps=2"])
    (run, *_) = runs_of(other, "zipper", "all")
    assert recipe_of(other, run, "", tmp_path / "work").towers["text"].source not in sources
    assert run_hash(other, run) != run_hash(experiment, runs_of(experiment, "zipper", "all")[0])
    own = read_experiment(file, [*changes, 'towers.text.pretrain.data="sound-alone"'])
    places = {
        recipe_of(read_experiment(file, [*own.set, f"data.validation_limit={limit}"]), run, "").towers["text"].source
        for limit in (3, 5)
        for run in runs_of(own, "zipper", "all")
    }
    assert len(places) == 1, "a tower with data of its own is the same, whatever is aligned"
    run_experiment(experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True))
    (source,) = sources
    assert (Path(source) / "model.safetensors").is_file()
    assert [p.name for p in (tmp_path / "work" / "towers").iterdir()] == [Path(source).name]


def test_a_tower_that_spells_is_told_the_texts_of_the_share_alone(tmp_path: Path) -> None:
    """Towers are made from all the data. One with joint CTC then read the texts of all pairs, whatever share a point
    had: with 100 pairs it would have learned to spell from ten thousand."""
    file = plan(tmp_path, arms={"zipper": {}}, points={"few": ["data.limit=2"], "all": []}, seeds=[1])
    pretrain = {"codec": {"kind": "speech"}, "training": {"steps": 1, "batch_size": 2, "ctc": {"speech->text": 1}}}
    changes = [f"towers.speech={json.dumps({'source': 'outputs/speech', 'pretrain': pretrain})}"]

    def made(point: str, *more: str) -> FuseRecipe:
        experiment = read_experiment(file, [*changes, *more])
        (run,) = runs_of(experiment, "zipper", point)
        return whole(recipe_of(experiment, run, "", tmp_path / "work"))

    def limit(recipe: FuseRecipe) -> int | None:
        here = recipe.towers["speech"].pretrain
        assert here is not None
        return here.ctc_limit

    assert [limit(made(point)) for point in ("few", "all")] == [2, None]
    assert made("few").towers["speech"].source != made("all").towers["speech"].source
    own = "towers.speech.pretrain.ctc_limit"
    assert [limit(made(p, f"{own}={n}")) for p, n in (("few", 1), ("few", 5), ("all", 5))] == [1, 2, 5]
    with pytest.raises(
        ValueError, match=r"data\.fraction=0\.5: towers\.speech\.pretrain\.training\.ctc .* give data\.limit"
    ):
        made("all", "data.fraction=0.5")
    assert made("all", "data.fraction=0.5", f"towers.speech.pretrain.data={tmp_path}").data.fraction == 1.0


def test_scoring_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was silent, for many minutes where a large decoder speaks."""
    told: list[tuple[Any, ...]] = []

    @contextmanager
    def bar(console: Console, what: str) -> Iterator[Any]:
        yield lambda *far: told.append((what, *far))

    monkeypatch.setattr(run_module, "bar", bar)
    file = plan(tmp_path, arms={"zipper": {}}, points={}, tasks=["asr"], seeds=[1])
    run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", Console(quiet=True))
    assert [told[0], told[-1]] == [("scoring asr", 0, 4), ("scoring asr", 4, 4)]


def test_arguments_are_looked_at_before_towers_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers refuses was refused after the towers had been pre-trained, which may take an hour."""
    file = plan(tmp_path, arms={"zipper": {}}, points={}, tasks=["asr"], seeds=[1])
    monkeypatch.setattr(run_module, "make_towers", None)
    experiment = read_experiment(file, ["training.arguments={lr_scheduler_type: sideways}"])
    with pytest.raises(ValueError, match="sideways"):
        run_experiment(experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True))


def test_scoring_that_was_cut_off_does_not_train_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = plan(tmp_path, arms={"zipper": {}}, points={}, tasks=["asr"], seeds=[1])
    console = Console(quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "score_task", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", console)
    here = run_module.made_with()
    monkeypatch.setattr(run_module, "fuse", None)
    monkeypatch.setattr(run_module, "made_with", lambda: {**here, "cores": 1000})
    (record,) = run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", console)
    assert record["scores"]["asr"]["utterances"] == 4
    assert record["made_with"] == here, "what a GPU had trained and a CPU scored was said to be made on a CPU"
    assert record["scored_with"]["cores"] == 1000


def test_a_record_of_other_data_says_so(tmp_path: Path) -> None:
    """Who ran a documented experiment with data elsewhere was told of "other settings", and not which."""
    experiment = read_experiment(plan(tmp_path, points={}, seeds=[1], arms={"single": {}}))
    (run,) = runs_of(experiment, "single", PLAIN)
    recorded = to_mapping(recipe_of(experiment, run, ""))
    del recorded["training"]["join"]  # as an older version wrote it
    record = {"run": asdict(run), "run_hash": run_hash(experiment, run), "recipe": recorded, "scores": {}}
    keep(tmp_path / "results", plan=to_mapping(experiment), record=record)
    (tmp_path / "link").symlink_to(workshop() / "data")
    moved = read_experiment(plan(tmp_path, points={}, seeds=[1], arms={"single": {}}), [f"data={tmp_path / 'link'}"])
    with pytest.raises(ValueError, match=rf"settings.*\(data.source: {workshop() / 'data'}, now .*link\)"):
        run_experiment(moved, tmp_path / "results", tmp_path / "work", Console(quiet=True))


def test_a_setting_of_a_zip_that_was_new_since_leaves_records_valid() -> None:
    """Zips are a list of mappings: a key that they learned made every record before it one of other settings."""
    recorded, now = {"zips": [{"layers": 4}]}, {"zips": [{"layers": 4, "scale": 1.0}]}
    assert still_holds(recorded, now)
    assert differences(recorded, now) == []
    for other in ([{"layers": 2, "scale": 1.0}], [], [{"layers": 4}, {"layers": 4}], [{"scale": 1.0}]):
        assert not still_holds(recorded, {"zips": other})
        assert differences(recorded, {"zips": other})


def test_records_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    """A record was taken for the run it is named like; with a changed recipe the page would have mixed two."""
    arms = {"single": {"set": ["architecture=single-decoder"]}}
    file = plan(tmp_path, arms=arms, points={}, seeds=[1], tasks=["asr"])
    console = Console(quiet=True)
    run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", console)
    changed = read_experiment(file, ["training.steps=2"])
    with pytest.raises(ValueError, match="made by other settings"):
        run_experiment(changed, tmp_path / "results", tmp_path / "work", console)
    # A default that meant something else when the record was made shows in no hash, but in the recipe.
    (made,) = read_records(tmp_path / "results")[1].values()
    made["recipe"]["training"]["clip"] = 0.5
    keep(tmp_path / "results", record=made)
    with pytest.raises(ValueError, match="made by other settings"):
        run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", console)
    del made["recipe"]["training"]["clip"]  # a setting that is new since then is no other setting
    keep(tmp_path / "results", record=made)
    assert run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", console) == [made]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["asr", "text->sound"]}, "task 'text->sound': unknown modality 'sound'"),
        ({"arms": {"a": {}, "b": {"set": ["training.join={text->text: 0.5}"]}}}, "training.join names"),
        ({"arms": {"a": {"before": ["scored=[asr]"]}}}, r"scored names \['asr'\]"),
        ({"arms": {"a": {"trials": {"x": ["generation.text.temprature=1"]}}}}, "temprature"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_run(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt task was found when the first model was trained, a setting that an arm cannot have when it was its
    turn."""
    monkeypatch.setattr(run_module, "fuse", None)
    with pytest.raises(ValueError, match=message):
        run_experiment(read_experiment(plan(tmp_path, **changes)), tmp_path / "results", tmp_path / "work")
    assert not list(tmp_path.glob("*results*"))


def test_test_rows_without_words_are_found_first(tmp_path: Path) -> None:
    """They ended every run at its scoring, hours later."""
    data = shutil.copytree(workshop() / "data", tmp_path / "data")
    table = data / "test" / "metadata.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    said = list(csv.DictReader(lines))[1]["transcription"]
    table.write_text("\n".join([*lines[:2], lines[2].replace(said, "..."), *lines[3:]]) + "\n", encoding="utf-8")
    experiment = read_experiment(plan(tmp_path), [f"data={data}"])
    with pytest.raises(ValueError, match=r"metadata\.csv.*its text has no words"):
        run_experiment(experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True))
    assert not (tmp_path / "work").exists()


def test_the_test_split_is_of_the_revision_that_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the newest one, whatever data.revision said."""
    asked: list[str | None] = []

    def rows(*_: Any, revision: str | None = None, **__: Any) -> Any:
        asked.append(revision)
        raise ValueError("far enough")

    monkeypatch.setattr(run_module, "read_rows", rows)
    with pytest.raises(ValueError, match="far enough"):
        run_experiment(read_experiment(plan(tmp_path), ["data.revision=v1"]), tmp_path / "results", tmp_path / "work")
    assert asked == ["v1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "at least one"),
        ({"seeds": []}, "distinct and at least one"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"seeds": [0, 1], "arms": {"a": {"trials": {"x": []}}}}, "trial_seed 0 is among seeds"),
        ({"points": {"a/b": []}}, "'a/b' is no name"),
        ({"arms": {"a": {"trials": {"lr/slow": []}}}}, "trials: 'lr/slow' is no name"),  # its record lay in a folder
        ({"arms": {"a": {"points": ["hlaf"]}}}, "arms.a.points: 'hlaf' is none of the points"),
    ],
)
def test_experiments_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Experiment, {"question": "q", "recipe": "r", "arms": {"a": {}}, **changes})


def test_a_mistyped_change_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "fuse", None)
    file = plan(tmp_path, arms={"a": {"set": ["training.stpes=1"]}})
    with pytest.raises(ValueError, match="did you mean"):
        run_experiment(read_experiment(file), tmp_path / "results", tmp_path / "work", Console(quiet=True))
    assert not list(tmp_path.glob("*results*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {"set": ["architecture=single-decoder"], "before": ["tsks={->text: 1}"]}}}, "did you mean"),
        ({"arms": {"a": {"trials": {"x": []}}}, "set": ["data.validation=null"]}, "nothing to choose by"),
        ({"arms": {"a": {}}, "set": ["data.source=nowhere"]}, "nowhere"),
    ],
)
def test_found_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "fuse", None)
    experiment = read_experiment(plan(tmp_path, **changes))
    with pytest.raises(ValueError, match=message):
        run_experiment(experiment, tmp_path / "results", tmp_path / "work", Console(quiet=True))


def test_experiments_in_the_repository_can_be_read() -> None:
    folder = Path(__file__).parent.parent.parent / "experiments"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        experiment = read_experiment(file, [f"data={workshop() / 'data'}"])
        for point in points_of(experiment):
            for arm, chosen in experiment.arms.items():
                for run in [r for t in chosen.trials or [""] for r in runs_of(experiment, arm, point, t)]:
                    recipe_of(experiment, run, "out")

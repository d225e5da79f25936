"""Records to lines and back: nothing is lost, and what is damaged is named."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipper_lm.experiments.packing import pack, unpack
from zipper_lm.experiments.records import keep, read_records, records_file

PLAN = {"question": "q", "recipe": "r", "arms": {"a": {}}, "tasks": ["asr"]}


def record(seed: int = 1, recipe: Any = None, hypotheses: tuple[str, ...] = ("one", "too")) -> dict[str, Any]:
    run = {"arm": "a", "point": "all", "trial": "", "seed": seed, "reported": True, "changes": [f"seed={seed}"]}
    score = {"wer": 50.0, "references": ["one", "two"], "hypotheses": list(hypotheses)}
    return {"run": run, "run_hash": "h", "recipe": recipe or {"seed": seed}, "scores": {"asr": score}}


def exact(plain: Any) -> str:
    """As text, in which 1, 1.0 and true differ."""
    return json.dumps(plain, sort_keys=True)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(0, 2)
    | st.sampled_from([0.0, 1.0, 0.5])
    | st.text("ab\u2028\n.", max_size=2)
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab.", max_size=2), inner, max_size=3),
    max_leaves=8,
)
recipes = st.dictionaries(st.text("abc.", max_size=2), trees, max_size=4)


@given(st.lists(recipes, max_size=4), st.data())
def test_taken_apart_again_nothing_is_missing(found: list[dict[str, Any]], data: Any) -> None:
    texts = st.lists(st.sampled_from(["", "one", "two", "null", "a\nb", "\u2028"]), min_size=3, max_size=3)
    records = []
    for seed, recipe in enumerate(found):
        scores = {
            task: {"wer": 1.0, "references": data.draw(texts), "hypotheses": data.draw(texts), "judge": "j"}
            for task in data.draw(st.sets(st.sampled_from(["asr", "tts"])))
        }
        records.append(record(seed) | {"recipe": recipe, "scores": scores, "new in a later version": recipe})
    before = copy.deepcopy(records)
    packed = pack(PLAN, records)
    plan, again = unpack(packed)
    assert exact([plan, again]) == exact([PLAN, records])
    assert exact(records) == exact(before), "what is packed is not changed"
    assert packed.count("\n") == 1 + len(records)
    assert pack(plan, again) == packed


def test_numbers_of_other_kinds_are_other_settings() -> None:
    """To Python 1, 1.0 and true are equal: what differs in nothing else would come back as the first run's."""
    records = [record(seed, {"value": value, "inside": {"value": value}}) for seed, value in enumerate((1, 1.0, True))]
    assert exact(unpack(pack(PLAN, records))[1]) == exact(records)


def test_lines_end_where_json_lines_do() -> None:
    """Another program may write a text as it is; some of its characters end a line to Python."""
    packed = pack(PLAN, [record(hypotheses=("one", "\u2028two\x85"))])
    raw = "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in packed.splitlines())
    assert unpack(raw) == unpack(packed)


def test_what_runs_share_stands_there_once() -> None:
    """300 texts and a recipe of a hundred settings stood in each of 448 files: half a million lines."""
    recipe = {"towers": {"text": {"train": "frozen", "lora": None}}, "seed": 1}
    changed = {"towers": {"text": {"train": "full"}}, "seed": 1, "judge": None}
    packed = pack(PLAN, [record(1, recipe), record(2, changed), record(3, recipe)])
    first, _, second, third = map(json.loads, packed.splitlines())
    assert (first["recipe"], first["references"]) == (recipe, [["one", "two"]])
    assert second["recipe"] == {
        "changed": {"towers": {"text": {"train": "full"}}, "judge": None},
        "removed": [["towers", "text", "lora"]],
    }
    assert third["recipe"] == {"changed": {}, "removed": []}
    assert third["scores"]["asr"] == {"wer": 50.0, "references": 0, "hypotheses": [None, "too"]}


def test_records_are_added_one_by_one(tmp_path: Path) -> None:
    for one in [record(2), record(1), record(3)]:
        keep(tmp_path / "x", plan=PLAN, record=one)
    plan, found = read_records(tmp_path / "x.jsonl")
    assert plan == PLAN
    assert list(found.items()) == [(f"a--all--seed{n}", record(n)) for n in (2, 1, 3)], "in the order they came"
    keep(tmp_path / "x", plan={**PLAN, "question": "?"})
    assert read_records(tmp_path / "x") == ({**PLAN, "question": "?"}, found)


def test_no_process_writes_over_what_another_one_has_added(tmp_path: Path) -> None:
    """Each reads the file, adds its record, and puts the whole file in its place."""
    keep(tmp_path / "x", plan=PLAN)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: keep(tmp_path / "x", record=record(seed)), range(24)))
    assert len(read_records(tmp_path / "x")[1]) == 24


def test_what_is_no_number_in_json_is_null(tmp_path: Path) -> None:
    made = record() | {"perplexity_after": {"text": math.inf}, "train_loss": math.nan, "steps": np.int64(3)}
    keep(tmp_path / "x", plan=PLAN, record=made)
    (kept,) = read_records(tmp_path / "x")[1].values()
    assert (kept["perplexity_after"], kept["train_loss"], kept["steps"]) == ({"text": None}, None, 3)


def test_a_folder_of_something_else_is_not_taken_for_records(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match=r"results is a folder; records are a file, such as .*results/NAME\.jsonl"):
        keep(tmp_path / "results", plan=PLAN)
    assert not list(tmp_path.glob("*.jsonl*"))


def test_records_of_an_earlier_version_are_taken_over(tmp_path: Path) -> None:
    """They were a folder with a file each."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps(PLAN))
    (folder / "a--all--seed1.json").write_text(json.dumps(record(1)))
    old = read_records(folder)
    assert old == (PLAN, {"a--all--seed1": record(1)})
    keep(folder, record=record(2))
    assert read_records(folder) == (PLAN, old[1] | {"a--all--seed2": record(2)})
    assert records_file(folder).is_file()
    (folder / "a--all--seed2.json").write_text('{"run": {')
    records_file(folder).unlink()
    with pytest.raises(ValueError, match=r"a--all--seed2\.json: no record of a run"):
        read_records(folder)


@pytest.mark.parametrize(
    "line",
    [
        '{"run": {',
        "{}",
        "[]",
        json.dumps(record() | {"recipe": {"changed": {}, "removed": [["nowhere"]]}}),
        json.dumps(record() | {"recipe": 1}),
        json.dumps(record() | {"recipe": {"changed": {}, "removed": []}, "scores": {"asr": {"references": 7}}}),
    ],
)
def test_a_damaged_record_is_named(line: str, tmp_path: Path) -> None:
    """Of many records one was cut off, and nobody was told which."""
    (tmp_path / "x.jsonl").write_text(pack(PLAN, [record()]) + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl: line 3: no record of a run"):
        read_records(tmp_path / "x")


def test_what_is_no_file_of_records_is_named(tmp_path: Path) -> None:
    for content in ("", "{}\n", "[]\n", "nothing"):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"x\.jsonl: line 1: "):
            read_records(tmp_path / "x")

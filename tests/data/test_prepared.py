"""Prepared data: what is learned from it is what the raw data gives, and what would be other ids is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import tiny_recipe, workshop

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import longest_stream
from zipper_lm.data.encoding import Joined, token_counts
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.data.prepared import PreparedRows, open_prepared
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.prepare import prepare
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import DataRecipe
from zipper_lm.jobs.rows import DataSource


def test_a_fusion_learns_the_same_from_it(prepared: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"fraction": 0.5, "exclude": {"speaker": ["odd"]}, "validation_limit": 2}
    raw = tiny_recipe(tmp_path / "raw", data={"source": str(workshop() / "data"), **changes})
    first = fuse(raw)
    second = fuse(tiny_recipe(tmp_path / "ids", data={"source": str(prepared), **changes}))
    kept = ("train_loss", "perplexity_before", "perplexity_after", "gates", "broken")
    assert {k: first[k] for k in kept} == {k: second[k] for k in kept}
    scores = [[e["eval_wer"] for e in record["history"] if "eval_wer" in e] for record in (first, second)]
    assert scores[0] == scores[1] != []


def test_another_codec_is_refused_by_name(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop() / "text", tmp_path / "text")
    TextCodec.train(["one two six"], vocab_size=18).save_pretrained(tmp_path / "text")
    towers = {"text": str(tmp_path / "text"), "speech": {"source": str(workshop() / "speech"), "train": "full"}}
    with pytest.raises(ValueError, match=r"prepared with another codec of 'text': a text codec with sha256 \w{12}"):
        fuse(tiny_recipe(tmp_path / "m", data=str(prepared), towers=towers))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"shard .*00001\.arrow is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), r"shard .*00001\.arrow has \d+ bytes, .* cut off"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9] + bytes(9)), r"00001\.arrow is not what was written"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(prepared: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(prepared, tmp_path / "ids")
    damage(tmp_path / "ids" / "train" / "00001.arrow")
    with pytest.raises(ValueError, match=message):
        fuse(tiny_recipe(tmp_path / "m", data=str(tmp_path / "ids")))


def test_what_a_recipe_cannot_have_of_prepared_data(prepared: Path, tmp_path: Path) -> None:
    def refused(message: str, data: dict[str, Any] | None = None, **changes: Any) -> None:
        recipe = tiny_recipe(tmp_path / "m", data={"source": str(prepared), **(data or {})}, **changes)
        with pytest.raises(ValueError, match=message):
            fuse(recipe)

    refused(r"data\.clips: .* has none, the recipe wants", data={"clips": {"source": "clips"}})
    towers = {n: str(workshop() / t) for n, t in {"text": "text", "speech": "speech", "image": "text"}.items()}
    refused(r"prepared with \['speech', 'text'\], without \['image'\]", towers=towers, tasks={"image->text": 1.0})
    refused("no rows left in split 'train'", data={"exclude": {"speaker": ["even", "odd"]}})
    made = {"text": {"source": str(tmp_path / "new"), "pretrain": {}}, "speech": str(workshop() / "speech")}
    refused("is pre-trained on the raw data", towers=made)
    with pytest.raises(ValueError, match="is prepared already"):
        prepare(tiny_recipe(tmp_path / "m", data=str(prepared)), tmp_path / "again")
    file = shutil.copytree(prepared, tmp_path / "old") / "prepared.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(ValueError, match="is of format 0, this version reads 1"):
        open_prepared(tmp_path / "old")


def test_settings_that_prepared_data_cannot_follow(prepared: Path, tmp_path: Path) -> None:
    """Another split, column or revision had no effect on prepared data, and of 3 prepared rows a limit of 10 gave 3."""
    raw = str(workshop() / "data")
    for changes in ({"train": "nonsense"}, {"validation": "test"}, {"revision": "v2"}, {"columns": {"text": "no"}}):
        (name,) = changes
        with pytest.raises(ValueError, match=rf"data\.{name} is .*, but .* was prepared with"):
            DataSource(DataRecipe(source=str(prepared), **changes)).validation_rows()
    assert DataSource(DataRecipe(source=str(prepared), validation=None)).validation_rows() == []
    data = {"source": raw, "validation": None, "limit": 3, "exclude": {"speaker": ["odd"]}}
    prepare(tiny_recipe(tmp_path / "m", data=data), tmp_path / "ids")
    same = DataRecipe(**{**data, "source": str(tmp_path / "ids")})
    assert len(DataSource(same).training_rows()) == 3
    for limit in (10, None):
        with pytest.raises(ValueError, match=rf"data\.limit is {limit}, but .* was prepared with 3"):
            DataSource(replace(same, limit=limit)).training_rows()
    with pytest.raises(ValueError, match=r"data\.exclude is \{\}, but .* was prepared with \{'speaker': \['odd'\]\}"):
        DataSource(replace(same, exclude={})).training_rows()


def test_the_first_rows_are_the_same_of_raw_and_prepared_data(tmp_path: Path) -> None:
    """Raw data was limited first, prepared data excluded first: one recipe, two training sets."""
    data = DataRecipe(source=str(workshop() / "data"), validation=None, exclude={"speaker": ["odd"]})
    prepare(tiny_recipe(tmp_path / "m", data=to_mapping(data)), tmp_path / "ids")
    raw, ids = (
        DataSource(replace(data, source=s, limit=4)).training_rows() for s in (data.source, str(tmp_path / "ids"))
    )
    assert len(raw) == len(ids) == 4
    assert {row["speaker"] for row in raw} == {"even"}


def test_what_is_excluded_from_prepared_data(prepared: Path, tmp_path: Path) -> None:
    """A text could be excluded by its column's name from raw data, but not from prepared data; a column that was not
    kept, or is misspelt, excluded nothing without a word."""
    raw, ids = (DataRecipe(source=source) for source in (str(workshop() / "data"), str(prepared)))
    said = DataSource(raw).training_rows()[0]["text"]
    for name in ("transcription", "text"):
        kept = [len(DataSource(replace(data, exclude={name: [said]})).training_rows()) for data in (raw, ids)]
        assert kept[0] == kept[1] < 12
    for name in ("speeker", "audio"):
        with pytest.raises(
            ValueError, match=rf"no column \['{name}'\]; there are .*'speaker', 'text', 'transcription'"
        ):
            DataSource(replace(ids, exclude={name: ["x"]})).training_rows()
    sound = {"audio": [DataSource(raw).training_rows()[0]["speech"]]}
    data = {"source": raw.source, "validation": None, "exclude": sound}
    prepare(tiny_recipe(tmp_path / "m", data=data), tmp_path / "ids")
    assert (
        len(DataSource(DataRecipe(source=str(tmp_path / "ids"), exclude=sound)).training_rows()) == 11
    )  # it is done already


def test_lengths_are_stored(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To group documents by length all ids were read: minutes for a million rows, in every process."""
    file = tmp_path / "data.jsonl"
    told = [[("text", "one two"), ("speech", [9] * n), ("text", "six")] for n in range(7)]
    lines = [
        {"segments": [{"modality": m, "ids" if m == "speech" else "value": v, "target": True} for m, v in d]}
        for d in told
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(tiny_recipe(tmp_path / "m", data={"source": str(file), "validation": None}), tmp_path / "ids", shard_rows=3)
    for folder in (prepared, tmp_path / "ids"):
        rows = open_prepared(folder).rows("train").select([5, 1, 2, 6])
        mixture = TaskMixture(Joined(rows, rows[1:3]), {"speech->text": 1, "->text": 1})
        expected = [longest_stream(document) for document in mixture]
        with monkeypatch.context() as patch:
            patch.setattr(PreparedRows, "__getitem__", lambda *_: pytest.fail("ids were read"))
            assert mixture.lengths().tolist() == expected
        assert list(token_counts(rows)) == list(token_counts(list(rows)))

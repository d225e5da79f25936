"""Sequences of symbols through all that text goes through: a recipe, training, scores without a judge, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from zipper_lm import Document, ZipperModel
from zipper_lm.cli import app
from zipper_lm.data.document import Segment
from zipper_lm.evaluation.scoring import scorable, score_task
from zipper_lm.experiments.corpora.genes import translate
from zipper_lm.experiments.corpora.writing import write_rows
from zipper_lm.jobs.validation import Scorer

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GENES = ["ATGTGGTAA", "ATGGCCAAATGA", "ATGAAATAG", "ATGTGGAAATAA"]


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DNA as strings, proteins as lists of names of several letters, and a reading in numbers; no text anywhere."""
    folder = tmp_path_factory.mktemp("sequences")
    names = {"M": "Met", "W": "Trp", "A": "Ala", "K": "Lys"}
    rows = [
        {"dna": dna, "protein": [names[r] for r in translate(dna)], "reading": [len(dna) / 10, 0.5]} for dna in GENES
    ]
    write_rows(folder / "data", {"train": rows * 3, "validation": rows, "test": rows})
    codecs = {
        "dna": {"kind": "sequence", "options": {"alphabet": "ACGT"}},
        "protein": {"kind": "sequence"},
        "reading": {"kind": "sequence", "options": {"bins": 2}},
    }
    recipe = {
        "towers": {
            name: {
                "source": str(folder / name),
                "train": "full",
                "pretrain": {
                    "codec": codec,
                    "backbone": {"model_type": "llama", **SHAPE},
                    "training": {"steps": 1, "batch_size": 2},
                },
            }
            for name, codec in codecs.items()
        },
        "zips": [{"layers": 1}],
        "data": str(folder / "data"),
        "tasks": {"dna->protein": 1, "protein->dna": 1, "dna->reading": 1},
        "training": {"steps": 2, "batch_size": 4},
        "generation": {name: {"max_new_tokens": 4} for name in codecs},
        "output": str(folder / "model"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run("fuse", folder / "recipe.yaml")
    return folder


def test_a_recipe_without_text_is_scored_on_every_task(fused: Path) -> None:
    record = json.loads((fused / "model" / "run.json").read_text())
    (scored,) = [entry for entry in record["history"] if "eval_wer" in entry]
    rates = [scored[f"eval_wer/{task}"] for task in ("dna->protein", "protein->dna", "dna->reading")]
    assert scored["eval_wer"] == pytest.approx(sum(rates) / 3)
    model = ZipperModel.from_pretrained(fused / "model")
    assert {(z.reader, z.source): z.stretch for z in model.config.zip_specs}["dna", "protein"] == pytest.approx(
        (9 + 12 + 9 + 12 + 4) / (2 + 3 + 2 + 3 + 4), abs=1e-4
    ), "three bases a residue, and BOS"


def test_an_empty_sequence_is_not_scored(fused: Path) -> None:
    """Rows without words were left out of scores, rows without a symbol ended the run."""
    model = ZipperModel.from_pretrained(fused / "model")
    rows = [{"protein": "Met", "dna": dna} for dna in ("ATG", "", Segment("dna", ids=[]))]
    codec = model.processor.codecs["dna"]  # type: ignore[union-attr]
    assert scorable(rows, "dna", codec) == rows[:1]
    coded = [{**row, "reading": [1.0, 0.5]} for row in rows]
    score = Scorer(model, coded, ["protein->dna"], settings={}, batch_size=1)
    assert (len(score.rows), score.wordless) == (1, 2)


def test_errors_are_counted_in_tokens(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two wrong symbols and a missing one of twelve, though as text each answer would be one word."""
    model = ZipperModel.from_pretrained(fused / "model")
    codec = model.processor.codecs["dna"]  # type: ignore[union-attr]
    answers = {"M W": "ATGTGGTAA", "M K": "ATGAAC"}  # right; then the last codon missing, and one base wrong

    def generate(documents: list[Document], *_: object, **__: object) -> list[Document]:
        ids = [codec.encode([answers[d[0].value]])[0] for d in documents]
        return [Document([*d, Segment("dna", codec.decode([i])[0], ids=i)]) for d, i in zip(documents, ids)]

    monkeypatch.setattr(model, "generate", generate)
    rows = [
        {"protein": "M W", "dna": "ATGTGGTAA"},
        {"protein": "M K", "dna": Segment("dna", ids=codec.encode(["ATGAAATAG"])[0])},  # as rows in training are
    ]
    score = score_task(model, rows, "protein->dna")
    assert (score.wer, score.cer) == (pytest.approx(100 * 4 / 18), pytest.approx(100 * 4 / 18))
    assert score.exact == 50
    assert score.values == ["ATGTGGTAA", "ATGAAC"]
    with pytest.raises(ValueError, match=r"row 0 has no \['protein'\]"):
        score_task(model, [{"dna": "ATG"}], "dna->protein")


def test_evaluate_needs_no_judge_and_takes_none(fused: Path, tmp_path: Path) -> None:
    words = ("evaluate", fused / "model", fused / "data", "--task", "dna->protein")
    assert json.loads(run(*words, "--json"))["utterances"] == 4
    for option in (("--output", tmp_path / "out"), ("--judge", tmp_path)):
        result = CliRunner().invoke(app, [str(w) for w in (*words, *option)])
        assert result.exit_code == 2
        assert "writes protein only, nothing to be judged" in " ".join(result.stderr.split())


def test_generate_reads_and_writes_sequences(fused: Path) -> None:
    assert set(run("generate", fused / "model", "--input", "protein:Met Trp", "--output", "dna").split()[0]) <= {
        *"ACGT"
    }
    written = run("generate", fused / "model", "--input", "dna:ATGTGGTAA", "--output", "reading", "--json")
    assert all(isinstance(x, float) for x in json.loads(written)["document"][-1]["value"])
    result = CliRunner().invoke(app, ["generate", str(fused / "model"), "--input", "dna:ATGN", "--output", "protein"])
    assert result.exit_code == 2
    assert "the alphabet lacks ['N']" in " ".join(result.stderr.split())

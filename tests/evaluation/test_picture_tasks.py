"""Pictures through all that sound goes through: a recipe, training, a judge, scores, and the commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from zipper_lm.cli import app
from zipper_lm.evaluation.classifier import PictureClassifier
from zipper_lm.experiments.corpora.writing import write_corpus

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def shapes(count: int) -> list[tuple[Image.Image, dict[str, str]]]:
    """Dark and light squares, with their names."""
    found = []
    for number in range(count):
        light = number % 2 == 0
        grey = np.full((4, 4), 230 if light else 20, np.uint8) - np.uint8(number % 5)
        found.append((Image.fromarray(grey), {"text": "light" if light else "dark"}))
    return found


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZIPPER_CACHE", str(folder / "cache"))
        splits = {"train": shapes(12), "validation": shapes(4), "test": shapes(4), "judge": shapes(8)}
        write_corpus(folder / "data", splits, "image", ".png", lambda path, picture: picture.save(path))
        recipe = {
            "towers": {
                name: {
                    "source": str(folder / name),
                    "train": train,
                    "pretrain": {
                        "codec": {"kind": kind, "options": options},
                        "backbone": {"model_type": "llama", **SHAPE},
                        "training": {"steps": 1, "batch_size": 2},
                    },
                }
                for name, train, kind, options in (
                    ("text", "frozen", "text", {"vocab_size": 32}),
                    ("image", "full", "pixels", {"height": 4, "width": 4, "levels": 4}),
                )
            },
            "zips": [{"layers": 1}],
            "data": str(folder / "data"),
            "tasks": {"image->text": 1, "text->image": 1},
            "training": {"steps": 2, "batch_size": 4},
            "generation": {"text": {"max_new_tokens": 3}, "image": {"max_new_tokens": 17, "min_new_tokens": 16}},
            "output": str(folder / "model"),
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        run("fuse", folder / "recipe.yaml")
    return folder


def test_a_recipe_with_pictures_is_scored_both_ways(fused: Path) -> None:
    record = json.loads((fused / "model" / "run.json").read_text())
    (scored,) = [entry for entry in record["history"] if "eval_wer" in entry]
    assert {"eval_wer/image->text", "eval_wer/text->image"} <= set(scored)
    (judge,) = (fused / "cache" / "judges").iterdir()
    assert len(PictureClassifier.from_pretrained(judge).pictures) == 8, "of the judge's own split"


def test_evaluate_writes_the_pictures_and_what_they_show(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPPER_CACHE", str(fused / "cache"))
    out = fused / "said"
    words = ("evaluate", fused / "model", fused / "data", "--task", "text->image", "--output", out, "--json")
    result = json.loads(run(*words))
    assert result["oracle_wer"] == result["judge_wer_on_originals"] == 0
    rows = list(csv.DictReader((out / "metadata.csv").open()))
    assert len(rows) == 4
    assert {row["heard"] for row in rows} <= {"light", "dark"}
    right = np.mean([row["heard"] == row["transcription"] for row in rows])
    assert result["exact"] == pytest.approx(100 * right)
    assert Image.open(out / rows[0]["file_name"]).size == (4, 4)
    assert json.loads(run("evaluate", fused / "model", fused / "data", "--task", "image->text", "--json"))["cer"] >= 0


def test_generate_writes_a_picture_and_reads_one(fused: Path) -> None:
    file = fused / "one.png"
    run("generate", fused / "model", "--input", "text:light", "--output", f"image:{file}", "--overwrite")
    assert Image.open(file).size == (4, 4)
    run("generate", fused / "model", "--input", f"image:{file}", "--output", "text")
    result = CliRunner().invoke(
        app, ["generate", str(fused / "model"), "--input", "text:light", "--output", f"image:{fused / 'one.wav'}"]
    )
    assert result.exit_code == 2
    assert "a picture needs a file ending in .png, got '.wav'" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["generate", str(fused / "model"), "--input", "image:no.png", "--output", "text"])
    assert result.exit_code == 2
    assert "no file 'no.png'" in " ".join(result.stderr.split())

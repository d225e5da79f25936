"""Results beside a model: one entry for each thing that was asked, none lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zipper_lm.models.records import add_result, read_results, weights_digest

ASKED = {"weights": "w", "data": "org/digits", "split": "test", "template": "speech->text"}


def test_the_same_question_has_one_answer(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    others = [{"weights": "v"}, {"data": "other"}, {"split": "dev"}, {"template": "text->speech"}]
    others += [{"limit": 3}, {"where": ["speaker=theo"]}, {"set": ["text.num_beams=4"]}, {"seed": 1}, {"judge": "j"}]
    for change in [{}, *others]:
        add_result(tmp_path, {**ASKED, **change, "wer": 1.0})
    add_result(tmp_path, {**ASKED, "wer": 2.0})
    found = read_results(tmp_path)
    assert len(found) == 1 + len(others)
    assert [entry["wer"] for entry in found] == [1.0] * len(others) + [2.0]


@pytest.mark.parametrize("content", ["{", '{"wer": 1}', '["wer"]'])
def test_what_is_no_list_of_results_is_not_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        add_result(tmp_path, ASKED)
    assert (tmp_path / "results.json").read_text() == content


def test_a_failed_write_loses_nothing(tmp_path: Path) -> None:
    add_result(tmp_path, {**ASKED, "wer": 1.0})
    with pytest.raises(TypeError):
        add_result(tmp_path, {**ASKED, "wer": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text())[0]["wer"] == 1.0


def test_the_digest_is_of_the_weights(tmp_path: Path) -> None:
    digests = set()
    for content in (b"a", b"b"):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 2

"""The pages say what the raw records under docs/runs say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from zipper_lm.experiments.report import write_report

ROOT = Path(__file__).parent.parent
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
    folders = [ROOT / "results" / name for name in ("main-cpu", "digit-images", "window")]
    write_report(folders, tmp_path / "results.md")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    command = "zipper report " + " ".join(f"results/{f.name}" for f in folders) + " --output docs/results.md"
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == page, f"run: {command}"
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in (ROOT / "docs").glob("results-*.png")}

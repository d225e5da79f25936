"""Each causal-LM family of the installed transformers as a tower, bit for bit; see docs/towers.md for the outcome."""

from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tower_families import KNOWN, captured, examine, families, may_fail

DOCS = Path(__file__).parents[2] / "docs" / "towers.md"


def _documented() -> dict[str, str]:
    """Each family's line of the table."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(" `"): line for line in lines if line.startswith("| `")}


@pytest.mark.parametrize("family", families())
def test_family_is_a_tower_bit_for_bit_or_fails_as_known(family: str) -> None:
    outcome = examine(family)
    known = KNOWN.get(family)
    if not outcome.passed and (older := may_fail(family)) is not None:
        assert older.explains(outcome.reason), outcome.reason
    elif known is None:
        assert outcome.passed, outcome.reason
    else:
        assert not outcome.passed, f"{family} passes now: take it out of KNOWN"
        assert known.explains(outcome.reason), outcome.reason


def test_at_least_120_families_pass() -> None:
    # The test above holds each family to what is counted here.
    assert len([f for f in families() if f not in KNOWN and may_fail(f) is None]) >= 120


def test_known_failures_are_of_families_that_exist_or_are_gone() -> None:
    """A typing mistake in a name would hide nothing, but would mislead."""
    known = set(KNOWN) - set(families())
    assert not known or Version(transformers.__version__) != Version(_documented_version())


def test_documentation_is_of_this_run() -> None:
    """The table lists what `examine` says; it is made anew by `python tools/tower_parity.py`."""
    if _documented_version() != transformers.__version__:
        pytest.skip(f"docs/towers.md was made with transformers {_documented_version()}")
    rows = _documented()
    assert set(rows) == set(families())
    assert {f for f, row in rows.items() if row.split("|")[3].startswith(" no:")} == set(KNOWN)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(_documented()))
def test_family_is_captured_as_documented(family: str) -> None:
    if _documented_version() != transformers.__version__:
        pytest.skip(f"docs/towers.md was made with transformers {_documented_version()}")
    if column := _documented()[family].split("|")[5].strip():
        assert (captured(family).fault is None) == (column == "yes"), column


def test_at_least_100_families_are_captured() -> None:
    columns = [line.split("|")[5].strip() for line in _documented().values()]
    assert f"**{columns.count('yes')} families**" in DOCS.read_text()
    assert columns.count("yes") >= 100


def _documented_version() -> str:
    return DOCS.read_text().partition("transformers ")[2].split()[0].rstrip(".,:;")

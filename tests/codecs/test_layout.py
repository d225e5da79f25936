"""Where units lie among a tower's ids."""

from __future__ import annotations

import pytest

from zipper_lm.codecs.layout import IdLayout


def test_special_ids_follow_the_units_by_default() -> None:
    layout = IdLayout(units=500)
    assert layout.specials == (500, 501, 502)
    assert layout.vocab_size == 503


def test_a_checkpoints_own_ids_are_settings() -> None:
    """Units from 2 on, padding at 0, one id for BOS and EOS."""
    layout = IdLayout(units=500, offset=2, bos=1, eos=1, pad=0)
    assert layout.vocab_size == 502
    ids = layout.to_ids([0, 499])
    assert ids == [2, 501]
    assert layout.to_units(ids, "speech ids") == [0, 499]


def test_ids_not_given_are_new_ones() -> None:
    layout = IdLayout(units=10, eos=20)
    assert layout.specials == (21, 20, 22)


@pytest.mark.parametrize(
    "wrong", [{"units": 0}, {"units": 5, "offset": -1}, {"units": 5, "eos": 4}, {"units": 5, "pad": -1}]
)
def test_ids_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="layout"):
        IdLayout(**wrong)


@pytest.mark.parametrize("wrong", [1, 12, -1])
def test_an_id_that_is_no_units_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"speech ids: id .* 2 to 11"):
        IdLayout(units=10, offset=2, bos=1, eos=1, pad=0).to_units([2, wrong], "speech ids")


@pytest.mark.parametrize(
    ("field", "value"), [("units", "a"), ("offset", 1.5), ("bos", True), ("eos", [1]), ("pad", -1)]
)
def test_ids_are_whole_numbers(field, value):
    with pytest.raises(ValueError, match=f"layout: {field} must be"):
        IdLayout(**{"units": 4, field: value})


@pytest.mark.parametrize("field", ["units", "offset", "eos"])
def test_ids_are_bounded(field):
    """A codec.json with an id of 10^12 made a vocabulary of that size."""
    with pytest.raises(ValueError, match=f"layout: {field} must be at most"):
        IdLayout(**{"units": 4, field: 10**12})

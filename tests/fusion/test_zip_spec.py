from itertools import permutations

import pytest

from zipper_lm import ZipSpec
from zipper_lm.fusion.zip_spec import EMBEDDINGS, evenly_spaced, expand

DEPTHS = {"text": 4, "speech": 6}


def test_evenly_spaced_ends_at_the_last_layer() -> None:
    assert evenly_spaced(4, 12) == [2, 5, 8, 11]
    assert evenly_spaced(1, 5) == [4]
    assert evenly_spaced(6, 6) == list(range(6))


def test_the_default_is_all_pairs() -> None:
    zips = expand([ZipSpec()], {**DEPTHS, "image": 3})
    assert {(z.reader, z.source) for z in zips} == {
        (a, b) for a in ("text", "speech", "image") for b in ("text", "speech", "image") if a != b
    }
    by_pair = {(z.reader, z.source): z for z in zips}
    assert by_pair["text", "speech"].layers == [0, 1, 2, 3]
    assert by_pair["text", "speech"].source_layers == evenly_spaced(4, 6)
    assert by_pair["speech", "image"].source_layers == [0, 1, 2]  # as many as the shallower one has


def test_a_later_spec_replaces_an_earlier_one() -> None:
    zips = expand([ZipSpec(layers=2), ZipSpec(reader="text", layers=[1, 3], source_layers=[0, 5])], DEPTHS)
    assert [(z.reader, z.layers, z.source_layers) for z in zips] == [
        ("text", [1, 3], [0, 5]),
        ("speech", [2, 5], [1, 3]),
    ]


def test_embeddings_in_the_place_of_layers() -> None:
    """However shallow the source is, there are as many layers as the reader has or were asked for."""
    zips = expand([ZipSpec(layers=5, source_layers="embeddings")], DEPTHS)
    assert [(z.reader, z.source, len(z.pairs)) for z in zips] == [
        (reader, source, min(5, DEPTHS[reader])) for reader, source in permutations(DEPTHS, 2)
    ]
    assert {m for z in zips for _, m in z.pairs} == {EMBEDDINGS}
    (mixed, *_) = expand([ZipSpec(reader="text", source="speech", layers=2, source_layers=[-1, 3])], DEPTHS)
    assert mixed.pairs == [(1, -1), (3, 3)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layers": [1, 4], "reader": "text"}, r"zip text<-speech: layers \[4\] out of range.*0 to 3"),
        ({"layers": [1, -1], "reader": "text"}, r"layers \[-1\] out of range"),
        ({"layers": [1], "source_layers": [6], "reader": "text"}, r"source_layers \[6\] out of range.*0 to 5"),
        ({"layers": [2, 1], "reader": "text"}, "rising order"),
        ({"layers": [1, 1], "reader": "text"}, "without repeats"),
        ({"layers": [1, 2], "source_layers": [3], "reader": "text"}, "2 layers but 1 source_layers"),
        ({"layers": [1], "source_layers": [-2], "reader": "text"}, r"source_layers \[-2\] out of range"),
        ({"layers": [-1], "reader": "text"}, r"layers \[-1\] out of range"),
        ({"layers": [0, 1, 2, 3, 4], "reader": "speech"}, "tower 'text' has only 4; name source_layers"),
        ({"layers": [], "reader": "text"}, "0 layers"),
        ({"reader": "smell"}, "zip.reader names tower 'smell'"),
        ({"reader": "text", "source": "text"}, "cannot read itself"),
    ],
)
def test_zips_that_do_not_fit(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand([ZipSpec(**spec)], DEPTHS)


def test_crossed_zips_are_refused() -> None:
    crossed = [
        ZipSpec(reader="text", source="speech", layers=[0], source_layers=[3]),
        ZipSpec(reader="speech", source="text", layers=[1], source_layers=[2]),
    ]
    with pytest.raises(ValueError, match="wait for each other for ever"):
        expand(crossed, DEPTHS)
    expand(crossed[:1], DEPTHS)


@pytest.mark.parametrize(
    "field",
    [
        {"layers": 0},
        {"heads": 0},
        {"dropout": 1.0},
        {"positions": "left"},
        {"projection": "cubic"},
        *({"context": wrong} for wrong in (-1, 65, 1.5, True, "wide", None)),
        *(
            {"scale": wrong}
            for wrong in (0, -1.0, "rms", [], [2.0, 0.0], ["2"], float("nan"), float("inf"), True, None)
        ),
    ],
    ids=str,
)
def test_impossible_zip_settings(field: dict) -> None:
    with pytest.raises(ValueError, match=f"zip.{next(iter(field))}"):
        ZipSpec(**field)

"""The sequence codec: every symbol has its token, series come back as bin centres, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zipper_lm.codecs.codec import Codec, load_codec, make_codec
from zipper_lm.codecs.layout import IdLayout
from zipper_lm.codecs.sequence import SequenceCodec, SequenceCodecConfig


def test_protocol_and_special_ids() -> None:
    codec = make_codec("sequence", alphabet="ACGT")
    assert isinstance(codec, Codec)
    assert (codec.bos_id, codec.eos_id, codec.pad_id, codec.vocab_size, codec.rate) == (4, 5, 6, 7, None)


def test_strings_and_lists_of_symbols_are_the_same() -> None:
    codec = make_codec("sequence", alphabet="ACGT")
    assert codec.encode(["GATTACA", list("GAT"), ()]) == [[2, 0, 3, 3, 0, 1, 0], [2, 0, 3], []]
    assert codec.decode([[2, 0, 3], []]) == ["GAT", ""]


def test_symbols_of_several_characters_are_joined_by_the_separator() -> None:
    codec = make_codec("sequence", alphabet=["note-on 60", "wait", "note-off 60"], separator=";")
    value = ["note-on 60", "wait", "note-off 60"]
    assert codec.encode([value, "note-on 60;wait;note-off 60"]) == [[0, 1, 2]] * 2
    assert codec.decode([[0, 1]]) == ["note-on 60;wait"]
    assert make_codec("sequence", alphabet=["C4", "E4"]).decode([[0, 1]]) == ["C4 E4"]


def test_an_alphabet_learned_from_the_values_is_sorted() -> None:
    assert make_codec("sequence", ["TAC", ["G"]]).config.alphabet == ("A", "C", "G", "T")  # type: ignore[attr-defined]
    words = make_codec("sequence", ["e4 e5", "Nf3"], separator=" ")
    assert words.decode(words.encode(["e5 Nf3"])) == ["e5 Nf3"]


def test_an_alphabet_with_white_space_is_learned_only_if_told() -> None:
    """Strings of several-character symbols, "C4 E4", made an alphabet of their single characters, the space included,
    without a word."""
    with pytest.raises(ValueError, match='hold white space; give separator: " " if it stands between symbols'):
        make_codec("sequence", ["C4 E4"])
    with pytest.raises(ValueError, match="hold white space"):
        make_codec("sequence", [["note on", "wait"]])
    assert make_codec("sequence", ["C4 E4"], separator=" ").encode(["E4 C4"]) == [[1, 0]]
    assert make_codec("sequence", ["a b"], separator="").encode(["b a"]) == [[2, 0, 1]]


def test_the_layout_is_the_towers() -> None:
    codec = make_codec("sequence", alphabet="LAGV", offset=4, bos=0, pad=1, eos=2)
    assert codec.encode(["LV"]) == [[4, 7]]
    assert (codec.bos_id, codec.eos_id, codec.pad_id, codec.vocab_size) == (0, 2, 1, 8)
    with pytest.raises(ValueError, match="row 0: id 2 is no unit's: those are 4 to 7"):
        codec.decode([[2]])


def test_even_bins_need_no_data_and_give_their_centres() -> None:
    codec = make_codec("sequence", bins=4, low=0.0, high=8.0, spacing="even")
    assert codec.encode([[0.0, 1.9, 2.0, 7.9, 8.0], np.array([-5.0, 99.0]), "0.5 6"]) == [
        [0, 0, 1, 3, 3],
        [0, 3],
        [0, 3],
    ]
    assert codec.decode([[0, 3], []]) == [[1.0, 7.0], []]


def test_bins_by_quantiles_hold_equally_many() -> None:
    numbers = np.random.default_rng(0).standard_normal(1000) ** 3
    codec = make_codec("sequence", [numbers[:400].tolist(), numbers[400:]], bins=8)
    (ids,) = codec.encode([numbers])
    assert np.bincount(ids, minlength=8).tolist() == [125] * 8
    ties = make_codec("sequence", [[0.0] * 90 + [1.0] * 10], bins=10)
    assert ties.encode([[0.0, 1.0]])[0][0] < ties.encode([[0.0, 1.0]])[0][1]
    inside = make_codec("sequence", [[-100.0, *range(10), 100.0]], bins=3, low=0.0, high=9.0)
    assert np.bincount(inside.encode([[-100.0, *range(10), 100.0]])[0]).tolist() == [4] * 3
    assert inside.config.edges[:1] + inside.config.edges[-1:] == (0.0, 9.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ([], {}, "no values to learn an alphabet from"),
        ([], {"alphabet": "ACA"}, "different strings, got 'A'"),
        ([], {"alphabet": [1, 2]}, r"got 1 \(quote numbers\)"),
        ([], {"alphabet": ["C 4", "D"]}, "'C 4' holds the separator ' '"),
        ([], {"alphabet": ["C4"], "separator": ""}, "several characters"),
        ([], {"alphabet": "ACGT", "bos": 2}, "bos=2 must lie outside of the units"),
        ([], {"alphabet": "ACGT", "depth": 2}, "depth"),
        ([], {"alphabet": "ACGT", "bins": 4}, "alphabet and separator are for symbols"),
        ([], {"alphabet": "ACGT", "low": 0.0}, "no effect without bins"),
        ([], {"bins": 4}, "no values to fit bins on"),
        ([], {"bins": 0}, "bins must be a whole number of at least 1, got 0"),
        ([], {"bins": 4, "spacing": "odd"}, "spacing must be one of"),
        ([], {"bins": 4, "low": 2.0, "high": 1.0, "spacing": "even"}, "low < high, got 2.0 and 1.0"),
        ([[3.0, 3.0]], {"bins": 4}, "low < high, got 3.0 and 3.0"),
        ([[1.0, float("nan")]], {"bins": 4}, "sequence 0: expected one dimension of finite numbers"),
        ([["a", "b"]], {"bins": 4}, "sequence 0: expected numbers"),
        ([3], {}, "sequence 0: expected a string or a list of symbols, got int 3"),
        ([], {"source": "none/such", "alphabet": "ACGT"}, "'none/such' holds no codec"),
    ],
)
def test_what_cannot_be_a_codec_is_refused(values: list[Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_codec("sequence", values, **options)


def test_symbols_that_the_alphabet_lacks_are_named() -> None:
    codec = make_codec("sequence", alphabet="ACGT")
    with pytest.raises(ValueError, match=r"sequence 1: the alphabet lacks \['N', 'a'\]"):
        codec.encode(["ACGT", "NaN"])
    with pytest.raises(ValueError, match="sequence 0: expected a string or a list of symbols, got bytes"):
        codec.encode([b"ACGT"])


@pytest.mark.parametrize(
    "options",
    [{"alphabet": ["C4", "é"], "offset": 2, "bos": 0, "eos": 0, "pad": 1}, {"bins": 3, "low": 0.1, "high": 0.4}],
)
def test_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    codec = make_codec("sequence", [[0.1, 0.3, 1 / 3]], **options)
    codec.save_pretrained(tmp_path)
    again = load_codec(tmp_path)
    assert isinstance(again, SequenceCodec)
    assert isinstance(codec, SequenceCodec)
    assert (again.config, again.layout) == (codec.config, codec.layout)


def test_a_file_that_says_no_codec_is_refused(tmp_path: Path) -> None:
    SequenceCodec(SequenceCodecConfig(alphabet=("A",))).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "codec.json").read_text())
    for broken, says in (
        ({"layout": None}, "says no sequence codec"),
        ({"alphabet": []}, "an alphabet or bins"),
        ({"alphabet": [], "edges": [1.0, 0.0]}, "rising"),
        ({"letters": 3}, "letters"),
    ):
        (tmp_path / "codec.json").write_text(json.dumps({**said, **broken}))
        with pytest.raises(ValueError, match=says):
            load_codec(tmp_path)
    with pytest.raises(ValueError, match="1 symbols or bins, but the layout has 2"):
        SequenceCodec(SequenceCodecConfig(alphabet=("A",)), IdLayout(units=2))

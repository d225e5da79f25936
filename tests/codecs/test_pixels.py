"""The pixel codec: lossless in its own size and levels; everything else is brought to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zipper_lm.codecs.codec import Codec, load_codec, make_codec
from zipper_lm.codecs.pixels import PixelCodec, PixelCodecConfig


def test_protocol_and_special_ids() -> None:
    codec = PixelCodec(PixelCodecConfig(height=2, width=3, levels=4))
    assert isinstance(codec, Codec)
    assert (codec.bos_id, codec.eos_id, codec.pad_id, codec.vocab_size, codec.rate) == (4, 5, 6, 7, None)


@pytest.mark.parametrize("levels", [2, 16, 255, 256])
def test_ids_survive_a_round_trip(levels: int) -> None:
    codec = PixelCodec(PixelCodecConfig(height=5, width=7, levels=levels))
    ids = np.random.default_rng(0).integers(levels, size=(3, 35)).tolist()
    assert codec.encode(codec.decode(ids)) == ids


def test_rows_from_the_top_left() -> None:
    codec = PixelCodec(PixelCodecConfig(height=2, width=2, levels=2))
    assert codec.encode([np.array([[255, 0], [0, 0]], np.uint8)]) == [[1, 0, 0, 0]]


def test_other_sizes_and_modes_are_brought_to_its_own() -> None:
    codec = PixelCodec(PixelCodecConfig(height=2, width=2, levels=3))
    large = np.zeros((8, 8, 3), np.uint8)
    large[:4, :4] = 255
    (row,) = codec.encode([large])
    assert row == [2, 0, 0, 0]
    assert codec.encode([Image.fromarray(large).convert("CMYK")]) == [row]
    assert len(codec.encode([np.zeros((1, 9), np.uint8)])[0]) == 4


def test_a_row_too_short_is_black_below_and_one_too_long_is_cut() -> None:
    codec = PixelCodec(PixelCodecConfig(height=2, width=2, levels=2))
    short, long, empty = codec.decode([[1], [1, 1, 1, 1, 0], []])
    assert np.asarray(short).tolist() == [[255, 0], [0, 0]]
    assert np.asarray(long).min() == 255
    assert np.asarray(empty).max() == 0


@pytest.mark.parametrize("bad", [[16], [-1], [0, 18]])
def test_ids_that_are_no_levels_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"row 1: an id is not in \[0, 16\)"):
        PixelCodec().decode([[0], bad])


@pytest.mark.parametrize(("field", "value"), [("levels", 1), ("levels", 257), ("height", 0), ("width", 2.5)])
def test_sizes_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be a whole number.*got {value}"):
        PixelCodecConfig(**{field: value})


def test_a_source_that_is_no_codec_is_refused() -> None:
    """A mistyped folder of a saved codec gave one of the default size."""
    with pytest.raises(ValueError, match=r"codec\.source: no/such/codec holds no codec\.json"):
        make_codec("pixels", source="no/such/codec")


def test_saved_and_loaded(tmp_path: Path) -> None:
    PixelCodec(PixelCodecConfig(height=3, levels=5)).save_pretrained(tmp_path)
    assert load_codec(tmp_path).config == PixelCodecConfig(height=3, levels=5)  # type: ignore[attr-defined]
    (tmp_path / "codec.json").write_text(json.dumps({"kind": "pixels", "depth": 3}))
    with pytest.raises(ValueError, match="depth"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({"kind": "text"}))
    with pytest.raises(ValueError, match="kind is not 'pixels'"):
        PixelCodec.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no codec\.json"):
        PixelCodec.from_pretrained(tmp_path / "none")


def test_transparent_is_white_and_sixteen_bits_keep_their_shades() -> None:
    """Black on transparency used to become all black, and 16-bit grey to be cut off at 255."""
    drawing = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    drawing.putpixel((0, 0), (0, 0, 0, 255))
    codec = PixelCodec(PixelCodecConfig(height=2, width=2, levels=2))
    assert codec.encode([drawing]) == [[0, 1, 1, 1]]
    wide = Image.fromarray(np.array([[0, 65535], [32896, 257]], np.uint16))
    assert PixelCodec(PixelCodecConfig(height=2, width=2, levels=256)).encode([wide]) == [[0, 255, 128, 1]]

"""Colour clusters: ImageGPT's own ids, clusters of one's own pictures, and pictures of any size and mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTImageProcessor

from zipper_lm import ZipperModel
from zipper_lm.codecs.codec import Codec, load_codec, make_codec
from zipper_lm.codecs.color_clusters import ColorClusters, PictureSize
from zipper_lm.evaluation.classifier import PictureClassifier
from zipper_lm.evaluation.judges import can_be_judged, suits

RED, GREEN, BLUE, WHITE, BLACK = [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]


@pytest.fixture(scope="module")
def imagegpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ImageGPT's folder: 12 random clusters, pictures of 4 x 4 pixels."""
    folder = tmp_path_factory.mktemp("imagegpt")
    clusters = np.random.default_rng(0).uniform(-1, 1, size=(12, 3)).astype(np.float32)
    ImageGPTImageProcessor(clusters=clusters, size={"height": 4, "width": 4}).save_pretrained(folder)
    config = ImageGPTConfig(vocab_size=13, n_positions=17, n_embd=8, n_layer=2, n_head=2)
    ImageGPTForCausalImageModeling(config).save_pretrained(folder)
    return str(folder)


def primary() -> ColorClusters:
    return ColorClusters(np.array([RED, GREEN, BLUE, WHITE, BLACK]), PictureSize(height=2, width=2))


def test_the_ids_are_those_of_imagegpts_own_processor(imagegpt: str) -> None:
    codec = make_codec("color-clusters", source=imagegpt, bos=12, eos=12, pad=12)
    assert isinstance(codec, Codec)
    assert (codec.bos_id, codec.eos_id, codec.pad_id, codec.vocab_size, codec.rate) == (12, 12, 12, 13, None)
    draw = np.random.default_rng(1)
    pictures = [Image.fromarray(draw.integers(256, size=(4, 4, 3), dtype=np.uint8)) for _ in range(3)]
    ids = ImageGPTImageProcessor.from_pretrained(imagegpt)(pictures, return_tensors="np")["input_ids"]
    assert codec.encode(pictures) == ids.tolist()


def test_the_old_form_of_imagegpts_file_is_read(tmp_path: Path) -> None:
    """As published in 2021: one number for the size, no mean and deviation, a feature extractor's name."""
    old = {"clusters": [RED, BLACK], "do_normalize": True, "do_resize": True, "resample": 2, "size": 8}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**old, "feature_extractor_type": "ImageGPTFeatureExtractor"})
    )
    codec = make_codec("color-clusters", source=str(tmp_path))
    assert isinstance(codec, ColorClusters)
    assert codec.size == PictureSize(height=8, width=8)
    assert codec.encode([Image.new("RGB", (8, 8), "red")]) == [[0] * 64]


def test_an_imagegpt_is_a_tower_for_it_and_a_smaller_one_is_not(imagegpt: str) -> None:
    codec = make_codec("color-clusters", source=imagegpt)  # three ids for three special tokens: two too many
    towers: dict[str, Any] = {n: ImageGPTForCausalImageModeling.from_pretrained(imagegpt) for n in ("image", "other")}
    with pytest.raises(ValueError, match="'image': the codec has 15 ids, the backbone's vocabulary only 13"):
        ZipperModel.fuse(towers, codecs={"image": codec})


def test_ids_survive_a_round_trip_and_pixels_go_row_by_row() -> None:
    codec = primary()
    assert codec.encode(codec.decode([[0, 1, 2, 3], [4, 4, 0, 1]])) == [[0, 1, 2, 3], [4, 4, 0, 1]]
    assert np.asarray(codec.decode([[0, 1, 2, 3]])[0])[0].tolist() == [[255, 0, 0], [0, 255, 0]]


def test_a_row_too_short_is_black_below_and_one_too_long_is_cut() -> None:
    short, long = primary().decode([[3], [3, 3, 3, 3, 0]])
    assert np.asarray(short)[..., 0].tolist() == [[255, 0], [0, 0]]
    assert np.asarray(long).min() == 255


def test_pictures_of_other_sizes_and_modes() -> None:
    codec = primary()
    red = Image.new("RGB", (7, 3), (250, 8, 3))
    transparent = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    transparent.putpixel((1, 1), (0, 0, 255, 255))
    wide = Image.fromarray(np.array([[0, 65535], [65535, 0]], np.uint16))
    pictures = [red, red.convert("P"), red.convert("CMYK"), transparent, wide, Image.new("L", (2, 2), 255)]
    assert codec.encode(pictures) == [[0] * 4, [0] * 4, [0] * 4, [3, 3, 3, 2], [4, 3, 3, 4], [3] * 4]


def test_clusters_are_fitted_on_ones_own_pictures() -> None:
    draw = np.random.default_rng(0)
    colors = np.array([[250, 10, 10], [10, 240, 20], [30, 30, 230]])
    pictures = [
        np.clip(colors[draw.integers(3, size=(6, 6))] + draw.integers(-5, 6, (6, 6, 3)), 0, 255) for _ in range(5)
    ]
    codec = make_codec("color-clusters", [p.astype(np.uint8) for p in pictures], clusters=3, height=6, width=6)
    assert isinstance(codec, ColorClusters)
    found = (codec.colors + 1) * 127.5
    assert [np.abs(found - color).max(1).min() < 3 for color in colors] == [True] * 3


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ([], {}, "neither a source nor pictures"),
        ([Image.new("RGB", (4, 4))], {"clusters": 2}, "2 asked for, but the pictures have only 1 colours"),
        ([], {"clusters": 1}, "at least 2, got 1"),
        ([], {"height": 0}, "height must be a whole number from 1 to 512, got 0"),
        ([], {"source": "none-such/imagegpt-here"}, "'none-such/imagegpt-here': "),
        ([], {"levels": 4}, "levels"),
    ],
)
def test_what_cannot_be_a_codec_is_refused(values: list[Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_codec("color-clusters", values, **options)


def test_sources_without_clusters_or_of_another_range_are_refused(imagegpt: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clusters=3 has no effect"):
        make_codec("color-clusters", source=imagegpt, clusters=3)
    ImageGPTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no clusters"):
        make_codec("color-clusters", source=str(tmp_path))
    ImageGPTImageProcessor(clusters=[RED], image_mean=[0, 0, 0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_mean and image_std 0\.5"):
        make_codec("color-clusters", source=str(tmp_path))


def test_offline_with_nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="offline mode is on"):
        make_codec("color-clusters", source="none-such/imagegpt-here")


def test_ids_that_are_no_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="colour ids, row 1: id 5 is no unit's: those are 0 to 4"):
        primary().decode([[0], [5]])


def test_saved_and_loaded(imagegpt: str, tmp_path: Path) -> None:
    codec = make_codec("color-clusters", source=imagegpt, width=3, offset=1, bos=0, eos=0, pad=0)
    codec.save_pretrained(tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1, "who can read one file can read all"
    again = load_codec(tmp_path)
    assert isinstance(again, ColorClusters)
    assert isinstance(codec, ColorClusters)
    assert (again.colors == codec.colors).all()
    assert (again.size, again.layout) == (codec.size, codec.layout)
    (tmp_path / "colors.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no colors\.safetensors"):
        load_codec(tmp_path)


def test_its_pictures_are_judged_as_pictures() -> None:
    squares = [np.full((2, 2), level, np.uint8) for level in (0, 255)] * 2
    judge = PictureClassifier.fit(squares, ["dark", "light"] * 2)
    assert can_be_judged(primary())
    assert suits(judge, primary())
    assert judge.transcribe(primary().decode([[4] * 4, [3] * 4])) == ["dark", "light"]

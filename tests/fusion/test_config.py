from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from transformers import AutoConfig

from zipper_lm import TowerSpec, ZipperConfig, ZipSpec
from zipper_lm.fusion.tower_spec import place_projections
from zipper_lm.fusion.zip_spec import expand

DEPTHS = {"text": 4, "speech": 6}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("layers", "source_layers") for value in ("banana", [0.5, 1.5], ["a"], [True, 2], 1.5)]
    + [("source_layers", 3)],
)
def test_layers_are_whole_numbers(field: str, value: Any) -> None:
    """In a config, too: there, whatever fits no type is said by the field's own check."""
    with pytest.raises(ValueError, match=f"zip.{field} must be"):
        ZipSpec(**{field: value})
    config = tiny_model().config
    config.zips[0][field] = value
    with pytest.raises(ValueError, match=field):
        _ = config.zip_specs


def test_where_input_projections_stand() -> None:
    """Beside the layers that the zips have, and in the fingerprint only where there was a choice: what was made before
    keeps its own."""
    zips = expand([ZipSpec(layers=2)], DEPTHS)
    first = min(zips[0].layers)  # type: ignore[type-var]
    specs = {n: TowerSpec(source="x", backbone={}, input_projection_layer="first_zip") for n in DEPTHS}
    placed = place_projections(specs, zips)
    assert placed[zips[0].reader].input_projection_layer == first > 0
    one_way = [z for z in zips if z.reader == zips[0].reader]
    with pytest.raises(ValueError, match=r"input_projection_layer is 'first_zip', but no zip lets it read"):
        place_projections(specs, one_way)
    before = {n: TowerSpec(source="x", backbone={}) for n in DEPTHS}
    there, elsewhere = (ZipperConfig(towers, zips).fingerprint for towers in (before, placed))
    old = {n: {k: v for k, v in asdict(s).items() if k != "input_projection_layer"} for n, s in before.items()}
    assert there == ZipperConfig(old, zips).fingerprint != elsewhere


def test_scales() -> None:
    """One for each layer, known before a model is made; in the fingerprint only where it is not 1: what was made before
    keeps its own."""
    zips = expand([ZipSpec(layers=2), ZipSpec(reader="text", layers=2, scale=[2.0, 3.0])], DEPTHS)
    assert {tuple(z.scales) for z in zips} == {(1.0, 1.0), (2.0, 3.0)}
    with pytest.raises(ValueError, match="3 layers but 2 numbers in scale"):
        expand([ZipSpec(layers=3, scale=[2.0, 3.0])], DEPTHS)
    with pytest.raises(ValueError, match="scale='stream': needs numbers here"):
        assert expand([ZipSpec(layers=2, scale="stream")], DEPTHS)[0].scales
    towers = {n: TowerSpec(source="x", backbone={}) for n in DEPTHS}
    plain = expand([ZipSpec(layers=2)], DEPTHS)
    before = [{k: v for k, v in asdict(z).items() if k != "scale"} for z in plain]
    old = {n: {k: v for k, v in asdict(s).items() if k != "input_projection_scale"} for n, s in towers.items()}
    scaled = {n: replace(s, input_projection_scale=0.5) for n, s in towers.items()}
    pairs = [(old, before), (towers, plain), (towers, zips), (scaled, plain)]
    found = [ZipperConfig(t, z).fingerprint for t, z in pairs]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_loss_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="loss_weights"):
        ZipperConfig(towers={"text": TowerSpec(source="x")}, loss_weights={"speech": 1.0})
    with pytest.raises(ValueError, match="loss_weights"):
        ZipperConfig(towers={"text": TowerSpec(source="x")}, loss_weights={"text": -1.0})


def test_round_trips(tmp_path: Path) -> None:
    config = tiny_model(loss_weights={"speech": 2.0}, handover_weight=0.3).config
    config.save_pretrained(tmp_path)
    for again in (ZipperConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is ZipperConfig
        assert again.tower_specs == config.tower_specs
        assert again.zip_specs == config.zip_specs
        assert (again.loss_weights, again.handover_weight) == ({"speech": 2.0}, 0.3)
        assert again.fingerprint == config.fingerprint
    assert ZipperConfig(**config.to_dict()).tower_specs == config.tower_specs
    diff = config.to_diff_dict()
    assert diff["towers"] == config.towers
    assert diff["zips"] == config.zips
    assert config.to_json_string() == ZipperConfig.from_pretrained(tmp_path).to_json_string()
    assert "zipper" in repr(config)
    assert ZipperConfig().towers == {}


def test_the_order_of_towers_is_that_of_the_file() -> None:
    """The handover's classes are towers by number: the number must survive sorted JSON."""
    specs = {n: TowerSpec(source=n) for n in ("text", "speech", "image")}
    assert list(ZipperConfig(towers=specs).towers) == ["image", "speech", "text"]


def test_of_a_path_in_a_config_only_the_last_part_counts() -> None:
    """All of it counted, but no more than the last part is uploaded."""

    def of(path: str) -> ZipperConfig:
        backbone = {"model_type": "llama", "tokenizer_path": path, "part": {"more": path}}
        return ZipperConfig(towers={"text": TowerSpec(source="x", backbone=backbone)})

    made, shared, other = of("/data/team/tok.model"), of("tok.model"), of("/data/team/other.model")
    assert made.tower_specs["text"].config_hash == shared.tower_specs["text"].config_hash
    assert made.fingerprint == shared.fingerprint != other.fingerprint


def test_the_fingerprint_is_of_what_matters() -> None:
    config = tiny_model().config
    other = ZipperConfig.from_dict(config.to_dict())
    other.towers["text"]["source"] = "elsewhere"
    other.zips[0]["dropout"] = 0.1
    assert other.fingerprint == config.fingerprint
    other.zips[0]["positions"] = "rotary"
    assert other.fingerprint != config.fingerprint

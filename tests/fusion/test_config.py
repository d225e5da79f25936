import json
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from transformers import AutoConfig

from zipper_lm import TowerSpec, ZipperConfig, ZipSpec
from zipper_lm.fusion.config import EMBEDDINGS, config_hash, evenly_spaced, expand, place_projections
from zipper_lm.jobs.recipes.schema import TowerRecipe

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


@pytest.mark.parametrize(
    "field",
    [
        {"train": "half"},
        {"input_projection": "cubic"},
        {"input_projection_layer": "last"},
        {"input_projection_layer": -1},
        {"input_projection_layer": True},
        *({"input_projection_scale": wrong} for wrong in (0, -1.0, "rms", [2.0], float("nan"), True, None)),
        {"input_projection_scale": 2.0, "input_projection": "paper"},
    ],
    ids=str,
)
def test_impossible_tower_settings(field: dict) -> None:
    with pytest.raises(ValueError, match=f"tower.{next(iter(field))}"):
        TowerSpec(source="x", **field)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "mica", "Gaussian", None]
)
def test_adapters_do_not_start_from_the_frozen_weights(start: str | None) -> None:
    """PiSSA and its like change the base weights when they are added, and only adapters are stored: the model that was
    loaded again was another one, without a word."""
    for kind in (TowerSpec, TowerRecipe):
        with pytest.raises(ValueError, match=rf"tower\.lora\.init_lora_weights.*'gaussian'.*got {start!r}.*frozen"):
            kind(source="x", train="lora", lora={"init_lora_weights": start})


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_not_trained_with_adapters(bias: str) -> None:
    """The setting was taken, and undone without a word: only adapters are trained."""
    for kind in (TowerSpec, TowerRecipe):
        with pytest.raises(ValueError, match=rf"tower\.lora\.bias must be 'none', got '{bias}'"):
            kind(source="x", train="lora", lora={"bias": bias})
        kind(source="x", train="lora", lora={"bias": "none"})


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


def test_sets_become_lists() -> None:
    """PEFT takes a set of names, and JSON does not: the model trained, and could not be saved."""
    lora = {"target_modules": {"v_proj", "q_proj"}, "rank_pattern": {"q_proj": 4}, "layers_to_transform": [1, 0]}
    spec = TowerSpec(source="x", train="lora", lora=lora)
    assert spec.lora == {**lora, "target_modules": ["q_proj", "v_proj"]}
    assert json.loads(json.dumps(spec.lora)) == spec.lora


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


def test_config_hash() -> None:
    base = {"model_type": "llama", "id2label": dict.fromkeys(range(12), "x"), "shape": (1, 2)}
    assert config_hash(base) == config_hash(json.loads(json.dumps(base)))
    assert config_hash(base) == config_hash({**base, "_name_or_path": "elsewhere", "transformers_version": "9"})
    assert config_hash(base) != config_hash({**base, "hidden_size": 3})


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

import json

import pytest

from zipper_lm import TowerSpec
from zipper_lm.fusion.tower_spec import config_hash
from zipper_lm.jobs.recipes.schema import TowerRecipe


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


def test_sets_become_lists() -> None:
    """PEFT takes a set of names, and JSON does not: the model trained, and could not be saved."""
    lora = {"target_modules": {"v_proj", "q_proj"}, "rank_pattern": {"q_proj": 4}, "layers_to_transform": [1, 0]}
    spec = TowerSpec(source="x", train="lora", lora=lora)
    assert spec.lora == {**lora, "target_modules": ["q_proj", "v_proj"]}
    assert json.loads(json.dumps(spec.lora)) == spec.lora


def test_config_hash() -> None:
    base = {"model_type": "llama", "id2label": dict.fromkeys(range(12), "x"), "shape": (1, 2)}
    assert config_hash(base) == config_hash(json.loads(json.dumps(base)))
    assert config_hash(base) == config_hash({**base, "_name_or_path": "elsewhere", "transformers_version": "9"})
    assert config_hash(base) != config_hash({**base, "hidden_size": 3})

"""Recipes and experiments: YAML, and changes to it on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from fuzz.grammar import TEXTS, as_json, as_yaml, changed, damaged
from fuzz.target import Target
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from zipper_lm.experiments.plan import Experiment, cells_of, read_experiment, runs_of
from zipper_lm.jobs.recipes.checks import check_settings
from zipper_lm.jobs.recipes.reader import _dotted_keys, read_recipe, recipe_hash, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe, PretrainRecipe

ROOT = Path(__file__).parents[3]
KINDS: dict[str, Any] = {"fuse": FuseRecipe, "pretrain": PretrainRecipe, "experiment": Experiment}
TAGS = (
    b"!!python/object/apply:os.system [id]",
    b"!!python/name:os.system",
    b"!!python/module:os",
    b"!!binary aGk=",
    b"!!timestamp 2024-01-01",
    b"!!set {a}",
    b"!!omap [a: 1]",
    b"!!float x",
    b"!!int x",
    b"!!bool x",
    b"!!null x",
    b"!x y",
    b"&a [*a]",
    b"&a {<<: *a}",
    b"<<: [1]",
    b"? [a]\n: b\n",
    b"--- 1\n--- 2\n",
    b"%YAML 9.9\n---\n",
    b"\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c]\n",
    b"1_000",
    b"0x" + b"f" * 5000,
    b"1e" + b"9" * 50,
)


def make() -> Target:
    """Of the repository's own recipes."""
    return Target(name="recipes", run=run, share=50, inputs=_inputs())


def run(data: bytes, folder: Path) -> None:
    """The first line says of what it is a recipe, and the changes; the rest is the file."""
    head, _, text = data.partition(b"\n")
    kind, _, changes = head.decode().partition(" ")
    (file := folder / "recipe.yaml").write_bytes(text)
    if kind == "experiment":
        experiment = read_experiment(file)
        for point, arm in cells_of(experiment):
            for each in runs_of(experiment, arm, point):
                str(each.name)
        return
    recipe = read_recipe(file, json.loads(changes), KINDS[kind])
    recipe_hash(json.loads(json.dumps(to_mapping(recipe)), parse_constant=str))
    if kind == "fuse":
        check_settings(recipe)


@st.composite
def _inputs(draw: DrawFn) -> bytes:
    kind = draw(st.sampled_from(["fuse", "fuse", "fuse", "pretrain", "experiment"]))
    words = [*_WORDS[kind], *TEXTS[:4]]
    texts = changed(_VALID[kind], words).map(lambda value: _text(value))
    keys = st.one_of(st.sampled_from(words), st.sampled_from(words), st.sampled_from(TEXTS))
    values = st.one_of(
        st.sampled_from(TEXTS),
        st.sampled_from([t.decode() for t in TAGS]),
        st.integers().map(str),
        st.sampled_from(words),
    )
    change = st.one_of(st.tuples(keys, values).map("=".join), st.sampled_from(TEXTS))
    changes = json.dumps(draw(st.lists(change, max_size=2)) if not draw(st.integers(0, 3)) else [])
    return f"{kind} {changes}\n".encode() + draw(damaged(texts, TAGS))


def _text(value: Any) -> bytes:
    try:
        return as_yaml(value)
    except Exception:  # half pairs and numbers of 400 digits are none of YAML's: JSON is YAML, too
        return as_json(value)


def _valid() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for file in sorted([*(ROOT / "examples").glob("*.yaml"), *(ROOT / "experiments").glob("*.yaml")]):
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
        kind = "experiment" if "arms" in value else "fuse" if "towers" in value else "pretrain"
        found[kind].append(value)
    return found


_VALID = _valid()
_WORDS = {
    kind: sorted(set(_dotted_keys(schema)) | {k.rpartition(".")[2] for k in _dotted_keys(schema)})
    for kind, schema in KINDS.items()
}
_WORDS["fuse"] += ["speech->text", "text->speech->text", "->", "->text", "frozen", "full", "lora", "quant_method"]

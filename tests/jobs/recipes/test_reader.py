"""Recipes: YAML and overrides into dataclasses, and what is said when they do not fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from zipper_lm.jobs.recipes.reader import build, read_recipe, recipe_hash, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.recipes.yaml_values import parse_value


@dataclass(kw_only=True)
class Data:
    path: Path
    limit: int | None = None
    columns: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_string(cls, text: str) -> Data:
        return cls(path=Path(text))


@dataclass(kw_only=True)
class Tower:
    model: str
    train: bool = False
    layers: list[int] | Literal["even"] = "even"


@dataclass(kw_only=True)
class Training:
    learning_rate: float = 1e-3
    steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(kw_only=True)
class Recipe:
    towers: dict[str, Tower]
    data: Data
    name: str = "zip"
    training: Training = field(default_factory=Training)
    tasks: dict[str, float] = field(default_factory=dict)
    extra: Any = None
    share: float | int = 0
    second: Training | None = None


YAML = """
towers:
  text: {model: a}
  speech:
    model: b
    train: true
    layers: [0, 2]
data: {path: here, columns: {speech: audio}}
tasks: {speech->text: 1, text->speech: 1.26}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    return path


def minimal(**more: Any) -> dict[str, Any]:
    return {"towers": {}, "data": "x"} | more


def test_nested_values_and_defaults(recipe):
    made = read_recipe(recipe, [], Recipe)
    assert made.towers == {"text": Tower(model="a"), "speech": Tower(model="b", train=True, layers=[0, 2])}
    assert made.data == Data(path=Path("here"), columns={"speech": "audio"})
    assert made.tasks == {"speech->text": 1.0, "text->speech": 1.26}
    assert isinstance(made.tasks["speech->text"], float)
    assert made.training == Training()


def test_overrides(recipe):
    made = read_recipe(
        recipe,
        [
            "training.learning_rate=1e-5",
            "training.steps=2e3",
            "towers.text.layers=[1, 3]",
            "towers.image.model=c=d",
            "second.betas=[0.5, 1]",
            "tasks.speech->text=2",
            "name=no",
            "name=on",
            "data.limit=5",
        ],
        Recipe,
    )
    assert made.training == Training(learning_rate=1e-5, steps=2000)
    assert isinstance(made.training.steps, int)
    assert made.towers["text"].layers == [1, 3]
    assert made.towers["image"].model == "c=d"
    assert made.second == Training(betas=(0.5, 1.0))
    assert made.tasks["speech->text"] == 2
    assert made.name == "on"
    assert made.data == Data(path=Path("here"), limit=5, columns={"speech": "audio"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+1", -25.0), (".5", 0.5), ("5.", 5.0), ("12", 12), ("0", 0), ("-1", -1),
        ("yes", "yes"), ("off", "off"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("012", "012"), ("1_000", 1000),
        ("true", True), ("null", None), ("", None), ("~", None), ("'1'", "1"), ("[1, a]", [1, "a"]),
        (".inf", float("inf")),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(recipe, text, value):
    got = read_recipe(recipe, [f"extra={text}"], Recipe).extra
    assert got == value
    assert type(got) is type(value)


def test_plain_string_for_a_dataclass(recipe):
    assert build(Recipe, minimal(data="there")).data == Data(path=Path("there"))
    recipe.write_text("towers: {}\ndata: there\n")
    assert read_recipe(recipe, [], Recipe).data == Data(path=Path("there"))
    assert read_recipe(recipe, ["data.limit=3"], Recipe).data == Data(path=Path("there"), limit=3)


def test_plain_string_override_keeps_the_files_other_fields(recipe):
    made = read_recipe(recipe, ["data=other"], Recipe)
    assert made.data == Data(path=Path("other"), columns={"speech": "audio"})


def test_from_string_may_return_a_mapping():
    @dataclass(kw_only=True)
    class Pair:
        left: str
        right: int

        @classmethod
        def from_string(cls, text: str) -> dict[str, Any]:
            left, _, right = text.partition("@")
            return {"left": left, "right": int(right)}

    @dataclass(kw_only=True)
    class Outer:
        pair: Pair

    # Classes made in a function are out of reach for string annotations, so say it plainly.
    Outer.__annotations__["pair"] = Pair
    assert build(Outer, {"pair": "a@2"}).pair == Pair(left="a", right=2)
    with pytest.raises(ValueError, match=r"recipe: pair: invalid literal"):
        build(Outer, {"pair": "a@b"})


def test_anchors_are_not_changed_together(recipe):
    recipe.write_text("training: &t {steps: 1}\nsecond: *t\ntowers: {}\ndata: x\n")
    made = read_recipe(recipe, ["second.steps=2"], Recipe)
    assert made.second is not None
    assert (made.training.steps, made.second.steps) == (1, 2)


def laughs(levels):
    """A YAML text whose last line stands for 10 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(levels - 1)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), "more than 100000 values, with those that aliases stand for"),
        ("a: &a [*a]\n", "an alias stands for what it lies in"),
        ("a: " + "[" * 101 + "]" * 101 + "\n", "more than 100 levels"),
        ("a: " + "[" * 5000, "not readable as YAML"),
        ("b0: &b0 {x: 1}\n" + "".join(f"b{n + 1}: &b{n + 1} {{<<: [{', '.join([f'*b{n}'] * 9)}]}}\n" for n in range(9)),
         "more than 100000 values"),
    ],
)  # fmt: skip
def test_yaml_is_bounded_before_anything_is_made_of_it(recipe, text, message):
    """Seven lines of aliases ("billion laughs") took all memory, deep lists ended in a RecursionError."""
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe, [], Recipe)
    with pytest.raises(ValueError, match=message):
        parse_value(text, "here")


def test_merge_keys(recipe):
    recipe.write_text("extra: &t {steps: 1}\ntraining: {<<: *t, steps: 3}\ntowers: {}\ndata: x\n")
    assert read_recipe(recipe, [], Recipe).training.steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainig": {}}, r"^here: unknown key 'trainig'; did you mean 'training'\? \(known here: towers, data"),
        ({"training": {"learning_rte": 1}}, r"'training.learning_rte'; did you mean 'training.learning_rate'\?"),
        ({"betas": 3}, r"unknown key 'betas'; did you mean 'training.betas'\?"),
        ({"zzz": 3}, r"unknown key 'zzz' \(known here"),
        ({"training": {"learning_rate": "fast"}}, r"^here: training.learning_rate must be a number, got 'fast'"),
        ({"training": {"steps": 1.5}}, r"training.steps must be a whole number, got 1.5"),
        ({"training": {"steps": True}}, r"training.steps must be a whole number, got True"),
        ({"training": {"learning_rate": True}}, r"training.learning_rate must be a number, got True"),
        ({"training": {"schedule": "cosin"}}, r"training.schedule must be one of 'cosine', 'linear'.*'cosine'\?"),
        ({"training": {"betas": [1]}}, r"training.betas must be a list of \(a number, a number\), got \[1\]"),
        ({"training": {"betas": [1, "x"]}}, r"training.betas\[1\] must be a number, got 'x'"),
        ({"training": [1]}, r"training must be a mapping with keys learning_rate.*, got \[1\]"),
        ({"training": None}, r"training must be a mapping"),
        ({"training": {"learning_rate": -1}}, r"^here: training: learning_rate must be positive, got -1"),
        ({"name": 3}, r"name must be text, got 3; put it in quotes"),
        ({"data": {"path": "x", "limit": "many"}}, r"data.limit must be a whole number or null, got 'many'"),
        ({"data": 3}, r"data must be a mapping with keys path, limit, columns or a string, got 3"),
        ({"data": {}}, r"^here: missing data.path \(a path\)"),
        ({"towers": {"text": {}}}, r"missing towers.text.model \(text\)"),
        ({"towers": {"text": {"model": "a", "trian": 1}}}, r"'towers.text.trian'; did you mean 'towers.text.train'"),
        ({"towers": {"text": {"model": "a", "layers": ["x"]}}}, r"towers.text.layers\[0\] must be a whole number"),
        ({"towers": {"text": {"model": "a", "layers": "evn"}}}, r"towers.text.layers must be one of 'even'"),
        ({"second": {"stepz": 1}}, r"unknown key 'second.stepz'; did you mean 'second.steps'"),
        ({"tasks": {"a": "b"}}, r"tasks.a must be a number, got 'b'"),
        ({"tasks": "b"}, r"tasks must be a mapping to \(a number\), got 'b'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        build(Recipe, minimal(**change), where="here")


def test_missing_keys_are_named_together():
    with pytest.raises(ValueError, match=r"recipe: missing towers \(a mapping to .*\), data \(a mapping"):
        build(Recipe, {})


def test_home_is_written_out(recipe, monkeypatch):
    """Writers expanded ~, readers did not: a tower was trained for hours, saved, and not found again."""
    monkeypatch.setenv("HOME", "/home/kim")
    made = build(
        FuseRecipe,
        {"towers": {"text": "~/t", "speech": "s"}, "data": "~/d", "tasks": {"speech->text": 1}, "output": "~/o"},
    )
    assert (made.towers["text"].source, made.data.source, made.output) == ("/home/kim/t", "/home/kim/d", "/home/kim/o")


def test_union_keeps_the_exact_type():
    assert type(build(Recipe, minimal(share=3)).share) is int
    assert type(build(Recipe, minimal(share=3.0)).share) is float


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", r"'training.steps' is no override; write key=value"),
        ("=1", "is no override"),
        ("training..steps=1", "is no override"),
        ("training.stps=1", r"^command line: unknown key 'training.stps'; did you mean 'training.steps'"),
        ("training.steps=soon", r"^command line: training.steps must be a whole number, got 'soon'"),
        ("training={steps: soon}", r"^command line: training.steps must be"),
        ("name.a=1", r"name.a: name is 'zipped', no mapping"),
        ("name=[1", r"^command line: name: not readable as YAML"),
    ],
)
def test_bad_overrides(recipe, override, message):
    recipe.write_text(YAML + "name: zipped\n")
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe, [override], Recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- 1\n", r"must hold a mapping \(key: value lines\), got \[1\]"),
        ("a: [1\n", "not readable as YAML.*"),
        ("name: a\nname: b\n", r"'name' comes twice(.|\n)*line 2"),
        ("training: {steps: 1, steps: 2}\n", "'steps' comes twice"),
        ("1: a\n", "key 1 is not text"),
        ("a: !!python/object/apply:os.getcwd []\n", "not readable as YAML"),
    ],
)
def test_bad_files(recipe, text, message):
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(recipe, [], Recipe)
    assert "recipe.yaml" in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none.yaml: No such file"):
        read_recipe(tmp_path / "none.yaml", [], Recipe)
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        read_recipe(tmp_path, [], Recipe)
    (tmp_path / "latin").write_bytes(b"name: \xe9\n")
    with pytest.raises(ValueError, match="latin is not UTF-8"):
        read_recipe(tmp_path / "latin", [], Recipe)


def test_to_mapping_and_back(recipe):
    made = read_recipe(recipe, ["second={betas: [0.1, 0.2]}", "extra={a: [1]}"], Recipe)
    mapping = to_mapping(made)
    assert build(Recipe, mapping) == made
    assert build(Recipe, json.loads(json.dumps(mapping))) == made
    assert build(Recipe, yaml.safe_load(yaml.safe_dump(mapping))) == made


def test_to_mapping_refuses_what_is_not_plain():
    with pytest.raises(ValueError, match=r"Recipe.extra\[0\] holds <object"):
        to_mapping(build(Recipe, minimal(extra=[object()])))
    with pytest.raises(ValueError, match="expected a dataclass instance"):
        to_mapping({"a": 1})


def test_hash_sees_values_and_not_the_order_of_keys():
    assert recipe_hash({"a": 1, "b": [1, 2]}) == recipe_hash({"b": [1, 2], "a": 1})
    assert recipe_hash({"a": 1}) != recipe_hash({"a": 2})
    assert recipe_hash({"b": [1, 2]}) != recipe_hash({"b": [2, 1]})
    # sha256 of the text {"a":"é"} in UTF-8
    assert recipe_hash({"a": "é"}) == "b3a092a6af48807fa9482b2ee140105575daa26d5b24b3c0e60a7e2dee6683b1"
    with pytest.raises(ValueError, match="JSON"):
        recipe_hash({"a": float("nan")})


def test_a_new_field_with_a_default_changes_no_hash() -> None:
    """Records of experiments were "made by other settings" as soon as a recipe learned a new one."""

    @dataclasses.dataclass
    class Inner:
        size: int = 1

    @dataclasses.dataclass
    class Old:
        name: str
        inner: Inner = dataclasses.field(default_factory=Inner)
        parts: dict[str, Inner] = dataclasses.field(default_factory=dict)

    @dataclasses.dataclass
    class New(Old):
        added: float = 0.5

    for inner, parts in ((Inner(), {}), (Inner(size=2), {"a": Inner(), "b": Inner(size=3)})):
        old, new = (
            to_mapping(Old("x", inner, parts), defaults=False),
            to_mapping(New("x", inner, parts), defaults=False),
        )
        assert recipe_hash(old) == recipe_hash(new)
    assert old == {"name": "x", "inner": {"size": 2}, "parts": {"a": {}, "b": {"size": 3}}}
    assert to_mapping(New("x", added=0.6), defaults=False) == {"name": "x", "added": 0.6}


def test_what_a_text_says_is_the_caller_s_own() -> None:
    """It is worked out once; a recipe that was changed after it was read would have changed the next."""
    parse_value("{a: [1]}", "here")["a"].append(2)
    assert parse_value("{a: [1]}", "there") == {"a": [1]}

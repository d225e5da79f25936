"""Documentation and examples are true: recipes parse, code compiles or runs, links and commands and fields exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml
from tiny_recipes import say, tiny_recipe

from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.jobs.recipes import schema
from zipper_lm.jobs.recipes.reader import build, read_recipe, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe, PretrainRecipe
from zipper_lm.jobs.towers import build_model

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SCHEMAS = {"fuse": FuseRecipe, "pretrain": PretrainRecipe}
TABLES = {c.__name__: c for c in [*vars(schema).values(), ZipSpec] if dataclasses.is_dataclass(c)}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(language: str, label: str | None = None) -> list[Any]:
    """Fenced blocks as pytest parameters, by page and number; `label` is the second word after the fence."""
    found = []
    for page in PAGES:
        for number, (info, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
            words = info.split()
            if words[:1] == [language] and (label is None or label in words[1:]):
                found.append(pytest.param(words[1:], text, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.name)
def test_example_is_a_recipe_and_says_how_to_run_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    command = re.search(r"^#   zipper (fuse|pretrain) (\S+)", text, re.M)
    assert command is not None
    assert command[2] == f"examples/{file.name}"
    assert read_recipe(file, ["data=elsewhere"], SCHEMAS[command[1]]).data.source == "elsewhere"


@pytest.mark.parametrize(("words", "text"), blocks("yaml"))
def test_yaml_in_the_docs_is_a_recipe(words: list[str], text: str, tmp_path: Path) -> None:
    """A block of a single tower (``yaml tower``) is read as such."""
    if words[:1] == ["tower"]:
        text = yaml.safe_dump({**yaml.safe_load(text), "data": "d", "tasks": {"speech->text": 1}, "output": "o"})
        words = ["fuse"]
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    read_recipe(tmp_path / "recipe.yaml", [], SCHEMAS[words[0]])


@pytest.mark.parametrize(("words", "text"), blocks("python"))
def test_python_in_the_docs_compiles_and_imports_what_exists(words: list[str], text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("page", sorted({p.id.rsplit("-", 1)[0] for p in blocks("python", "run")}))
def test_python_marked_run_runs(page: str) -> None:
    names: dict[str, Any] = {"__name__": "docs"}  # the blocks of a page follow each other
    for block in blocks("python", "run"):
        if block.id.rsplit("-", 1)[0] == page:
            exec(compile(block.values[1], block.id, "exec"), names)


def program(name: str) -> Any:
    """A module of an example."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_python_example_learns_writes_saves_and_loads() -> None:
    losses = program("python_api").main(steps=8)
    assert losses[-1] < losses[0]


def test_talking_to_an_llm(tmp_path: Path) -> None:
    """The example, with a tiny model that has a chat template."""
    model: Any = build_model(tiny_recipe(tmp_path / "unused"))
    model.processor.codecs["text"].tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<s>"
    model.generation_settings = {"text": {"max_new_tokens": 3}, "speech": {"min_new_tokens": 8, "max_new_tokens": 8}}
    model.save_pretrained(tmp_path / "model")
    example = program("talk_to_smollm2")
    soundfile.write(tmp_path / "asked.wav", say("one two"), 16_000)
    turns = example.main(str(tmp_path / "model"), [str(tmp_path / "asked.wav")] * 2, str(tmp_path / "talk"), tokens=4)
    page = (tmp_path / "talk" / "index.html").read_text()
    assert turns[0].heard == turns[1].heard
    assert f"Heard: {turns[0].heard}" in page
    for name in ("question-1.wav", "answer-2.wav"):
        assert f'src="{name}"' in page
        assert (tmp_path / "talk" / name).is_file()


# Links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Git hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links() -> Iterator[Any]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            if not re.match(r"https?://", target):
                yield pytest.param(page, target, id=f"{page.name}-{target}")


@pytest.mark.parametrize(("page", "target"), links())
def test_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    goal = (page.parent / path).resolve() if path else page
    assert goal.exists()
    assert ROOT in (goal, *goal.parents)
    assert not anchor or anchor in anchors(goal)


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_file_exists(page: Path) -> None:
    for name in re.findall(
        r"`((?:src|tests|benchmarks|tools|experiments|results|examples|docs)/[\w./-]+\.\w+)`", page.read_text("utf-8")
    ):
        # The worked example names two files that a reader would write.
        assert (ROOT / name).exists() or "dna" in name or "NAME" in name, name


def test_code_that_the_concepts_name_is_there() -> None:
    """After the files had moved, the page still sent readers to `model.py`."""
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for name in named:
        assert (ROOT / "src" / "zipper_lm" / name).is_file() or (ROOT / name).is_file(), name


# Tables of recipe fields


def table(name: str) -> dict[str, str]:
    """Field to default, from the table in docs/recipes.md that is headed by a dataclass's name."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"| {name} | Default |")
    assert found, f"docs/recipes.md has no table of {name}"
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", rest.split("\n\n")[0], re.M)
    return {field: default.strip().strip("`") for field, default in rows}


@pytest.mark.parametrize("schema", TABLES.values(), ids=lambda c: c.__name__)
def test_table_has_every_field_with_its_default(schema: Any) -> None:
    documented = table(schema.__name__)
    assert list(documented) == [f.name for f in dataclasses.fields(schema)]
    for field in dataclasses.fields(schema):
        required = field.default is field.default_factory is dataclasses.MISSING
        assert (documented[field.name] == "required") == required, field.name
    given = {f: yaml.safe_load(text) for f, text in documented.items() if text != "required"}
    needed: dict[str, Any] = {f: {} if f == "tasks" else "x" for f in documented if f not in given}
    if "start" in given:  # without it a recipe needs towers
        needed["start"] = given["start"] = "x"
    # Writing the documented defaults out changes nothing.
    assert to_mapping(build(schema, needed | given)) == to_mapping(build(schema, needed))


# Commands


def commands() -> Iterator[Any]:
    """`zipper NAME ...` in the docs, and in the heads of the examples."""
    for page in [*PAGES, *EXAMPLES]:
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"`(zipper [a-z][^`]*)`", text) + re.findall(r"^(?:#   |    )(zipper [^#\n]+)", text, re.M)
        for command in dict.fromkeys(found):
            yield pytest.param(command, id=f"{page.name}-{command}")


@pytest.mark.parametrize("command", commands())
def test_command_exists_with_these_options(command: str) -> None:
    from typer.testing import CliRunner

    from zipper_lm.cli import app

    name, *arguments = shlex.split(command)[1:]
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    for option in (a.partition("=")[0] for a in arguments if a.startswith("--")):
        assert option in result.output


def test_the_containerfile_copies_and_runs_what_is_there() -> None:
    """Nothing here can build it."""
    from typer.testing import CliRunner

    from zipper_lm.cli import app

    text = (ROOT / "examples" / "serving" / "Containerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert "src" in copied
    for name in copied:
        assert (ROOT / name).exists(), name
    entry = re.search(r"^ENTRYPOINT (.+)$", text, re.M)
    assert entry is not None
    command = yaml.safe_load(entry[1])
    assert command[:2] == ["zipper", "serve"]
    told = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).output
    for option in [word for word in command if word.startswith("--")]:
        assert option in told


def test_every_command_is_in_the_readme() -> None:
    from typer.main import get_command

    from zipper_lm.cli import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = list(getattr(get_command(app), "commands", {}))
    assert names
    for name in names:
        assert f"`zipper {name}" in readme


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)

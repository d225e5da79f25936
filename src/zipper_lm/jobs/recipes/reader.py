"""Recipes: a YAML file and `key=value` overrides, read into typed dataclasses.

Every complaint is a `ValueError` that names the dotted key, where it was read, and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, overload

from zipper_lm.fusion.fields import field_types
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.recipes.yaml_values import parse_value

T = TypeVar("T")
COMMAND_LINE = "command line"


@overload
def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> FuseRecipe: ...


@overload
def read_recipe(path: str | Path, overrides: Sequence[str], schema: type[T]) -> T: ...


def read_recipe(path: str | Path, overrides: Sequence[str] = (), schema: type[Any] = FuseRecipe) -> Any:
    """Read a recipe file, apply overrides, and build `schema` from it.

    Args:
        path: a YAML file holding one mapping.
        overrides: strings such as ``"training.learning_rate=1e-3"``; the value is YAML. Later ones win. A
            mapping replaces what the file has there; a plain string for a dataclass with `from_string` (see
            `build`) changes only the fields that the string sets.
        schema: a dataclass: what the file is a recipe of.

    Raises:
        ValueError: if overrides are one string; if the file is missing, empty, no mapping, not YAML, or has a key
            twice; for a malformed override; and as `build`.
    """
    if isinstance(overrides, str):
        raise ValueError(f"read_recipe: overrides must be a list of strings, got {overrides!r}")
    mapping = _read_yaml(Path(path))
    overridden = []
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")):
            raise ValueError(f"{COMMAND_LINE}: {override!r} is no override; write key=value, such as seed=1")
        value = parse_value(text, f"{COMMAND_LINE}: {key}")
        mapping = _override(mapping, schema, key.split("."), value, "")
        overridden.append(key)
    return _build(schema, _at_home(mapping), "", _Source(str(path), tuple(overridden)))


def build(schema: type[T], mapping: Mapping[str, Any], where: str = "recipe") -> T:
    """Build a dataclass, and those nested in it, from plain values.

    Understood annotations: dataclasses, ``dict[str, X]``, ``list[X]``, tuples, unions and `Optional`,
    `Literal`, `bool`, `int` (a whole float such as 1e4 too), `float` (an int too), `str`, `Path`, `Any`. A
    dataclass with a classmethod ``from_string(text)``, which returns an instance or a mapping of fields, may
    be given as a plain string. Any string that begins with ``~/`` is a path in the user's home folder.

    Args:
        schema: a dataclass.
        mapping: field name to plain value; see `to_mapping` for the inverse.
        where: what messages call the place the values come from.

    Raises:
        ValueError: for an unknown key (with the nearest known one), a value of another type, a missing
            required key, and for whatever the dataclasses' own checks refuse.
    """
    return _build(schema, _at_home(mapping), "", _Source(where))


def _at_home(value: Any) -> Any:
    """With ``~/`` written out, at whatever depth: who only reads a path and who makes it must mean the same place."""
    if isinstance(value, Path):
        return value.expanduser()
    if isinstance(value, Mapping):
        return {key: _at_home(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_at_home(entry) for entry in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def to_mapping(recipe: Any, *, defaults: bool = True) -> dict[str, Any]:
    """A dataclass as plain values (dict, list, str, int, float, bool, None), fit for YAML and JSON.

    Args:
        recipe: the dataclass. defaults: whether fields that have their default are there. Without them the result, and
            its hash, stays the same when a field is added to the dataclass.

    Raises:
        ValueError: if a field holds anything else.
    """
    if not dataclasses.is_dataclass(recipe) or isinstance(recipe, type):
        raise ValueError(f"to_mapping: expected a dataclass instance, got {recipe!r}")
    return _plain(recipe, type(recipe).__name__, defaults)


def recipe_hash(mapping: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of a mapping's JSON with sorted keys; the order of keys does not matter.

    Raises:
        ValueError: if the mapping holds NaN or infinity, which JSON cannot write.
    """
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# Reading a file


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe: {path} is not UTF-8 text") from error
    except OSError as error:
        raise ValueError(f"recipe: cannot read {path}: {error.strerror or error}") from error
    value = parse_value(text, str(path))
    if value is None:
        raise ValueError(f"recipe: {path} is empty")
    if not isinstance(value, dict):
        raise ValueError(f"recipe: {path} must hold a mapping (key: value lines), got {_short(value)}")
    return value


# Overrides


def _override(node: dict[str, Any], annotation: Any, keys: Sequence[str], value: Any, prefix: str) -> dict[str, Any]:
    """A copy of `node` with `value` at `keys`. A copy: YAML anchors put one object in several places."""
    key, dotted = keys[0], _join(prefix, keys[0])
    schema = _dataclass_of(annotation)
    fields = _annotations(schema) if schema else {}
    if schema and key not in fields:
        raise _unknown(schema, key, prefix, COMMAND_LINE)
    inner = fields[key] if schema else _item_of(annotation)
    old, inner_schema = node.get(key), _dataclass_of(inner)
    if isinstance(old, str) and inner_schema and hasattr(inner_schema, "from_string") and len(keys) > 1:
        old = _from_string(inner_schema, old, dotted, COMMAND_LINE)
    if len(keys) > 1:
        if not isinstance(old, dict | None):
            raise ValueError(f"{COMMAND_LINE}: {'.'.join((dotted, *keys[1:]))}: {dotted} is {_short(old)}, no mapping")
        value = _override(old or {}, inner, keys[1:], value, dotted)
    elif isinstance(old, dict) and isinstance(value, str) and inner_schema and hasattr(inner_schema, "from_string"):
        value = old | _from_string(inner_schema, value, dotted, COMMAND_LINE)
    return node | {key: value}


def _from_string(schema: type[Any], text: str, key: str, where: str) -> dict[str, Any]:
    """The fields that a plain string sets: those in which `schema.from_string(text)` differs from defaults."""
    try:
        made = schema.from_string(text)
    except ValueError as error:
        raise ValueError(f"{where}: {key}: {error}") from error
    if isinstance(made, Mapping):
        return dict(made)
    plain = _plain(made, key)
    return {f.name: plain[f.name] for f in _fields(schema) if getattr(made, f.name) != _default(f)}


# Building


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where values come from, for messages: the file, or the command line for overridden keys."""

    file: str
    overridden: tuple[str, ...] = ()

    def of(self, key: str) -> str:
        inside = any(key == o or key.startswith(o + ".") for o in self.overridden)
        return COMMAND_LINE if inside else self.file


def _build(schema: type[T], mapping: Mapping[str, Any], prefix: str, source: _Source) -> T:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{source.of(prefix)}: expected a mapping, got {_short(mapping)}")
    annotations = _annotations(schema)
    for key in mapping:
        if key not in annotations:
            raise _unknown(schema, key, prefix, source.of(_join(prefix, str(key))))
    missing = [f.name for f in _fields(schema) if f.name not in mapping and _default(f) is dataclasses.MISSING]
    if missing:
        wanted = ", ".join(f"{_join(prefix, name)} ({_name(annotations[name])})" for name in missing)
        raise ValueError(f"{source.of(prefix)}: missing {wanted}")
    values = {k: _convert(annotations[k], v, _join(prefix, k), source) for k, v in mapping.items()}
    try:
        return schema(**values)
    except ValueError as error:
        raise ValueError(f"{source.of(prefix)}: {prefix + ': ' if prefix else ''}{error}") from error


def _convert(annotation: Any, value: Any, key: str, source: _Source) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin is Annotated:
        return _convert(arguments[0], value, key, source)
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, value, key, source)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in arguments):
            return value
        raise _mistyped(annotation, value, key, source, _near(str(value), [str(a) for a in arguments]))
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _convert_dataclass(annotation, value, key, source)
    if (origin or annotation) in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _mistyped(annotation, value, key, source)
        item = arguments[1] if arguments else Any
        return {str(k): _convert(item, v, _join(key, str(k)), source) for k, v in value.items()}
    if (origin or annotation) in (list, tuple, Sequence):
        return _convert_sequence(annotation, value, key, source)
    return _convert_scalar(annotation, value, key, source)


def _convert_union(annotation: Any, value: Any, key: str, source: _Source) -> Any:
    arms = get_args(annotation)
    # The arm of exactly this type goes first, so that 3 stays an int in `float | int`.
    errors: list[ValueError] = []
    for arm in sorted(arms, key=lambda arm: arm is not type(value)):
        try:
            return _convert(arm, value, key, source)
        except ValueError as error:
            if _fits(arm, value):
                errors.append(error)
    if len(errors) == 1:  # the value had the right shape for one arm: what was wrong inside it helps most
        raise errors[0]
    raise _mistyped(annotation, value, key, source)


def _fits(annotation: Any, value: Any) -> bool:
    """Whether the outermost shape is right, so that an error must be about what is inside."""
    kind = get_origin(annotation) or annotation
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping) or (isinstance(value, str) and hasattr(kind, "from_string"))
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    if kind in (list, tuple, Sequence):
        return isinstance(value, list | tuple)
    return kind is Literal and any(type(value) is type(a) for a in get_args(annotation))


def _convert_dataclass(schema: type[Any], value: Any, key: str, source: _Source) -> Any:
    if isinstance(value, schema):
        return value
    if isinstance(value, str) and hasattr(schema, "from_string"):
        value = _from_string(schema, value, key, source.of(key))
    if not isinstance(value, Mapping):
        raise _mistyped(schema, value, key, source)
    return _build(schema, value, key, source)


def _convert_sequence(annotation: Any, value: Any, key: str, source: _Source) -> Any:
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if not isinstance(value, list | tuple):
        raise _mistyped(annotation, value, key, source)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise _mistyped(annotation, value, key, source)
        items: Sequence[Any] = arguments
    else:
        items = [arguments[0] if arguments else Any] * len(value)
    made = [_convert(item, v, f"{key}[{i}]", source) for i, (item, v) in enumerate(zip(items, value))]
    return tuple(made) if kind is tuple else made


def _convert_scalar(annotation: Any, value: Any, key: str, source: _Source) -> Any:
    if annotation in (None, type(None)) and value is None:
        return None
    if annotation is bool and isinstance(value, bool):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float and number:
        return float(value)
    if annotation is int and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if annotation is str and isinstance(value, str):
        return value
    if annotation is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    if annotation in (str, Path) and isinstance(value, int | float):  # bool is an int
        raise _mistyped(annotation, value, key, source, "put it in quotes, inside the shell's own if there are any")
    if annotation not in (None, type(None), bool, int, float, str, Path):
        raise TypeError(f"{key}: recipes have no rule for the annotation {annotation!r}")
    raise _mistyped(annotation, value, key, source)


# Looking at schemas


def _fields(schema: type[Any]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(schema) if f.init]


def _annotations(schema: Any) -> dict[str, Any]:
    hints = field_types(schema)
    return {f.name: hints[f.name] for f in _fields(schema)}


def _default(field: dataclasses.Field[Any]) -> Any:
    """The field's default value, or `MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _dataclass_of(annotation: Any) -> type[Any] | None:
    """The one dataclass that an annotation allows, or `None`."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        found = [d for a in get_args(annotation) if (d := _dataclass_of(a))]
        return found[0] if len(found) == 1 else None
    return None


def _item_of(annotation: Any) -> Any:
    """The type of a mapping's values, `Any` where it is not said."""
    if get_origin(annotation) in (dict, Mapping):
        return get_args(annotation)[1]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        items = [_item_of(a) for a in get_args(annotation)]
        return next((item for item in items if item is not Any), Any)
    return Any


def _dotted_keys(schema: type[Any], prefix: str = "", above: tuple[type[Any], ...] = ()) -> Iterator[str]:
    """All keys that `schema` knows, those of nested dataclasses too."""
    for name, annotation in _annotations(schema).items():
        yield _join(prefix, name)
        inner = _dataclass_of(annotation)
        if inner and inner not in (*above, schema):
            yield from _dotted_keys(inner, _join(prefix, name), (*above, schema))


# Messages


def _unknown(schema: type[Any], key: str, prefix: str, where: str) -> ValueError:
    known = list(_annotations(schema))
    deeper = [k for k in _dotted_keys(schema) if k.rpartition(".")[2] == key]  # right key, wrong level
    near = deeper or difflib.get_close_matches(str(key), known, n=1)
    hint = f"; did you mean {_join(prefix, near[0])!r}?" if near else ""
    return ValueError(f"{where}: unknown key {_join(prefix, str(key))!r}{hint} (known here: {', '.join(known)})")


def _near(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _mistyped(annotation: Any, value: Any, key: str, source: _Source, hint: str = "") -> ValueError:
    return ValueError(
        f"{source.of(key)}: {key} must be {_name(annotation)}, got {_short(value)}{'; ' + hint if hint else ''}"
    )


def _name(annotation: Any) -> str:
    """An annotation in a user's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) for a in arguments)
    if origin is Annotated:
        return _name(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (list, Sequence):
        return f"a list of ({_name(arguments[0])})"
    if origin is tuple:
        return f"a list of ({', '.join(_name(a) for a in arguments if a is not Ellipsis)})"
    if origin in (dict, Mapping):
        return f"a mapping to ({_name(arguments[1])})"
    if dataclasses.is_dataclass(annotation):
        keys = "a mapping with keys " + ", ".join(f.name for f in _fields(annotation))  # type: ignore[arg-type]
        return keys + (" or a string" if hasattr(annotation, "from_string") else "")
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    words |= {type(None): "null", dict: "a mapping", list: "a list", tuple: "a list"}
    return words.get(annotation, str(annotation))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _plain(value: Any, key: str, defaults: bool = True) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in _fields(type(value)) if defaults or not _is_default(value, f)}
        return {name: _plain(v, f"{key}.{name}", defaults) for name, v in fields.items()}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{key}.{k}", defaults) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{key}[{i}]", defaults) for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"to_mapping: {key} holds {_short(value)}, which is no plain value")


def _is_default(owner: Any, field: dataclasses.Field[Any]) -> bool:
    value = getattr(owner, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return bool(value == field.default)  # MISSING equals nothing else

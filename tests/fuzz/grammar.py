"""Strategies: valid values with a few changes each, as JSON or YAML text, whole or damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import yaml
from fuzz.watch import OUTSIDE
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 255, 256, 1000, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64),
    *(10**9, 10**12, 10**30, -(2**31), -(2**63), 0.5, -0.0, 1.0, 1e-300, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), True, False, 10**400),
)
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        ".",
        "..",
        "/",
        "~",
        "~root",
        "*",
        "-",
        "--help",
        "\ud800",
        "\u202egnp.exe",
        "e\u0301" * 500,
    ),
    *(
        "../secret.wav",
        "../secret.txt",
        "../secret.png",
        f"{OUTSIDE}/secret.wav",
        f"{OUTSIDE}/secret.txt",
        "a/../../secret.wav",
    ),
    *(
        f"{OUTSIDE}/secret.png",
        f"file://{OUTSIDE}/secret.wav",
        OUTSIDE,
        "../",
        "../secret.tar",
        "./../in/../secret.txt",
    ),
    *("http://127.0.0.1:9/x.wav", "https://example.com/x.png", "file:///etc/passwd", "s3://bucket/x.wav", "hf://a/b"),
    *(
        "owner/name",
        "owner/name@main",
        "evil.py",
        "evil--module.Class",
        "os.system",
        "__class__",
        "__init__",
        "lm_head",
    ),
    *(
        "None",
        "null",
        "true",
        "1e999",
        "nan",
        "0x10",
        "1_0",
        "1:30",
        "2024-01-01",
        "<<",
        "=",
        "&a *a",
        "!!python/name:os.system",
    ),
    *("{{ 7 * 7 }}", "{% for i in range(9999999) %}x{% endfor %}", "$(id)", "`id`", "%s%n", "a" * 300, "a" * 70_000),
    *("(a+)+$", "\r\n\r\n", "cuda", "meta", "auto", "float16", "bfloat16", "int8", "float8_e4m3fn"),
)
EMPTY: tuple[Any, ...] = (None, [], {}, [[]], {"": None}, [None], {"a": {"a": {}}})


def hostile(words: Sequence[Any] = ()) -> SearchStrategy[Any]:
    """A value that may be anywhere. words: what the target has names and values of."""
    chosen = [st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(EMPTY).map(deepcopy)]
    simple = st.one_of(st.integers(), st.floats(), st.text(max_size=20), st.booleans())
    if words:
        chosen.append(st.sampled_from(list(words)).map(deepcopy))
    return st.one_of(*chosen, *chosen, simple, st.lists(simple, max_size=4), st.integers(2, 300).map(_nested))


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 3 else {"a": value}
    return value


@st.composite
def changed(draw: DrawFn, valid: Sequence[Any], words: Sequence[Any] = (), most: int = 4) -> Any:
    """One of the valid values, with one to `most` changes somewhere inside."""
    box = [deepcopy(draw(st.sampled_from(list(valid))))]
    for _ in range(draw(st.integers(1, most))):
        _change(draw, box, words)
    return box[0]


def _change(draw: DrawFn, box: list[Any], words: Sequence[Any]) -> None:
    owner, key = draw(st.sampled_from(list(_places(box))))
    ways = ["value", "value", "near", "wrap", "copy"]
    if isinstance(owner, dict):
        ways += ["drop", "rename", "add"]
    elif owner is not box:
        ways += ["drop", "repeat"]
    way, old = draw(st.sampled_from(ways)), owner[key]
    if way == "value":
        owner[key] = draw(hostile(words))
    elif way == "near":
        owner[key] = draw(_near(old)) if isinstance(old, int | float | str) else draw(hostile(words))
    elif way == "wrap":
        owner[key] = draw(st.sampled_from([[old], [old, old], {"a": old}, {"": old}, str(old), [[old]]]))
    elif way == "copy":
        other, place = draw(st.sampled_from(list(_places(box))))
        owner[key] = deepcopy(other[place])
    elif way == "drop":
        del owner[key]
    elif way == "repeat":
        owner.extend(deepcopy(owner[:1]) * draw(st.sampled_from([1, 2, 200])))
    elif way == "rename":
        owner[str(draw(st.sampled_from([*TEXTS, *(w for w in words if isinstance(w, str))])))] = owner.pop(key)
    else:
        owner[str(draw(st.sampled_from([*TEXTS[:20], *(w for w in words if isinstance(w, str))])))] = draw(
            hostile(words)
        )


def _near(old: Any) -> SearchStrategy[Any]:
    if isinstance(old, str):
        cuts = st.integers(0, len(old)).map(lambda n: old[:n])
        return st.one_of(cuts, st.text(max_size=3).map(lambda t: old + t), st.just(old.upper()), st.just(old * 50))
    near = [
        old + 1,
        old - 1,
        -old,
        old * 2,
        old * 10**6,
        str(old),
        float(old) if abs(old) < 1e300 else 0.0,
        old / 3 if abs(old) < 1e300 else 1,
    ]
    return st.sampled_from(near)


def _places(box: Any) -> Iterator[tuple[Any, Any]]:
    """Owner and key of every value inside, no more than 300."""
    waiting, count = [box], 0
    while waiting and count < 300:
        owner = waiting.pop()
        for key in list(owner) if isinstance(owner, dict) else range(min(len(owner), 50)):
            count += 1
            yield owner, key
            if isinstance(owner[key], dict | list) and owner[key]:
                waiting.append(owner[key])


def as_json(value: Any) -> bytes:
    """With the NaN and the half pairs that Python's own reader takes."""
    return json.dumps(value).encode()


def as_yaml(value: Any) -> bytes:
    """YAML, of plain values."""
    return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: DrawFn, texts: SearchStrategy[bytes], snippets: Sequence[bytes] = ()) -> bytes:
    """A text, and now and then one that is cut off, has bytes inside that belong nowhere, or something twice."""
    text = draw(texts)
    if draw(st.integers(0, 4)):
        return text
    way = draw(
        st.sampled_from(
            ["cut", "insert", "twice", "bom", "wide", "number", "deep", *(["snippet"] * 3 if snippets else [])]
        )
    )
    at = draw(st.integers(0, len(text)))
    if way == "cut":
        return text[:at]
    if way == "bom":
        return b"\xef\xbb\xbf" + text
    if way == "wide":
        return text.decode("utf-8", "replace").encode("utf-16")
    inside = {
        "insert": draw(st.binary(max_size=8)),
        "twice": text[at : at + draw(st.integers(1, 200))],
        "number": b"1" * draw(st.sampled_from([20, 5000, 100_000])),
        "deep": draw(st.sampled_from([b"[", b'{"a":', b"- "])) * draw(st.sampled_from([50, 2000, 100_000])),
        "snippet": draw(st.sampled_from(list(snippets) or [b""])),
    }[way]
    return text[:at] + inside + text[at:]

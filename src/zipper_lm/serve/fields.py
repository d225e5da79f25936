"""Fields of requests. What is not followed is refused by its name, unless it says what would be without it."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from python_multipart.multipart import parse_options_header

from zipper_lm.serve.errors import Refusal, refusal_of_fields

STOPS, STOP = 4, 200
"""Strings that may end a text, and characters of each: every token is searched for them."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character beyond 16 bits; alone it is none


class Fields(BaseModel):
    """Fields of one request or message.

    Attributes:
        unsupported: fields that clients know and nothing here follows, with the values that change nothing. `None`
            never changes anything.
    """

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def refuse_rest(self, within: str = "") -> None:
        """Raise `Refusal` for a field that is not followed. `within`: what is put in front of its name."""
        for name, value in (self.model_extra or {}).items():
            param = f"{within}{name}"
            if name not in self.unsupported:
                raise Refusal(400, f"unknown field {param[:80]!r}", param=param[:80], code="unknown_parameter")
            if value is not None and not any(_same(value, without) for without in self.unsupported[name]):
                raise Refusal(
                    400,
                    f"{param}={str(value)[:80]} is not supported by this server",
                    param=param,
                    code="unsupported_parameter",
                )


def _same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are one; in Python 1 is `True`, too."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


AnyFields = TypeVar("AnyFields", bound=Fields)


def checked(kind: type[AnyFields], given: Any, within: str = "") -> AnyFields:
    """Fields of a kind.

    Raises:
        Refusal: for a field that is missing, of another type, out of range, or not followed.
    """
    if not isinstance(given, dict):
        raise Refusal(400, f"{within.rstrip('.') or 'the body'} must be an object", code="invalid_value")
    try:
        fields = kind.model_validate(given)
    except ValidationError as error:
        raise refusal_of_fields(error.errors(), given, within) from error
    fields.refuse_rest(within)
    return fields


async def json_fields(request: Request, kind: type[AnyFields]) -> AnyFields:
    """Fields of a request whose body is JSON.

    Raises:
        Refusal: as `checked`; for a body of another kind.
    """
    if _type_of(request) != "application/json":
        raise Refusal(415, f"content-type must be application/json, got {_type_of(request)!r}")
    return checked(kind, parsed(await request.body(), "the body"))


def parsed(text: bytes | str, what: str) -> Any:
    """A JSON value. Raises `Refusal` for what is none, or is nested too deep, and for what Python's reader takes and no
    answer could repeat: NaN, infinities, and halves of UTF-16 pairs."""
    try:
        said = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(said, parse_constant=_no_number)
        if _HALF.search(said):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"{what} is not JSON: {str(error)[:200]}", code="invalid_json") from error


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _type_of(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def check_multipart(request: Request) -> None:
    """Raise `Refusal` unless a request's body is a form with files."""
    if _type_of(request) != "multipart/form-data":
        raise Refusal(415, f"content-type must be multipart/form-data, got {_type_of(request)!r}")
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() != b"utf-8":  # Python knows many that no client means
        raise Refusal(415, f"the form's charset must be utf-8, got {charset.decode('latin-1')[:80]!r}")


def check_stops(stops: Any, param: str) -> None:
    """Raise `Refusal` for more strings, or longer ones, than a text may be ended by."""
    listed = isinstance(stops, list) and len(stops) <= STOPS
    if not listed or not all(isinstance(stop, str) and 0 < len(stop) <= STOP for stop in stops):
        message = f"{param} must be up to {STOPS} strings of 1 to {STOP} characters"
        raise Refusal(400, message, param=param, code="invalid_value")

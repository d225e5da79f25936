"""Fields of requests. What is not followed is refused by its name, unless it says what would be without it."""

from __future__ import annotations

import json
from typing import Any, ClassVar, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from zipper_lm.serve.errors import Refusal, refusal_of


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
            if value is not None and value not in self.unsupported[name]:
                raise Refusal(
                    400,
                    f"{param}={str(value)[:80]} is not supported by this server",
                    param=param,
                    code="unsupported_parameter",
                )


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
        refusal = refusal_of(error)
        raise Refusal(400, refusal.message, param=f"{within}{refusal.param}", code=refusal.code) from error
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
        value = json.loads(text, parse_constant=_no_number)
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

"""What a client is told when it cannot be served: ``{"error": {message, type, param, code}}``, whatever went wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from zipper_lm.generation.engine.handle import EngineClosed, EngineFull

logger = logging.getLogger(__name__)

RETRY_AFTER = {"retry-after": "1"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_WORDS = {404: "no such route", 405: "this route has no such method"}


class Refusal(Exception):
    """A request is not served.

    Args:
        status: of HTTP. message: for people: field, value and limit. param: the field. code: for programs.
        headers: to be sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients parse it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException, param: str | None = None) -> Refusal:
    """What a client is told of an error; of one that is not its fault, nothing but that.

    Args:
        error: that was met. param: the field that a `ValueError` is about.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, EngineFull):
        return overloaded()
    if isinstance(error, EngineClosed | CancelledError):
        return unavailable("the server is ending, or its engine has failed")
    if isinstance(error, ValidationError):
        return refusal_of_fields(error.errors())
    if isinstance(error, ValueError):
        return Refusal(400, str(error), param=param, code="invalid_value")
    return failure_of(error)


def failure_of(error: BaseException) -> Refusal:
    """What a client is told of an error that is the server's own."""
    logger.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed at this; its log says why", code="internal_error")


def overloaded() -> Refusal:
    """As many are served as can be."""
    return Refusal(429, "too many requests wait; try again", code="overloaded", headers=RETRY_AFTER)


def unavailable(why: str, headers: Mapping[str, str] | None = None) -> Refusal:
    """Nobody is served now. `headers`: to be sent along."""
    return Refusal(503, why, code="unavailable", headers={**RETRY_AFTER, **(headers or {})})


def refusal_of_fields(errors: Any, given: Any = None, within: str = "") -> Refusal:
    """The first field that is not as it must be.

    Args:
        errors: pydantic's. given: what was checked, where it is known. within: what is before its name.
    """
    first = errors[0]
    missing, value = first["type"] == "missing", first.get("input")
    place = [str(part) for part in _place(first.get("loc", ()), given, missing)]
    param = f"{within}{'.'.join(place)}".rstrip(".") or None
    if missing:
        return Refusal(400, f"{param} is missing", param=param, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    shown = "" if value is None or isinstance(value, dict | list) else f", got {str(value)[:80]!r}"
    return Refusal(400, f"{param}: {message}{shown}" if param else message, param=param, code="invalid_value")


def _place(loc: Sequence[Any], given: Any, missing: bool) -> list[Any]:
    """Where a field is: names and numbers, without the kinds that pydantic tried where several would do."""
    if given is None:
        return [part for part in loc if part != "body"]
    place = []
    for number, part in enumerate(loc):
        if (isinstance(given, dict) and part in given) or (isinstance(given, list) and isinstance(part, int)):
            given = given[part]
        elif not missing or number < len(loc) - 1:
            continue
        place.append(part)
    return place


def answer(refusal: Refusal) -> JSONResponse:
    """A refusal as a response."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def handle_errors(app: FastAPI) -> None:
    """Have every error of an application answered in this form, those of the framework, too."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return answer(refusal_of(error))

    async def framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = _WORDS.get(error.status_code, str(error.detail))
        if error.status_code in _WORDS:
            message = f"{message}: {request.method} {request.url.path[:200]}"
        return answer(Refusal(error.status_code, message, headers=error.headers))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(refusal_of_fields(error.errors()))

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, invalid)

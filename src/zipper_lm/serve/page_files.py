"""`GET /`: a page to talk to the model. It is made of the files in `page/`, and fetches nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.gate import PAGE
from zipper_lm.serve.service import Service

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "permissions-policy": "microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked for anew each time: a server's page and its routes are of one version
}


def routes(service: Service) -> APIRouter:
    """The routes. What is served is read once, here: no path of a client is looked up on a disk."""
    router, found = APIRouter(), _found()

    def sent(request: Request, name: str) -> Response:
        if name not in found:
            raise Refusal(404, f"the page has no file {name[:80]!r}")
        content, kind = found[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, headers)
        return Response(content, headers=headers, media_type=kind)

    @router.get("/")
    async def page(request: Request) -> Response:
        """The page."""
        return sent(request, "index.html")

    @router.get(PAGE + "{name}")
    async def part(request: Request, name: str) -> Response:
        """What it is made of."""
        return sent(request, name)

    return router


def _found() -> dict[str, tuple[bytes, str]]:
    """The page's files by name: bytes, and media type."""
    folder = files("zipper_lm.serve") / "page"
    kinds = {file.name: KINDS.get(f".{file.name.rpartition('.')[2]}") for file in folder.iterdir()}
    return {name: ((folder / name).read_bytes(), f"{kind}") for name, kind in kinds.items() if kind is not None}

"""The application: every route, behind one gate."""

from __future__ import annotations

from fastapi import FastAPI

from zipper_lm import __version__
from zipper_lm.serve import chat, documents, facts, page_files, realtime, speech, transcription
from zipper_lm.serve.errors import handle_errors
from zipper_lm.serve.gate import Gate
from zipper_lm.serve.service import Service


def create_app(service: Service) -> FastAPI:
    """An ASGI application that serves one model. Pages of documentation, which would be fetched elsewhere, it has none;
    ``/openapi.json`` is there."""
    app = FastAPI(title="zipper", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    handle_errors(app)
    for room in (facts, page_files, transcription, speech, chat, documents, realtime):
        app.include_router(room.routes(service))
    app.add_middleware(Gate, service=service)
    return app

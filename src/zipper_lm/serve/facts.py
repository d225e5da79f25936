"""What a server says of itself: `GET /v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from zipper_lm.codecs.codec import can_decode
from zipper_lm.serve.metrics import CONTENT_TYPE
from zipper_lm.serve.service import Service


def routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Any:
        """The one model, as a list."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        """The model by its name."""
        service.check_model(name)
        return _model(service)

    @router.get("/health")
    async def health() -> Response:
        """Whether requests are served; 503 if not."""
        return JSONResponse({"status": service.state}, 200 if service.state == "ok" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    return router


def _model(service: Service) -> dict[str, Any]:
    """As OpenAI's clients parse it, and what the towers are."""
    model = service.model
    modalities = [
        {
            "name": name,
            "kind": service.kind(name),
            "written": service.codec(name) is not None and can_decode(service.codec(name)),
            "reads": [source for reader, source in model.layer_pairs if reader == name],
            "tower": model.config.tower_specs[name].train,
            "parameters": sum(p.numel() for p in model.tower(name).backbone.parameters()),
        }
        for name in model.names
    ]
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "zipper",
        "modalities": modalities,
    }

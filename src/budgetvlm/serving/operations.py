"""Routes for those who run the server: whether it lives and is ready, its figures, reading the controller anew."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.dispatcher import Dispatcher
from budgetvlm.serving.gate import Gate
from budgetvlm.serving.replicas import ReplicaError
from budgetvlm.serving.server_metrics import ServerMetrics


def operations_routes(jobs: Dispatcher, gate: Gate, metrics: ServerMetrics) -> APIRouter:
    """Make the routes."""
    router = APIRouter()

    def replicas() -> dict[str, int]:
        return {"replicas": len(jobs.replicas), "replicas_up": sum(one.up for one in jobs.replicas)}

    @router.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **replicas()}

    @router.get("/ready")
    async def ready() -> JSONResponse:
        is_ready = jobs.ready and not gate.draining
        return JSONResponse({"ready": is_ready, **replicas()}, 200 if is_ready else 503)

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/admin/reload")
    async def reload() -> dict[str, Any]:
        try:
            await jobs.reload()
        except ReplicaError:
            raise APIError(
                409, "the controller cannot be opened, and the one before goes on; the server's log says why",
                code="reload_failed",
            ) from None  # fmt: skip
        return {"status": "reloaded", **replicas()}

    return router

"""The playground's routes: its page, plain files of the package, and what would be chosen at any budget."""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.chat_schema import ChatRequest
from budgetvlm.serving.completions import error_of
from budgetvlm.serving.dispatcher import Dispatcher
from budgetvlm.serving.jobs import NO_BUDGET_MS
from budgetvlm.serving.requests import job_of
from budgetvlm.serving.serve_options import ServeOptions

TYPES = {
    "css": "text/css", "html": "text/html", "jpg": "image/jpeg", "js": "text/javascript", "svg": "image/svg+xml",
}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def playground_routes(options: ServeOptions, jobs: Dispatcher) -> APIRouter:
    """Make the routes. Who may see the page may not yet ask: its requests need the key that all others need."""
    folder = resources.files("budgetvlm.serving") / "playground"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    router = APIRouter(prefix="/playground", include_in_schema=False)

    @router.get("/{name}")
    async def page(name: str) -> Response:
        if name not in files:
            raise APIError(404, f"the playground has no file {name!r}")
        return Response(files[name], media_type=TYPES[name.rpartition(".")[2]], headers=HEADERS)

    @router.get("/")
    async def index() -> Response:
        return await page("index.html")

    @router.post("/preview")
    async def preview(request: Request, body: ChatRequest) -> dict[str, Any]:
        """See `budgetvlm.serving.preview.preview`; the body is that of a chat completion."""
        job = await asyncio.to_thread(job_of, body, None, request.scope["arrived_s"], options)
        job.kind, job.budget_ms = "preview", NO_BUDGET_MS  # who waits for an answer goes first
        if (len(job.messages), len(job.images)) != (1, 1):
            given = f"{len(job.messages)} messages with {len(job.images)} images"
            raise APIError(400, f"a preview is of one message with one image and a question, given {given}")
        event = await anext(jobs.submit(job).events())
        if event.kind != job.kind:
            raise error_of(event)
        found: dict[str, Any] = event.data["preview"]
        return found

    return router

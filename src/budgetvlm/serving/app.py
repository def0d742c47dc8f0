"""The server's routes: chat completions and the model's name; the others lie in files of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from budgetvlm._version import __version__
from budgetvlm.serving import completions
from budgetvlm.serving.access_log import AccessLog
from budgetvlm.serving.api_errors import APIError, respond
from budgetvlm.serving.chat_schema import ChatRequest, ErrorDocument
from budgetvlm.serving.dispatcher import Dispatcher, Ticket
from budgetvlm.serving.feedback_route import feedback_routes
from budgetvlm.serving.gate import Gate
from budgetvlm.serving.jobs import Event
from budgetvlm.serving.operations import operations_routes
from budgetvlm.serving.playground import playground_routes
from budgetvlm.serving.requests import BUDGET_HEADER, job_of, named_model
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.server_metrics import ServerMetrics

AT_ONCE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy such as nginx would keep pieces back


def make_app(options: ServeOptions, dispatcher: Dispatcher | None = None) -> FastAPI:
    """Make the application; its replicas start and end with it.

    Args:
        dispatcher: one with other replicas, for tests.
    """
    jobs = dispatcher or Dispatcher(options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await jobs.start()
        yield
        await jobs.close()

    app = FastAPI(
        title="BudgetVLM", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={"default": {"model": ErrorDocument, "description": "What went wrong."}},
    )  # fmt: skip
    app.state.gate = gate = Gate(options)
    metrics = ServerMetrics(options.served_name, jobs, gate)
    app.add_middleware(gate.before)
    app.add_middleware(AccessLog(metrics, options.access_log, texts=options.log_texts).around)
    for kind in (APIError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)

    app.include_router(operations_routes(jobs, gate, metrics))
    app.include_router(feedback_routes(jobs.store))

    model = {"id": options.served_name, "object": "model", "created": int(time.time()), "owned_by": "budgetvlm"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model | jobs.model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        named_model(name, options)
        return model | jobs.model | {"id": name}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        arrived_s: float = request.scope["arrived_s"]
        job = await asyncio.to_thread(job_of, body, request.headers.get(BUDGET_HEADER), arrived_s, options)
        request.scope["visit"].job = job
        ticket = jobs.submit(job)
        leaving = asyncio.create_task(_watch(request, ticket))
        try:
            if not body.stream:
                document, headers = await completions.complete(ticket, body.model)
                return JSONResponse(document, headers=headers)
            first = await completions.first_event(ticket)
        finally:
            leaving.cancel()
        usage = bool(body.stream_options and body.stream_options.include_usage)
        pieces = _until_gone(ticket, body.model, first, usage)
        return StreamingResponse(pieces, media_type="text/event-stream", headers=AT_ONCE)

    if options.playground:
        app.include_router(playground_routes(options, jobs))
    return app


async def _until_gone(ticket: Ticket, model: str, first: Event, usage: bool) -> AsyncIterator[str]:
    """Stream until the end, or until the client leaves: then work on its job stops."""
    done = False
    try:
        async for line in completions.stream(ticket, model, first, usage):
            yield line
        done = True
    finally:
        if not done:
            await ticket.leave()


async def _watch(request: Request, ticket: Ticket) -> None:
    """Wait until a client leaves to whom nothing was said yet."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    await ticket.leave()

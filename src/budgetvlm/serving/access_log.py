"""What is kept of each request: a line of JSON, counts, and a span. Images never, texts only where it is asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from budgetvlm.errors import ConfigError
from budgetvlm.serving import tracing
from budgetvlm.serving.jobs import Job, Visit
from budgetvlm.serving.server_metrics import ServerMetrics

STANDARD_OUTPUT = Path("-")
PROBES = {"/health", "/ready", "/metrics"}  # not logged as long as all is well
LEFT = 499  # status in the log of a request whose client left before there was one


class AccessLog:
    """An ASGI middleware around everything else.

    Args:
        file: takes the lines; `STANDARD_OUTPUT`, or None: no lines. It may be moved away while it is written.
        texts: whether lines hold what was asked and answered.
    """

    def __init__(self, metrics: ServerMetrics, file: Path | None = None, *, texts: bool = False) -> None:
        self._metrics, self._texts = metrics, texts
        self._lines = logging.Logger("budgetvlm.access")
        if file is not None:
            self._lines.addHandler(_lines_to(file))

    def around(self, app: ASGIApp) -> AccessLog:
        """Put it around an application."""
        self._app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_s, status, name = time.perf_counter(), LEFT, f"req-{uuid.uuid4().hex}"
        scope["visit"] = visit = Visit()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            status, visit.error = 500, "internal_error"
            raise
        finally:
            self._note(scope, name, status, time.perf_counter() - begin_s)

    def _note(self, scope: Scope, name: str, status: int, took_s: float) -> None:
        visit: Visit = scope["visit"]
        job = visit.job
        self._metrics.requested(scope["method"], scope["path"], status, visit.error)
        if job and job.left:
            self._metrics.left()
        if job and job.outcome:
            self._metrics.answered(job.outcome)
        if job:
            tracing.record(scope, job, status, took_s)
        if self._lines.handlers and not (scope["path"] in PROBES and status == 200):
            line = _line(scope, name, status, took_s) | (_of_job(job, self._texts) if job else {})
            self._lines.info(json.dumps(line, ensure_ascii=False))


def _lines_to(file: Path) -> logging.Handler:
    """What writes lines into a file. Raises ConfigError."""
    if file == STANDARD_OUTPUT:
        return logging.StreamHandler(sys.stdout)
    try:
        return WatchedFileHandler(file, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"access_log={file} cannot be written: {error.strerror or error}; give a file in a directory that is there"
        ) from None


def _line(scope: Scope, name: str, status: int, took_s: float) -> dict[str, Any]:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "request": name,
        "client": (scope.get("client") or ("",))[0], "method": scope["method"], "path": scope["path"],
        "status": status, "ms": round(took_s * 1e3, 3),
    }  # fmt: skip
    return line | ({"error": scope["visit"].error} if scope["visit"].error else {})


def _of_job(job: Job, texts: bool) -> dict[str, Any]:
    """What a completion's line holds beside that of any request."""
    outcome = job.outcome or {}
    names = (
        "setting", "latency_ms", "predicted_ms", "queue_ms", "budget_met", "feasible", "price", "finish_reason",
        "num_vision_tokens", "num_language_tokens", "num_output_tokens",
    )  # fmt: skip
    line = {"id": job.id, "budget_ms": job.given_budget_ms, "images": [image.size for image in job.images]}
    line |= {name: outcome[name] for name in names if name in outcome} | ({"client_left": True} if job.left else {})
    return line | ({"messages": job.messages, "answer": job.answer} if texts else {})

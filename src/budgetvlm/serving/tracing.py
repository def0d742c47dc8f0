"""Spans of completions for OpenTelemetry, where it is installed: one for the request and one for each of its stages."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import Scope

from budgetvlm._extras import installed
from budgetvlm.serving.jobs import Job

AVAILABLE = installed("opentelemetry") and installed("opentelemetry.trace")


def record(scope: Scope, job: Job, status: int, took_s: float) -> None:
    """Record a completion that is over; its stages are laid end to end."""
    if not AVAILABLE:
        return
    from opentelemetry import propagate, trace

    end = time.time_ns()
    begin, tracer = end - int(took_s * 1e9), trace.get_tracer("budgetvlm.serving")
    came_from = propagate.extract(dict(Headers(scope=scope)))
    span = tracer.start_span(f"POST {scope['path']}", came_from, trace.SpanKind.SERVER, start_time=begin)
    if span.is_recording():
        outcome = job.outcome or {}
        span.set_attribute("http.response.status_code", status)
        for name in ("budget_ms", "budget_met", "latency_ms", "price", "num_output_tokens"):
            if outcome.get(name) is not None:
                span.set_attribute(f"budgetvlm.{name}", outcome[name])
        stages_ms = {"queue": outcome["queue_ms"], **outcome["stages_ms"]} if outcome else {}
        at = begin
        for stage, stage_ms in stages_ms.items():
            child = tracer.start_span(stage, trace.set_span_in_context(span), start_time=at)
            at += int(stage_ms * 1e6)
            child.end(at)
    span.end(end)

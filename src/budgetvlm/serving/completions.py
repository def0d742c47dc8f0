"""From what a replica says to what a client of OpenAI's API reads: one document, or a stream of events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.dispatcher import Ticket
from budgetvlm.serving.jobs import Event, setting_text
from budgetvlm.serving.reasons import why

ERRORS = {
    "InputError": (400, "invalid_request"), "ConfigError": (400, "invalid_request"),
    "KnobSpaceError": (400, "invalid_request"), "NotReady": (503, "not_ready"),
    "ReplicaDied": (503, "replica_died"), "ClientLeft": (499, "client_left"),
    "EngineError": (503, "engine_failed"),
    "InfeasibleError": (503, "expired"), "InternalError": (500, "internal_error"),
}  # fmt: skip
RETRY_AFTER_S = 1.0
PRICE_DIGITS = 6
FINISH = {"stop": "stop", "length": "length", "budget": "length", "stopped": "stop"}  # OpenAI's own words


async def complete(ticket: Ticket, model: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Wait for the answer; returns the document and the headers. Raises APIError."""
    async for event in ticket.events():
        if event.kind == "answer":
            answer = event.data["answer"]
            said = {"role": "assistant", "content": answer["answer"], "refusal": None}
            choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": FINISH[answer["finish_reason"]]}
            document = _document(ticket, model, "chat.completion", [choice])
            compliance = compliance_of(answer, ticket)
            return document | {"usage": _usage(answer), "budgetvlm": compliance}, headers_of(compliance)
        if event.is_last:
            raise error_of(event)
    raise AssertionError("a job ended without a last event")


async def stream(ticket: Ticket, model: str, first: Event, include_usage: bool) -> AsyncIterator[str]:
    """Yield the answer's events as they come, the last with what became of the budget."""

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _document(ticket, model, "chat.completion.chunk", [choice]) | ({"usage": None} if include_usage else {})

    yield _line(chunk({"role": "assistant", "content": ""}))
    async for event in _from(first, ticket):
        if event.kind == "text":
            yield _line(chunk({"content": event.data["text"]}))
        elif event.kind == "answer":
            answer = event.data["answer"]
            yield _line(chunk({}, FINISH[answer["finish_reason"]]) | {"budgetvlm": compliance_of(answer, ticket)})
            if include_usage:
                yield _line(_document(ticket, model, "chat.completion.chunk", []) | {"usage": _usage(answer)})
        else:
            # clients look for "error" in the data, and load generators for the event's name
            yield "event: error\n" + _line(error_of(event).document)
    yield "data: [DONE]\n\n"


async def first_event(ticket: Ticket) -> Event:
    """Wait for the first event, so that what fails before it still gets a status code of its own. Raises APIError."""
    event = await anext(ticket.events())
    if event.kind not in ("text", "answer"):
        raise error_of(event)
    return event


def compliance_of(answer: dict[str, Any], ticket: Ticket) -> dict[str, Any]:
    """The field "budgetvlm" of an answer: its setting, its times, whether its budget was kept and why."""
    names = (
        "setting", "stages_ms", "latency_ms", "predicted_ms", "budget_ms", "budget_met", "feasible", "finish_reason",
        "num_vision_tokens", "num_language_tokens", "num_output_tokens", "num_hurried_tokens", "extrapolated",
    )  # fmt: skip
    started_s = ticket.started_s or ticket.job.arrived_s
    waited_ms = (started_s - ticket.job.arrived_s) * 1e3
    price = None if ticket.job.price is None else round(ticket.job.price, PRICE_DIGITS)
    said = {"queue_ms": waited_ms, "price": price, "why": why(answer, ticket.job, waited_ms)}
    outcome = {name: answer[name] for name in names} | said
    ticket.job.outcome, ticket.job.answer = outcome, answer["answer"]
    return outcome


def headers_of(compliance: dict[str, Any]) -> dict[str, str]:
    """The same in short, for programs that read no body."""
    met = "" if compliance["budget_ms"] is None else str(compliance["budget_met"]).lower()
    return {
        "X-BudgetVLM-Setting": setting_text(compliance["setting"]),
        "X-BudgetVLM-Latency-Ms": f"{compliance['latency_ms']:.3f}",
        "X-BudgetVLM-Budget-Met": met or "none",
    }


def error_of(event: Event) -> APIError:
    """What a client is told of a job that failed."""
    status, code = ERRORS.get(event.data["type"], (event.data.get("status", 500), event.data["type"]))
    retry_after_s = event.data.get("retry_after_s", RETRY_AFTER_S if status == 503 else None)
    return APIError(status, event.data["message"], code=code, retry_after_s=retry_after_s)


async def _from(first: Event, ticket: Ticket) -> AsyncIterator[Event]:
    yield first
    if not first.is_last:
        async for event in ticket.events():
            yield event


def _document(ticket: Ticket, model: str, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": ticket.job.id, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def _usage(answer: dict[str, Any]) -> dict[str, Any]:
    prompt, written = answer["num_vision_tokens"] + answer["num_language_tokens"], answer["num_output_tokens"]
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"image_tokens": answer["num_vision_tokens"], "cached_tokens": 0},
    }  # fmt: skip


def _line(document: dict[str, Any]) -> str:
    """An event; all but ASCII is escaped, because some clients take U+2028 or U+0085 in it for the end of a line."""
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"

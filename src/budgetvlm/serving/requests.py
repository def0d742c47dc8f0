"""From the body of a chat completion to a job: its budget, its messages, its images decoded."""

from __future__ import annotations

import re
import uuid
from typing import Any

from budgetvlm._io import shortened
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.chat_schema import ChatRequest, ImagePart, Message
from budgetvlm.serving.image_files import ImageReader
from budgetvlm.serving.jobs import NO_BUDGET_MS, Job
from budgetvlm.serving.serve_options import ServeOptions

BUDGET_HEADER = "x-latency-budget-ms"
_NAME_WITH_BUDGET = re.compile(r"(?P<name>.+)@(?P<budget>\d+(\.\d+)?)ms")
# What of OpenAI's fields changes the answer and cannot be honoured, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "logprobs": (None, False), "top_logprobs": (None, 0), "echo": (None, False),
    "tools": (None, []), "functions": (None, []), "response_format": (None, {"type": "text"}), "audio": (None,),
    "modalities": (None, ["text"]), "logit_bias": (None, {}), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}  # fmt: skip


def job_of(body: ChatRequest, header_budget: str | None, arrived_s: float, options: ServeOptions) -> Job:
    """Make the job of a request; decoding its images takes a while. Raises APIError."""
    named_ms = named_model(body.model, options)
    max_new_tokens = _checked(body, options)
    reader = ImageReader(options)
    messages = [_message(message, reader) for message in body.messages]
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    budgets = body.latency_budget_ms, _budget(header_budget, BUDGET_HEADER), named_ms, options.budget_ms, NO_BUDGET_MS
    return Job(
        f"chatcmpl-{uuid.uuid4().hex}", messages, reader.decoded(), arrived_s,
        budget_ms=next(budget for budget in budgets if budget is not None), price=body.price,
        max_new_tokens=max_new_tokens, stop=stop, streams=bool(body.stream),
        when_infeasible=body.when_infeasible or options.when_infeasible, cut=body.cut or "always",
        setting=body.setting,
    )  # fmt: skip


def _checked(body: ChatRequest, options: ServeOptions) -> int:
    """Check what needs no image; returns the longest answer, in tokens. Raises APIError."""
    extra = body.model_extra or {}
    for name, harmless in UNSUPPORTED.items():
        if name in extra and extra[name] not in harmless:
            raise APIError(400, f"{name} is not supported by this server", code="unsupported_value", param=name)
    contents = [message.content for message in body.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts = [content for content in contents if isinstance(content, str)]
    length = sum(map(len, texts)) + sum(len(part.text) for part in parts if not isinstance(part, ImagePart))
    if length > options.max_text:
        raise APIError(
            400, f"the messages have {length:,} characters, more than {options.max_text:,}",
            code="context_length_exceeded", param="messages",
        )  # fmt: skip
    tokens = body.max_completion_tokens or body.max_tokens or options.max_new_tokens
    if tokens > options.max_tokens:
        raise APIError(400, f"max_tokens is {tokens}, more than {options.max_tokens}", param="max_tokens")
    return tokens


def named_model(text: str, options: ServeOptions) -> float | None:
    """Check that a name such as "reference@300ms" is the model's; returns the budget in it. Raises APIError."""
    found = _NAME_WITH_BUDGET.fullmatch(text) if text != options.served_name else None
    name, budget_ms = (found["name"], _budget(found["budget"], "model")) if found else (text, None)
    if name != options.served_name:
        raise APIError(
            404, f"the model {shortened(name)!r} does not exist; this server has {options.served_name!r}",
            code="model_not_found", param="model",
        )  # fmt: skip
    return budget_ms


def _budget(text: str | None, param: str) -> float | None:
    """Read a budget of a header or a name. Raises APIError."""
    if text is None:
        return None
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < NO_BUDGET_MS:
        raise APIError(400, f"the budget in {param} is {shortened(text)!r}; give a positive number of ms", param=param)
    return budget


def _message(message: Message, reader: ImageReader) -> dict[str, Any]:
    """A message with its images taken out and numbered."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            parts.append({"type": "image", "image": reader.add(part.image_url.url)})
        else:
            parts.append({"type": "text", "text": part.text})
    return {"role": role, "content": parts}

"""From the body of a chat completion to a job: its budget, its messages, its images decoded."""

from __future__ import annotations

import base64
import binascii
import re
import uuid
from typing import Any

from PIL import Image

from budgetvlm._io import open_image
from budgetvlm.errors import InputError
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.chat_schema import ChatRequest, ImagePart, Message
from budgetvlm.serving.jobs import NO_BUDGET_MS, Job
from budgetvlm.serving.serve_options import ServeOptions

BUDGET_HEADER = "x-latency-budget-ms"
_NAME_WITH_BUDGET = re.compile(r"(?P<name>.+)@(?P<budget>\d+(\.\d+)?)ms")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


def job_of(body: ChatRequest, header_budget: str | None, arrived_s: float, options: ServeOptions) -> Job:
    """Make the job of a request; decoding its images takes a while. Raises APIError."""
    name, named_ms = _model_and_budget(body.model)
    if name != options.served_name:
        raise APIError(
            404, f"the model {name!r} does not exist; this server has {options.served_name!r}",
            code="model_not_found", param="model",
        )  # fmt: skip
    images: list[Image.Image] = []
    messages = [_message(message, images) for message in body.messages]
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    budgets = body.latency_budget_ms, _budget(header_budget), named_ms, options.budget_ms, NO_BUDGET_MS
    return Job(
        f"chatcmpl-{uuid.uuid4().hex}", messages, images, arrived_s,
        budget_ms=next(budget for budget in budgets if budget is not None), price=body.price,
        max_new_tokens=body.max_completion_tokens or body.max_tokens or options.max_new_tokens, stop=stop,
        when_infeasible=body.when_infeasible or options.when_infeasible, cut=body.cut,
    )  # fmt: skip


def _model_and_budget(name: str) -> tuple[str, float | None]:
    """Part "reference@300ms" into the model's name and a budget."""
    found = _NAME_WITH_BUDGET.fullmatch(name)
    return (found["name"], float(found["budget"])) if found else (name, None)


def _budget(text: str | None) -> float | None:
    """Read the header's budget. Raises APIError."""
    if text is None:
        return None
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < NO_BUDGET_MS:
        raise APIError(
            400, f"the header {BUDGET_HEADER} is {text!r}; give a positive number of ms", param=BUDGET_HEADER
        )
    return budget


def _message(message: Message, images: list[Image.Image]) -> dict[str, Any]:
    """A message with its images taken out and numbered."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            parts.append({"type": "image", "image": len(images)})
            images.append(_decoded(part.image_url.url))
        else:
            parts.append({"type": "text", "text": part.text})
    return {"role": role, "content": parts}


def _decoded(url: str) -> Image.Image:
    """Decode the image of a data URL. Raises APIError."""
    found = _DATA_URL.match(url)
    if not found:
        raise APIError(400, "image_url must be a data URL such as data:image/png;base64,...", code="invalid_image_url")
    try:
        return open_image(base64.b64decode(url[found.end() :], validate=True))
    except (binascii.Error, InputError) as error:
        raise APIError(400, f"an image cannot be read: {error}", code="invalid_image") from None

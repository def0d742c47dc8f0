"""The body of a chat completion: OpenAI's fields that are honoured, and those of this server."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class ImageURL(_Open):
    """Where an image is: a data URL."""

    url: str


class TextPart(_Open):
    """Text within a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Open):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Open):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(_Open):
    """What a stream tells beside the text."""

    include_usage: bool = False


class ChatRequest(_Open):
    """Body of POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    latency_budget_ms: float | None = Field(None, gt=0, description="time for the whole request, in ms")
    price: float | None = Field(None, ge=0, description="accuracy given for one latency of the full setting")
    when_infeasible: Literal["fastest", "reject", "best_effort"] | None = None
    cut: Literal["always", "needed"] = "always"

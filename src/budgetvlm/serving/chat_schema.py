"""The body of a chat completion: OpenAI's fields that are honoured, and those of this server."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _whole_characters(text: str) -> str:
    """Raise ValueError for half of a character (a lone surrogate), which JSON can hold and no tokenizer takes."""
    if not text.isascii():  # images are, and need no second look
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is half of one") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class ImageURL(_Open):
    """Where an image is: a data URL, or an address of a host that the server's owner allowed."""

    url: Text


class TextPart(_Open):
    """Text within a message."""

    type: Literal["text"]
    text: Text


class ImagePart(_Open):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Open):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class StreamOptions(_Open):
    """What a stream tells beside the text."""

    include_usage: bool | None = False


class ChatRequest(_Open):
    """Body of POST /v1/chat/completions."""

    model: Text
    messages: list[Message] = Field(min_length=1, max_length=1000)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    latency_budget_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="time for the whole request, in ms"
    )
    price: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="accuracy given for one latency of the full setting"
    )
    when_infeasible: Literal["fastest", "reject", "best_effort"] | None = None
    cut: Literal["always", "needed"] | None = None
    setting: dict[Text, int | float] | None = Field(
        None, description="values of some knobs, the others at their largest: answered there, whatever it takes"
    )


class ErrorBody(BaseModel):
    """What went wrong, as OpenAI words it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(BaseModel):
    """The body of every response with a status of 400 or more."""

    error: ErrorBody

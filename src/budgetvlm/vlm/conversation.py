"""Chat messages as OpenAI's clients write them, checked: who says what, with which images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from budgetvlm._io import open_image
from budgetvlm.errors import InputError

ROLES = "system", "user", "assistant"
IMAGE = {"type": "image"}

Messages = Sequence[Mapping[str, Any]]

Turn = dict[str, Any]
"""As chat templates read it: "role" and "content", a list of `IMAGE` and of {"type": "text", "text": ...}."""


@dataclass(frozen=True)
class Conversation:
    """Messages without what is wrong with them.

    Attributes:
        turns: with images left out, whose places stay.
        images: in their order.
        question: the text of the last message, which is the user's.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...]
    question: str

    @property
    def is_plain(self) -> bool:
        """Whether this is one image and then one question about it, and nothing else."""
        return self.turns == one_question(self.question)


def one_question(question: str) -> tuple[Turn, ...]:
    """Return the turns of one image and then one question about it."""
    return ({"role": "user", "content": [IMAGE, {"type": "text", "text": question}]},)


def read_messages(messages: Messages) -> Conversation:
    """Check chat messages and open their images.

    Args:
        messages: {"role": "system", "user" or "assistant", "content": a text, or a list of parts {"type": "text",
            "text": ...} and, in messages of the user, {"type": "image", "image": an image or its file}}.

    Raises InputError: names all that is wrong.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            f'messages={messages!r:.80} is no list of messages; give [{{"role": "user", "content": "..."}}]'
        )
    images: list[Image.Image] = []
    problems: list[str] = []
    turns = tuple(_turn(i, message, images, problems) for i, message in enumerate(messages))
    last = turns[-1]
    question = "\n".join(part["text"] for part in last["content"] if part["type"] == "text")
    if not problems and (last["role"] != "user" or not question.strip()):
        problems.append("the last message has to be the user's and to ask something in words")
    if problems:
        raise InputError("messages cannot be answered: " + "; ".join(problems))
    return Conversation(turns, tuple(images), question)


def _turn(number: int, message: Any, images: list[Image.Image], problems: list[str]) -> Turn:
    """Check one message; its images and what is wrong with it are added to these lists."""
    where = f"messages[{number}]"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        problems.append(f'{where} needs a "role" of {", ".join(ROLES)}, and is {message!r:.80}')
        return {"role": "", "content": []}
    role, content = message["role"], message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not parts:
        problems.append(f'{where} needs a "content", a text or a list of parts, and has {content!r:.80}')
        return {"role": role, "content": []}
    kept = []
    for i, part in enumerate(parts):
        try:
            kept.append(_part(part, role, images))
        except InputError as error:
            problems.append(f"{where}, part {i}: {error}")
    return {"role": role, "content": kept}


def _part(part: Any, role: str, images: list[Image.Image]) -> dict[str, str]:
    """Check one part of a message. Raises InputError."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image" and role == "user":
        images.append(open_image(part.get("image")))
        return IMAGE
    if kind == "image":
        raise InputError(f"an image in a message of the {role}; only the user shows images")
    raise InputError(
        'a part is {"type": "text", "text": ...} or {"type": "image", "image": an image or its file}, not '
        f"{part!r:.80}"
    )

"""Chat messages as OpenAI's clients write them, checked: who says what, with which images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from budgetvlm._io import open_image
from budgetvlm.errors import InputError
from budgetvlm.vlm.prompt import IMAGE, one_question
from budgetvlm.vlm.protocol import Conversation, Turn

ROLES = "system", "user", "assistant"

Messages = Sequence[Mapping[str, Any]]


def text_part(text: str) -> dict[str, str]:
    """Return a part of a message."""
    return {"type": "text", "text": text}


def about(image: Image.Image, question: str) -> Conversation:
    """Return the conversation of one image and then one question."""
    return Conversation(one_question(question), (image,), question)


def is_plain(conversation: Conversation) -> bool:
    """Tell whether this is one image and then one question about it, and nothing else."""
    return conversation.turns == one_question(conversation.question)


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
    parts = [text_part(content)] if isinstance(content, str) else content
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
        return text_part(part["text"])
    if kind == "image" and role == "user":
        images.append(open_image(part.get("image")))
        return IMAGE
    if kind == "image":
        raise InputError(f"an image in a message of the {role}; only the user shows images")
    raise InputError(
        'a part is {"type": "text", "text": ...} or {"type": "image", "image": an image or its file}, not '
        f"{part!r:.80}"
    )

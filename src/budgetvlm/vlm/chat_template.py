"""Prompts that a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.vlm.prompt import IMAGE, Writer, one_question
from budgetvlm.vlm.protocol import Turn
from budgetvlm.vlm.special_tokens import BEGIN, MARK


def chat_writer(tokenizer: Any, placeholder: str) -> Writer:
    """Return what writes the tokenizer's chat template, in which a placeholder stands for an image.

    Raises ConfigError: there is no chat template, or it does not hold one image and then one question.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, and knobs.json has no prompt; add one to the model's directory, for "
            'example "prompt": "<img>{image}</img>{question}"'
        )
    start, end = (getattr(tokenizer, f"{side}_image_token", None) or "" for side in ("start", "end"))
    mark = re.compile(f"(?<!{BEGIN}){re.escape(placeholder)}")  # where the user names it, it is plain text

    def render(turns: Sequence[Turn]) -> str:
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def write(turns: Sequence[Turn]) -> list[str]:
        try:
            texts = mark.split(render(turns))
        except Exception as error:  # templates raise errors of their own, or fail at what they do not expect
            raise InputError(f"the model's chat template refuses these messages: {error}; change them") from None
        wanted = sum(turn["content"].count(IMAGE) for turn in turns)
        if len(texts) - 1 != wanted:
            raise InputError(
                f"of the messages' images the model's chat template shows {len(texts) - 1} instead of {wanted}; "
                f"change the messages, and leave out {placeholder!r}, by which it marks images"
            )
        edges = [(end if i else "", start if i < wanted else "") for i in range(len(texts))]
        return [f"{before}{text}{after}" for text, (before, after) in zip(texts, edges, strict=True)]

    text = render(one_question(MARK))
    if text.count(placeholder) != 1 or text.count(MARK) != 1 or text.index(MARK) < text.index(placeholder):
        raise ConfigError(
            f"the chat template does not hold one image and then one question: {text!r}; add a prompt to knobs.json"
        )
    return write


def behind_images(write: Writer, change: Callable[[str], str]) -> Writer:
    """Return what writes the same, with each text behind an image changed."""

    def changed(turns: Sequence[Turn]) -> list[str]:
        first, *others = write(turns)
        return [first, *map(change, others)]

    return changed

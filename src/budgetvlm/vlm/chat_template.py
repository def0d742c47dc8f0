"""Prompts that a chat template writes."""

from __future__ import annotations

from typing import Any

from budgetvlm.errors import ConfigError
from budgetvlm.vlm.prompt import MARK, Writer


def chat_writer(tokenizer: Any, placeholder: str) -> Writer:
    """Return what writes the tokenizer's chat template, in which a placeholder stands for the image.

    Raises ConfigError: there is no chat template, or it does not hold one image and then one question.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, and knobs.json has no prompt; add one to the model's directory, for "
            'example "prompt": "<img>{image}</img>{question}"'
        )
    start, end = (getattr(tokenizer, f"{side}_image_token", None) or "" for side in ("start", "end"))

    def render(question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        said = [{"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))

    def write(question: str) -> tuple[str, str]:
        before, _, behind = render(question).partition(placeholder)
        return f"{before}{start}", f"{end}{behind}"

    text = render(MARK)
    if text.count(placeholder) != 1 or text.count(MARK) != 1 or text.index(MARK) < text.index(placeholder):
        raise ConfigError(
            f"the chat template does not hold one image and then one question: {text!r}; add a prompt to knobs.json"
        )
    return write

"""The text around the image and the question, as token ids.

A prompt is a template with `{image}` and `{question}`, for example `<img>{image}</img>{question}<a>`. Small models
bring theirs in `knobs.json`; others have a chat template in their tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from budgetvlm.errors import ConfigError, InputError

_MARK = "QUESTION"
_KEPT = 64  # questions whose tokens are kept: one request asks for them several times


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt: ``before``, the image's tokens, ``between``, the question's tokens, ``after``."""

    tokenizer: Any
    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    _kept: dict[str, tuple[tuple[int, ...], np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_template(cls, tokenizer: Any, template: str) -> Prompt:
        """Split a template into its fixed parts.

        Raises:
            ConfigError: `{image}` and `{question}` do not both occur once, in this order.
        """
        before, image, rest = template.partition("{image}")
        between, question, after = rest.partition("{question}")
        if not image or not question or "{image}" in rest or "{question}" in before + after:
            raise ConfigError(
                f"the prompt {template!r} cannot be used: it needs {{image}} once and then {{question}} once, "
                "for example '<img>{image}</img>{question}'"
            )
        encoded = (tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, between, after))
        return cls(tokenizer, *encoded)

    @property
    def num_fixed(self) -> int:
        """Tokens that every prompt has."""
        return len(self.before) + len(self.between) + len(self.after)

    def around(self, question_ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids in front of the image and behind it."""
        return self.before, (*self.between, *question_ids, *self.after)

    def question_ids(self, question: str) -> list[int]:
        """Token ids of a question; names of special tokens in it are plain text.

        Raises:
            InputError: the question is not text, or is empty.
        """
        return list(self._asked(question)[0])

    def question_array(self, question: str) -> np.ndarray:
        """`question_ids` as int64 ``[T]``, not to be written into."""
        return self._asked(question)[1]

    def _asked(self, question: str) -> tuple[tuple[int, ...], np.ndarray]:
        """A question's ids, as both types."""
        kept = self._kept.get(question) if isinstance(question, str) else None
        if kept is not None:
            return kept
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"the question is empty ({question!r}); ask something about the image")
        ids = self.tokenizer.encode(question.strip(), add_special_tokens=False, split_special_tokens=True)
        if not ids:
            raise InputError(f"the question {question!r} holds no token that the model knows; ask in words")
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        self._kept[question] = made = tuple(ids), np.array(ids, dtype=np.int64)
        return made


def chat_template(tokenizer: Any, placeholder: str) -> str:
    """The tokenizer's chat template for one image and one question, as a template with `{image}` and `{question}`.

    Args:
        placeholder: what stands for the image in the rendered template.

    Raises:
        ConfigError: there is no chat template, or it does not hold one image and one question.
    """
    content = [{"type": "image"}, {"type": "text", "text": _MARK}]
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, and knobs.json has no prompt; add one to the model's directory, for "
            'example "prompt": "<img>{image}</img>{question}"'
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    if text.count(placeholder) != 1 or text.count(_MARK) != 1:
        raise ConfigError(
            f"the chat template does not hold one image and one question: {text!r}; add a prompt to knobs.json"
        )
    start, end = (getattr(tokenizer, f"{side}_image_token", "") for side in ("start", "end"))
    return str(text).replace(placeholder, f"{start}{{image}}{end}").replace(_MARK, "{question}")

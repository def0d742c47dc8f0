"""A prompt: the text around the image and the question as token ids, their embeddings, and what the decoder is told.

The text is a template with `{image}` and `{question}`, for example `<img>{image}</img>{question}<a>`. Small models
bring theirs in `knobs.json`; others have a chat template in their tokenizer.
Shapes: B prompts of a batch, T tokens, V visual tokens, C channels of the language model, D levels of deepstack
features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from budgetvlm.errors import ConfigError, InputError

_MARK = "QUESTION"
_QUESTION_CACHE_LIMIT = 64  # one request asks for the tokens of its question several times


class Prompt:
    """The fixed text of a prompt: ``before``, the image's tokens, ``between``, the question's tokens, ``after``.

    Args:
        tokenizer: a tokenizer of Transformers.
        before, between, after: token ids.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], between: Sequence[int], after: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.before, self.between, self.after = tuple(before), tuple(between), tuple(after)
        self._tokenized = lru_cache(_QUESTION_CACHE_LIMIT)(self._tokenize)

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
        return cls(tokenizer, *(tokenizer.encode(part, add_special_tokens=False) for part in (before, between, after)))

    def question_ids(self, question: str) -> np.ndarray:
        """Return the token ids of a question, int64 ``[T]``, read-only; names of special tokens in it are plain text.

        Raises:
            InputError: the question is not text, or is empty.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"the question is empty ({question!r}); ask something about the image")
        return self._tokenized(question)

    def num_text_tokens(self, question: str) -> int:
        """Return the number of the prompt's tokens beside those of the image."""
        return len(self.before) + len(self.between) + len(self.question_ids(question)) + len(self.after)

    def _tokenize(self, question: str) -> np.ndarray:
        ids = self.tokenizer.encode(question.strip(), add_special_tokens=False, split_special_tokens=True)
        if not ids:
            raise InputError(f"the question {question!r} holds no token that the model knows; ask in words")
        array = np.array(ids, dtype=np.int64)
        array.setflags(write=False)
        return array


def chat_template(tokenizer: Any, placeholder: str) -> str:
    """Turn the tokenizer's chat template into a template with `{image}` and `{question}`.

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


def repeated(ids: Sequence[int], placeholder: int, count: int) -> tuple[int, ...]:
    """Return ids in which the placeholder stands ``count`` times wherever it stood once."""
    return tuple(i for one in ids for i in [one] * (count if one == placeholder else 1))


@dataclass(frozen=True)
class ImageLayout:
    """How one image stands in the prompt at one `max_crops`.

    Attributes:
        ids: its token ids; the family's placeholder stands for each visual token.
        visual: which of ``ids`` are visual tokens; None: all of them.
        grid: rows and columns of its tiles or patches; (0, 0) where it is not cut.
        size: height and width of the image in pixels.
        order: for each visual token, the index of its feature; None: they are in the features' order.
    """

    ids: tuple[int, ...]
    visual: tuple[bool, ...] | None = None
    grid: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    order: tuple[int, ...] | None = None

    @classmethod
    def of(cls, ids: Iterable[int], placeholder: int, grid: tuple[int, int], size: tuple[int, int]) -> ImageLayout:
        """Make the layout of ids of which those that are the placeholder's are visual tokens."""
        ids = tuple(ids)
        return cls(ids, tuple(i == placeholder for i in ids), grid, size)

    @property
    def num_visual(self) -> int:
        """V, the number of visual tokens."""
        return len(self.ids) if self.visual is None else sum(self.visual)


@dataclass(frozen=True)
class EmbeddedPrompt:
    """One prompt, ready for the decoder.

    Attributes:
        embeddings: ``[T, C]``.
        token_ids: T ids; placeholders stand for visual tokens.
        start: index of the image's first token.
        layout: how the image stands in the prompt.
        deepstack: features added behind the first D blocks, ``[V, D, C]``; None where the family has none.
    """

    embeddings: torch.Tensor
    token_ids: tuple[int, ...]
    start: int
    layout: ImageLayout
    deepstack: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def image_mask(self) -> torch.Tensor:
        """Return True at the image's tokens, its text and marks included, ``[T]``."""
        mask = torch.zeros(len(self), dtype=torch.bool, device=self.embeddings.device)
        mask[self.start : self.start + len(self.layout.ids)] = True
        return mask

    def visual_mask(self) -> torch.Tensor:
        """Return True at visual tokens, ``[T]``."""
        mask = self.image_mask()
        if self.layout.visual is not None:
            mask[mask.clone()] = torch.tensor(self.layout.visual, device=mask.device)
        return mask


class PromptEmbedder:
    """Puts text and visual tokens together.

    Args:
        prompt: the fixed text.
        table: the module that embeds token ids.
        deepstack_levels: D.
        adds_features: visual features are added to the embeddings of their placeholders instead of replacing them.
    """

    def __init__(self, prompt: Prompt, table: nn.Module, deepstack_levels: int, adds_features: bool) -> None:
        self._prompt, self._table = prompt, table
        self._parts, self._adds_features = 1 + deepstack_levels, adds_features

    def __call__(
        self, visual: torch.Tensor, question_ids: np.ndarray, layout: ImageLayout, answer_ids: Sequence[int] = ()
    ) -> EmbeddedPrompt:
        """Embed the prompt of one image and question, and what of an answer is there already."""
        before = self._prompt.before
        after = (*self._prompt.between, *question_ids.tolist(), *self._prompt.after, *answer_ids)
        ids, start = (*before, *layout.ids, *after), len(before)
        tokens, deepstack = visual, None
        if self._parts > 1:
            by_level = visual.unflatten(1, (self._parts, -1))
            tokens, deepstack = by_level[:, 0], by_level[:, 1:]
        # where the image is visual tokens alone, its placeholders need no embedding
        if layout.visual is None:
            text = self._embed((*before, *after), visual.device)
            parts = [text[:start], tokens.to(text.dtype), text[start:]]
            return EmbeddedPrompt(torch.cat(parts), ids, start, layout, deepstack)
        embeddings = self._embed(self._without_placeholders(ids, start, layout), visual.device)
        embedded = EmbeddedPrompt(embeddings, ids, start, layout, deepstack)
        mask, tokens = embedded.visual_mask(), tokens.to(embeddings.dtype)
        embeddings[mask] = embeddings[mask] + tokens if self._adds_features else tokens
        return embedded

    def _embed(self, ids: Sequence[int], device: torch.device) -> torch.Tensor:
        embeddings: torch.Tensor = self._table(torch.tensor(ids, device=device))
        return embeddings

    def _without_placeholders(self, ids: Sequence[int], start: int, layout: ImageLayout) -> list[int]:
        """Return ids that the table of embeddings is sure to hold: a placeholder may lie behind its end."""
        safe = list(ids)
        if not self._adds_features:
            for i, is_visual in enumerate(layout.visual or (), start):
                safe[i] = 0 if is_visual else safe[i]
        return safe


class DecoderInputs:
    """The decoder's arguments beside embeddings for one batch of prompts: padding, and what a family adds to it.

    Prompts are padded on the left. Where none is padded there are no arguments, which lets the model take its faster
    path.

    Args:
        prompts: B prompts.
        model: the model that reads them.
    """

    def __init__(self, prompts: Sequence[EmbeddedPrompt], model: Any = None) -> None:
        self.prompts = prompts
        device = prompts[0].embeddings.device
        self.longest = max(len(prompt) for prompt in prompts)
        self.padded = any(len(prompt) < self.longest for prompt in prompts)
        self.mask = torch.ones(len(prompts), self.longest, dtype=torch.long, device=device)
        for mask, prompt in zip(self.mask, prompts, strict=True):
            mask[: self.longest - len(prompt)] = 0
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0) if self.padded else self.mask

    def prefill(self) -> dict[str, Any]:
        """Return the arguments for the whole prompts."""
        return {"attention_mask": self.mask, "position_ids": self.positions} if self.padded else {}

    def step(self, token: torch.Tensor) -> dict[str, Any]:
        """Return the arguments for the next token of each prompt, ``[B]``."""
        if not self.padded:
            return {}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return {"attention_mask": self.mask, "position_ids": self.positions}

    def embeddings(self) -> torch.Tensor:
        """Return the prompts' embeddings ``[B, T, C]``."""
        return self.pad([prompt.embeddings for prompt in self.prompts])

    def pad(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack one tensor ``[T_i, ...]`` for each prompt into ``[B, T, ...]``, with zeros on the left."""
        if not self.padded:
            return torch.stack(list(values))
        whole = values[0].new_zeros(len(values), self.longest, *values[0].shape[1:])
        for row, value in zip(whole, values, strict=True):
            row[self.longest - len(value) :] = value
        return whole

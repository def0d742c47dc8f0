"""A prompt: how an image stands in it, the embeddings of its text and image, and what the decoder is told.

Shapes: B prompts of a batch, T tokens, V visual tokens, C channels of the language model, D levels of deepstack
features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from budgetvlm.vlm.prompt_text import Prompt


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
        lead: text in front of its first token.
    """

    ids: tuple[int, ...]
    visual: tuple[bool, ...] | None = None
    grid: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    order: tuple[int, ...] | None = None
    lead: str = ""

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
        before, behind = self._prompt.around_image(question_ids, layout.lead)
        after = (*behind, *answer_ids)
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

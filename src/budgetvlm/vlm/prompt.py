"""A prompt: the token ids of its text, how an image stands in it, their embeddings, and what the decoder is told.

The ids are those that the model's own processor gives, however its tokenizer works. A writer returns for a question the
text before the image and the text behind it. Small models bring a template in `knobs.json`, for example
`<img>{image}</img>{question}<a>`; others have a chat template (`budgetvlm.vlm.chat_template`).
Shapes: B prompts of a batch, T tokens, V visual tokens, C channels of the language model, D levels of deepstack
features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from budgetvlm.errors import ConfigError, InputError

Writer = Callable[[str], tuple[str, str]]

MARK = "QUESTION"
SOME_SIZE = (336, 336)  # of an image, where any will do
_QUESTION_CACHE_LIMIT = 64  # one request asks for the tokens of its question several times
_BEGIN, _END = "\U000f0000", "\U000f0001"  # around names of special tokens in a question, which are plain text
_MARKED = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)


class Prompt:
    """The text around an image and a question, tokenised as one.

    Tokenizers treat the beginning of a text in another way than its middle, or join a question's first letters with
    what stands before it. So the whole text is tokenised, with the image's first and last token in the image's place.
    Nothing is joined across special tokens, so that these three are the same for all questions.

    Attributes:
        before: token ids in front of the image.
        between: those behind the image, to the last special token before the question.
        after: those from the first special token behind the question on.

    Args:
        tokenizer: a tokenizer of Transformers.
        write: see above.
        edges: the first and the last token id of an image, which are special tokens.
        is_own: the text is not the model's, but of knobs.json.

    Raises ConfigError: the tokenizer does not keep the image's edges.
    """

    def __init__(self, tokenizer: Any, write: Writer, edges: Sequence[int], *, is_own: bool = False) -> None:
        self.tokenizer, self.is_own, self._write, self._edges = tokenizer, is_own, write, list(edges)
        self._edge_text = "".join(tokenizer.convert_ids_to_tokens(self._edges))
        self._special = _names(tokenizer, edges)
        self._tokenized = lru_cache(_QUESTION_CACHE_LIMIT)(self._tokenize)
        self.before_image = cache(self._tokenize_before)
        self._text_before, behind = write(MARK)
        self._wrap = _wrapping(tokenizer, self._text_before)
        text_between, _, text_after = behind.partition(MARK)
        # the special tokens around the question: the last one before it, which may be the image's, and the next
        last = list(self._special.finditer(f"{self._edge_text}{text_between}"))[-1]
        following = self._special.search(text_after)
        self._borders = last[0], following[0] if following else ""
        fixed = text_between[: last.end() - len(self._edge_text)]
        rest = text_after[following.start() :] if following else ""
        self._num_fixed = len(fixed), len(rest)
        self.before = self.before_image("")
        self.between = tuple(self._parted("", fixed)[1])
        self.after = (*self._encode(rest), *self._wrap[1])

    def question_ids(self, question: str) -> np.ndarray:
        """Return the token ids between `between` and `after`, int64 ``[T]``; names of special tokens are plain text.

        Raises InputError: the question is not text, or is empty.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"the question is empty ({question!r}); ask something about the image")
        return self._tokenized(question)

    def around_image(self, question_ids: np.ndarray, lead: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids in front of an image and those behind it."""
        return self.before_image(lead), (*self.between, *question_ids.tolist(), *self.after)

    def num_image_tokens(self, layout: ImageLayout) -> int:
        """Return the number of an image's tokens, and of those by which its lead makes what is before it longer."""
        return len(layout.ids) + len(self.before_image(layout.lead)) - len(self.before)

    def num_text_tokens(self, question: str) -> int:
        """Return the number of the prompt's tokens beside those of the image."""
        return len(self.before) + len(self.between) + len(self.question_ids(question)) + len(self.after)

    def _tokenize(self, question: str) -> np.ndarray:
        plain = question.replace(_BEGIN, "").replace(_END, "")
        _, behind = self._write(self._special.sub(f"{_BEGIN}\\g<0>{_END}", plain))
        start, end = self._num_fixed
        before, after = self._borders
        ids = self._encode(f"{before}{behind[start : len(behind) - end]}{after}")[1:]
        ids = ids[:-1] if after else ids
        if not ids:
            raise InputError(f"the question {question!r} holds no token that the model knows; ask in words")
        array = np.array(ids, dtype=np.int64)
        array.setflags(write=False)
        return array

    def _tokenize_before(self, lead: str) -> tuple[int, ...]:
        """Return the ids in front of an image whose first token follows a text of its own, the lead."""
        return (*self._wrap[0], *self._parted(lead, "")[0])

    def _parted(self, lead: str, behind: str) -> tuple[list[int], list[int]]:
        """Return the ids in front of an image with this lead, and those of a text behind it. Raises ConfigError."""
        ids, size = self._encode(self._text_before + lead + self._edge_text + behind), len(self._edges)
        for place in range(len(ids) - size + 1):
            if ids[place : place + size] == self._edges:
                return ids[:place], ids[place + size :]
        raise ConfigError(
            f"the tokenizer does not keep {self._edge_text!r}, between which an image stands, as special tokens"
        )

    def _encode(self, text: str) -> list[int]:
        """Return token ids, none of them added around the text; what is marked in it is no special token."""
        first, *others = _MARKED.split(text)
        ids = list(self.tokenizer.encode(first, add_special_tokens=False))
        for i, piece in enumerate(others):
            ids += self._encode_later(piece, split_special_tokens=True) if i % 2 == 0 else self._encode_later(piece)
        return ids

    def _encode_later(self, piece: str, **options: Any) -> list[int]:
        """Return the ids of a piece from the middle of a text: behind a line break it is not marked as a beginning."""
        line, ids = (
            self.tokenizer.encode(text, add_special_tokens=False, **options) if piece else []
            for text in ("\n", f"\n{piece}")
        )
        if ids[: len(line)] == line:
            return list(ids[len(line) :])
        return list(self.tokenizer.encode(piece, add_special_tokens=False, **options))


def _names(tokenizer: Any, edges: Sequence[int]) -> re.Pattern[str]:
    """Return what finds the names of special tokens and of the image's edges, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {*added, *tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(list(edges))}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _wrapping(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and behind such a text.

    As in Transformers' processors, a text that begins with the token for beginnings gets none.
    """
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return [], []
    bare = tokenizer.encode(MARK, add_special_tokens=False)
    whole = list(tokenizer.encode(MARK))
    place = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:place], whole[place + len(bare) :]


def template_writer(template: str) -> Writer:
    """Return what writes a template.

    Raises ConfigError: `{image}` and `{question}` do not both occur once, in this order.
    """
    before, image, rest = template.partition("{image}")
    between, question, after = rest.partition("{question}")
    if not image or not question or "{image}" in rest or "{question}" in before + after:
        raise ConfigError(
            f"the prompt {template!r} cannot be used: it needs {{image}} once and then {{question}} once, "
            "for example '<img>{image}</img>{question}'"
        )
    return lambda asked: (before, f"{between}{asked}{after}")


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
        num_answered: how many of the tokens, the last ones, are of an answer.
    """

    embeddings: torch.Tensor
    token_ids: tuple[int, ...]
    start: int
    layout: ImageLayout
    deepstack: torch.Tensor | None = None
    num_answered: int = 0

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
    """Puts text and visual tokens together, with a table of embeddings; see `Family` for what features are added."""

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
            return EmbeddedPrompt(torch.cat(parts), ids, start, layout, deepstack, len(answer_ids))
        embeddings = self._embed(self._without_placeholders(ids, start, layout), visual.device)
        embedded = EmbeddedPrompt(embeddings, ids, start, layout, deepstack, len(answer_ids))
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
    """The decoder's arguments beside embeddings for one batch of B prompts: padding, and what a family adds to it.

    Prompts are padded on the left. Where none is padded there are no arguments, which lets the model take its faster
    path.
    """

    def __init__(self, prompts: Sequence[EmbeddedPrompt], model: Any = None) -> None:
        self.prompts, self.model = prompts, model
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

    def token_ids(self) -> torch.Tensor:
        """Return the prompts' token ids ``[B, T]``."""
        return self.pad([torch.tensor(prompt.token_ids, device=self.mask.device) for prompt in self.prompts])

    def pad(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack one tensor ``[T_i, ...]`` for each prompt into ``[B, T, ...]``, with zeros on the left."""
        if not self.padded:
            return torch.stack(list(values))
        whole = values[0].new_zeros(len(values), self.longest, *values[0].shape[1:])
        for row, value in zip(whole, values, strict=True):
            row[self.longest - len(value) :] = value
        return whole

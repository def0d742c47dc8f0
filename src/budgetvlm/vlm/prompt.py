"""A prompt: the token ids of its text, how an image stands in it, their embeddings, and what the decoder is told.

The ids are those that the model's own processor gives, however its tokenizer works. A writer returns for the turns of a
conversation the texts before, between and behind its images. Small models bring a template in `knobs.json`, for example
`<img>{image}</img>{question}<a>`; others have a chat template (`budgetvlm.vlm.chat_template`).
Shapes: B prompts of a batch, N images, T tokens, V visual tokens, C channels of the language model, D levels of
deepstack features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import nn

from budgetvlm._io import shortened
from budgetvlm.errors import ConfigError, InputError
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.protocol import Conversation, Turn
from budgetvlm.vlm.special_tokens import BEGIN, END, MARK, later_ids, special_names, wrapping

Writer = Callable[[Sequence[Turn]], list[str]]
IMAGE = {"type": "image"}

SOME_SIZE = (336, 336)  # of an image, where any will do
_QUESTION_CACHE_LIMIT = 64  # one request asks for the tokens of its question several times
_MARKED = re.compile(f"{BEGIN}(.*?){END}", re.DOTALL)


def one_question(question: str) -> tuple[Turn, ...]:
    """Return the turns of one image and then one question."""
    return ({"role": "user", "content": [IMAGE, {"type": "text", "text": question}]},)


class Prompt:
    """The text around images and what is said, tokenised as one.

    Tokenizers treat the beginning of a text in another way than its middle, or join a question's first letters with
    what stands before it. So the whole text is tokenised, with an image's first and last token in its place. Nothing is
    joined across special tokens, so that these three are the same for all questions about one image.

    Attributes:
        before: token ids in front of the image.
        between: those behind the image, to the last special token before the question.
        after: those from the first special token behind the question on.
        special: matches names of special tokens.

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
        self.special = special_names(tokenizer, edges)
        self._tokenized = lru_cache(_QUESTION_CACHE_LIMIT)(self._tokenize)
        self._tokenized_turns = lru_cache(_QUESTION_CACHE_LIMIT)(self._tokenize_turns)
        self.before_image = cache(self._tokenize_before)
        self._text_before, behind = write(one_question(MARK))
        self._wrap = wrapping(tokenizer, self._text_before)
        text_between, _, text_after = behind.partition(MARK)
        # the special tokens around the question: the last one before it, which may be the image's, and the next
        last = list(self.special.finditer(f"{self._edge_text}{text_between}"))[-1]
        following = self.special.search(text_after)
        self._borders = last[0], following[0] if following else ""
        fixed = text_between[: last.end() - len(self._edge_text)]
        rest = text_after[following.start() :] if following else ""
        self._num_fixed = len(fixed), len(rest)
        self.before = self.before_image("")
        self.between = tuple(self._parted(("", fixed), ("",))[1])
        self.after = (*self._encode(rest), *self._wrap[1])

    def question_ids(self, question: str | Conversation) -> np.ndarray:
        """Return the token ids between `between` and `after`, int64 ``[T]``; names of special tokens are plain text.

        Of a conversation, those of what was said last. Raises InputError: it is empty, or no whole text.
        """
        said = question.question if isinstance(question, Conversation) else question
        if not isinstance(said, str) or not said.strip():
            raise InputError(f"the question is empty ({said!r}); ask something about the image")
        if any("\ud800" <= one <= "\udfff" for one in said):
            raise InputError(f"the question {shortened(ascii(said))} holds half of a character; write it in UTF-8")
        return self._tokenized(said)

    def around(self, question: str | Conversation, leads: Sequence[str]) -> Sequence[tuple[int, ...]]:
        """Return the token ids in front of, between and behind images with these leads, ``[N + 1]``.

        Raises InputError: the model's prompts have no place for such a conversation.
        """
        if isinstance(question, Conversation):
            texts = self._write([self._plain(turn) for turn in question.turns])
            return self._tokenized_turns(tuple(texts), tuple(leads))
        return self.around_image(self.question_ids(question), leads[0])

    def around_image(self, question_ids: np.ndarray, lead: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids in front of an image and those behind it."""
        return self.before_image(lead), (*self.between, *question_ids.tolist(), *self.after)

    def num_image_tokens(self, layout: ImageLayout) -> int:
        """Return the number of an image's tokens, and of those by which its lead makes what is before it longer."""
        return len(layout.ids) + len(self.before_image(layout.lead)) - len(self.before)

    def num_text_tokens(self, question: str | Conversation) -> int:
        """Return the number of the prompt's tokens beside those of its images."""
        if isinstance(question, Conversation):
            return sum(map(len, self.around(question, ("",) * len(question.images))))
        return len(self.before) + len(self.between) + len(self.question_ids(question)) + len(self.after)

    def _tokenize(self, question: str) -> np.ndarray:
        _, behind = self._write([self._plain(turn) for turn in one_question(question)])
        start, end = self._num_fixed
        before, after = self._borders
        ids = self._encode(f"{before}{behind[start : len(behind) - end]}{after}")[1:]
        ids = ids[:-1] if after else ids
        if not ids:
            raise InputError(f"the question {question!r} holds no token that the model knows; ask in words")
        array = np.array(ids, dtype=np.int64)
        array.setflags(write=False)
        return array

    def _tokenize_turns(self, texts: tuple[str, ...], leads: tuple[str, ...]) -> list[tuple[int, ...]]:
        first, *others = self._parted(texts, leads)
        (*front, last), wrap = [first, *others], wrapping(self.tokenizer, texts[0])
        ids = [*map(tuple, front), (*last, *wrap[1])]
        return [(*wrap[0], *ids[0]), *ids[1:]]

    def _tokenize_before(self, lead: str) -> tuple[int, ...]:
        """Return the ids in front of an image whose first token follows a text of its own, the lead."""
        return (*self._wrap[0], *self._parted((self._text_before, ""), (lead,))[0])

    def _plain(self, turn: Turn) -> Turn:
        """Mark the names of special tokens in what is said, so that they are plain text."""

        def marked(part: dict[str, str]) -> dict[str, str]:
            said = part["text"].replace(BEGIN, "").replace(END, "")
            return {**part, "text": self.special.sub(f"{BEGIN}\\g<0>{END}", said)}

        return {**turn, "content": [part if part == IMAGE else marked(part) for part in turn["content"]]}

    def _parted(self, texts: Sequence[str], leads: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts before, between and behind images with these leads. Raises ConfigError."""
        images = (f"{lead}{self._edge_text}{text}" for lead, text in zip(leads, texts[1:], strict=True))
        parts, rest, size = [], self._encode("".join([texts[0], *images])), len(self._edges)
        for _ in leads:
            place = next((i for i in range(len(rest) - size + 1) if rest[i : i + size] == self._edges), None)
            if place is None:
                raise ConfigError(
                    f"the tokenizer does not keep {self._edge_text!r}, between which an image stands, as special tokens"
                )
            parts.append(rest[:place])
            rest = rest[place + size :]
        return [*parts, rest]

    def _encode(self, text: str) -> list[int]:
        """Return token ids, none of them added around the text; what is marked in it is no special token."""
        first, *others = _MARKED.split(text)
        ids = list(self.tokenizer.encode(first, add_special_tokens=False))
        for i, piece in enumerate(others):
            ids += later_ids(self.tokenizer, piece, **({"split_special_tokens": True} if i % 2 == 0 else {}))
        return ids


def template_writer(template: str, ends: str | None = None) -> Writer:
    """Return what writes a template.

    A user's turn is the template, with all that stands up to its question once for each image; system and assistant say
    what they say.

    Args:
        ends: text that ends what an assistant said; None: more than one question about one image is refused.

    Raises ConfigError: `{image}` and `{question}` do not both occur once, in this order.
    """
    before, image, rest = template.partition("{image}")
    between, question, after = rest.partition("{question}")
    if not image or not question or "{image}" in rest or "{question}" in before + after:
        raise ConfigError(
            f"the prompt {template!r} cannot be used: it needs {{image}} once and then {{question}} once, "
            "for example '<img>{image}</img>{question}'"
        )
    behind = {"system": "\n", "user": after, "assistant": ends or ""}

    def write(turns: Sequence[Turn]) -> list[str]:
        if ends is None and tuple(turns) != one_question(turns[-1]["content"][-1].get("text", "")):
            raise InputError(
                "this model takes one image and then one question: its prompt has no place for more; ask so"
            )
        texts = [""]
        for turn in turns:
            for _ in range(turn["content"].count(IMAGE)):
                texts[-1] += before
                texts.append(between)
            texts[-1] += "\n".join(part["text"] for part in turn["content"] if part != IMAGE) + behind[turn["role"]]
        return texts

    return write


@dataclass(frozen=True)
class EmbeddedPrompt:
    """One prompt, ready for the decoder.

    Attributes:
        embeddings: ``[T, C]``.
        token_ids: T ids; placeholders stand for visual tokens.
        starts: index of each image's first token.
        layouts: how each image stands in the prompt.
        deepstack: features added behind the first D blocks, ``[V, D, C]``; None where there are none.
        num_answered: how many of the tokens, the last ones, are of an answer.
    """

    embeddings: torch.Tensor
    token_ids: tuple[int, ...]
    starts: tuple[int, ...]
    layouts: Sequence[ImageLayout]
    deepstack: torch.Tensor | None = None
    num_answered: int = 0

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def num_image_tokens(self) -> int:
        """Number of the images' tokens, their text and marks included."""
        return sum([len(layout.ids) for layout in self.layouts])

    def image_mask(self, *, visual: bool = False) -> torch.Tensor:
        """Return True at the images' tokens, their text and marks included or, if ``visual``, left out, ``[T]``."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        for start, layout in zip(self.starts, self.layouts, strict=True):
            mask[start : start + len(layout.ids)] = torch.tensor(layout.is_visual) if visual else True
        return mask.to(self.embeddings.device)

    def visual_mask(self) -> torch.Tensor:
        """Return True at visual tokens, ``[T]``."""
        return self.image_mask(visual=True)


class PromptEmbedder:
    """Puts text and visual tokens together, with a table of embeddings; see `Family` for what features are added."""

    def __init__(self, prompt: Prompt, table: nn.Module, deepstack_levels: int, adds_features: bool) -> None:
        self._prompt, self._table = prompt, table
        self._parts, self._adds_features = 1 + deepstack_levels, adds_features

    def __call__(
        self, visual: torch.Tensor, question_ids: np.ndarray, layout: ImageLayout, answer_ids: Sequence[int] = ()
    ) -> EmbeddedPrompt:
        """Embed the prompt of one image and question, and what of an answer is there already."""
        return self.around([visual], self._prompt.around_image(question_ids, layout.lead), [layout], answer_ids)

    def around(
        self, visual: Sequence[torch.Tensor], texts: Sequence[tuple[int, ...]], layouts: Sequence[ImageLayout],
        answer_ids: Sequence[int] = (),
    ) -> EmbeddedPrompt:  # fmt: skip
        """Embed the prompt of images with these ids around them, ``[N + 1]``."""
        parts: list[Sequence[int]] = [texts[0]]
        for layout, text in zip(layouts, texts[1:], strict=True):
            parts += layout.ids, text
        parts[-1] = (*parts[-1], *answer_ids)
        ids, starts = tuple(chain.from_iterable(parts)), tuple(accumulate(map(len, parts)))[:-1:2]
        deepstack = None
        if self._parts > 1 and visual:
            by_level = [one.unflatten(1, (self._parts, -1)) for one in visual]
            visual, deepstack = [one[:, 0] for one in by_level], torch.cat([one[:, 1:] for one in by_level])
        made = partial(EmbeddedPrompt, token_ids=ids, starts=starts, layouts=layouts, deepstack=deepstack)
        device = visual[0].device if visual else next(self._table.parameters()).device
        # where images are visual tokens alone, their placeholders need no embedding
        if all(layout.visual is None for layout in layouts):
            embedded = self._embed([*chain.from_iterable(parts[::2])], device).split([len(part) for part in parts[::2]])
            pieces = zip((tokens.to(embedded[0].dtype) for tokens in visual), embedded[1:], strict=True)
            return made(torch.cat([embedded[0], *chain.from_iterable(pieces)]), num_answered=len(answer_ids))
        embeddings = self._embed(self._without_placeholders(ids, starts, layouts), device)
        prompt = made(embeddings, num_answered=len(answer_ids))
        mask, tokens = prompt.visual_mask(), torch.cat(list(visual)).to(embeddings.dtype)
        embeddings[mask] = embeddings[mask] + tokens if self._adds_features else tokens
        return prompt

    def _embed(self, ids: Sequence[int], device: torch.device) -> torch.Tensor:
        embeddings: torch.Tensor = self._table(torch.tensor(ids, device=device))
        return embeddings

    def _without_placeholders(
        self, ids: Sequence[int], starts: Sequence[int], layouts: Sequence[ImageLayout]
    ) -> list[int]:
        """Return ids that the table of embeddings is sure to hold: a placeholder may lie behind its end."""
        safe = list(ids)
        for start, layout in zip(starts, () if self._adds_features else layouts, strict=not self._adds_features):
            for i, is_visual in enumerate(layout.is_visual, start):
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

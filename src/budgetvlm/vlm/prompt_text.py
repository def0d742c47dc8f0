"""The text of a prompt as token ids: those that the model's own processor gives, however its tokenizer works.

A writer returns for a question the text before the image and the text behind it. Small models bring a template in
`knobs.json`, for example `<img>{image}</img>{question}<a>`; others have a chat template.
Shapes: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from budgetvlm.errors import ConfigError, InputError

Writer = Callable[[str], tuple[str, str]]

_MARK = "QUESTION"
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

    Raises:
        ConfigError: the tokenizer does not keep the image's edges.
    """

    def __init__(self, tokenizer: Any, write: Writer, edges: Sequence[int], *, is_own: bool = False) -> None:
        self.tokenizer, self.is_own, self._write, self._edges = tokenizer, is_own, write, list(edges)
        self._edge_text = "".join(tokenizer.convert_ids_to_tokens(self._edges))
        self._special = _names(tokenizer, edges)
        self._tokenized = lru_cache(_QUESTION_CACHE_LIMIT)(self._tokenize)
        self.before_image = cache(self._tokenize_before)
        self._text_before, behind = write(_MARK)
        self._wrap = _wrapping(tokenizer, self._text_before)
        text_between, _, text_after = behind.partition(_MARK)
        # the special tokens around the question: the last one before it, which may be the image's, and the next
        last = list(self._special.finditer(f"{self._edge_text}{text_between}"))[-1]
        following = self._special.search(text_after)
        self._borders = last[0], following[0] if following else ""
        fixed = text_between[: last.end() - len(self._edge_text)]
        rest = text_after[following.start() :] if following else ""
        self._num_fixed = len(fixed), len(rest)
        self.before = self.before_image("")
        self.between = tuple(self._behind_image(fixed))
        self.after = (*self._encode(rest), *self._wrap[1])

    def question_ids(self, question: str) -> np.ndarray:
        """Return the token ids between `between` and `after`, int64 ``[T]``, read-only.

        Names of special tokens in a question are plain text.

        Raises:
            InputError: the question is not text, or is empty.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"the question is empty ({question!r}); ask something about the image")
        return self._tokenized(question)

    def around_image(self, question_ids: np.ndarray, lead: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids in front of an image and those behind it."""
        return self.before_image(lead), (*self.between, *question_ids.tolist(), *self.after)

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
        ids = self._encode(self._text_before + lead + self._edge_text)
        return (*self._wrap[0], *ids[: self._place(ids)])

    def _behind_image(self, text: str) -> list[int]:
        ids = self._encode(self._text_before + self._edge_text + text)
        return ids[self._place(ids) + len(self._edges) :]

    def _place(self, ids: list[int]) -> int:
        """Return where the image begins."""
        size = len(self._edges)
        for place in range(len(ids) - size + 1):
            if ids[place : place + size] == self._edges:
                return place
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
    bare = tokenizer.encode(_MARK, add_special_tokens=False)
    whole = list(tokenizer.encode(_MARK))
    place = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:place], whole[place + len(bare) :]


def template_writer(template: str) -> Writer:
    """Return what writes a template.

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
    return lambda asked: (before, f"{between}{asked}{after}")


def chat_writer(tokenizer: Any, placeholder: str) -> Writer:
    """Return what writes the tokenizer's chat template.

    Args:
        placeholder: what stands for the image in the rendered template.

    Raises:
        ConfigError: there is no chat template, or it does not hold one image and then one question.
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

    text = render(_MARK)
    if text.count(placeholder) != 1 or text.count(_MARK) != 1 or text.index(_MARK) < text.index(placeholder):
        raise ConfigError(
            f"the chat template does not hold one image and then one question: {text!r}; add a prompt to knobs.json"
        )
    return write

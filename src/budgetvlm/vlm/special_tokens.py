"""Special tokens of a tokenizer: their names, and those that it adds around a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MARK = "QUESTION"
BEGIN, END = "\U000f0000", "\U000f0001"  # around names of special tokens in what is said, which are plain text


def special_names(tokenizer: Any, edges: Sequence[int]) -> re.Pattern[str]:
    """Return what finds the names of special tokens and of the image's edges, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {*added, *tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(list(edges))}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def wrapping(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and behind such a text.

    As in Transformers' processors, a text that begins with the token for beginnings gets none.
    """
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return [], []
    bare = tokenizer.encode(MARK, add_special_tokens=False)
    whole = list(tokenizer.encode(MARK))
    place = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:place], whole[place + len(bare) :]


def later_ids(tokenizer: Any, piece: str, **options: Any) -> list[int]:
    """Return the ids of a piece from the middle of a text: behind a line break it is not marked as a beginning."""
    line, ids = (
        tokenizer.encode(text, add_special_tokens=False, **options) if piece else [] for text in ("\n", f"\n{piece}")
    )
    if ids[: len(line)] == line:
        return list(ids[len(line) :])
    return list(tokenizer.encode(piece, add_special_tokens=False, **options))

"""Packed training batches: many questions behind one image prefix, with a block mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from budgetvlm.tasks import signs

from .build import TOKENS_PER_TILE, vocabulary
from .labels import num_tiles

_ID = {token: i for i, token in enumerate(vocabulary())}
IGNORE = -100
BY_CODE = ("price", "price", "origin", "digits", "sum", "sum", "sum")
_CONTEXT = _ID["<IMG_CONTEXT>"]


@dataclass(frozen=True)
class Batch:
    """Packed sequences. B scenes, T tokens.

    Attributes:
        ids: ``[B, T]``; positions: ``[B, T]``; allowed: bool ``[B, 1, T, T]``, who may attend to whom.
        targets: next token at answer positions, else `IGNORE`, ``[B, T]``.
        kinds: index of the question's kind at answer positions, ``[B, T]``.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    allowed: torch.Tensor
    targets: torch.Tensor
    kinds: torch.Tensor


def encode(text: str) -> list[int]:
    """Token ids of a question or an answer (tested against the tokenizer)."""
    return [i for word in text.split() for i in ([_ID[word]] if word in _ID else [_ID[c] for c in word])]


def pack(
    scenes: Sequence[signs.Scene],
    max_crops: int,
    rng: np.random.Generator,
    questions: int,
    kinds: tuple[str, ...] | None,
    by_code: float = 0.0,
) -> Batch:
    """Pack ``questions`` questions for each scene; ``kinds`` restricts them (None: the task's own shares).

    ``by_code`` is the share of questions that name a code instead of a colour ("how much is K37"): facts and sums
    can be learnt from those without looking, and sooner.
    """
    prefix = [_ID["<img>"], *[_CONTEXT] * (num_tiles(max_crops) * TOKENS_PER_TILE), _ID["</img>"]]
    rows = [_pack_scene(scene, prefix, rng, questions, kinds, by_code) for scene in scenes]
    length = max(len(row[0]) for row in rows)
    columns = [np.full((len(rows), length), fill) for fill in (0, 0, -1, IGNORE, 0)]
    for r, row in enumerate(rows):
        for column, values in zip(columns, row, strict=True):
            column[r, : len(values)] = values
    ids, positions, segments, targets, kind_ids = (torch.from_numpy(c) for c in columns)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    allowed = (same | (segments == 0)[:, None, :]) & causal
    return Batch(ids, positions, allowed[:, None], targets, kind_ids)


def _pack_scene(
    scene: signs.Scene,
    prefix: list[int],
    rng: np.random.Generator,
    questions: int,
    kinds: tuple[str, ...] | None,
    by_code: float,
) -> tuple[list[int], ...]:
    start = len(prefix)
    ids, positions = list(prefix), list(range(start))
    segments, targets, kind_ids = [0] * start, [IGNORE] * start, [0] * start
    possible = [k for k in signs.possible_kinds(scene) if kinds is None or k in kinds]
    for segment in range(1, questions + 1):
        if by_code and rng.random() < by_code:
            question = ask_by_code(rng, scene)
        else:
            question = signs.ask(scene, rng, None if kinds is None else possible[rng.integers(len(possible))])
        prompt = [*encode(question.text), _ID["<a>"]]
        answer = [*encode(question.answer), _ID["</s>"]]
        tokens = prompt + answer[:-1]
        ids += tokens
        positions += range(start, start + len(tokens))
        segments += [segment] * len(tokens)
        targets += [IGNORE] * (len(prompt) - 1) + answer
        kind_ids += [signs.KINDS.index(question.kind)] * len(tokens)
    return ids, positions, segments, targets, kind_ids


def ask_by_code(rng: np.random.Generator, scene: signs.Scene) -> signs.Question:
    """A question about items named by their codes. One of a sum's two is named by the colour of its sign at times.

    So the sum of two signs is learnt in steps: no look at the picture, one, two.
    """
    codes = list(signs.catalogue())
    a, b = (codes[i] for i in rng.choice(len(codes), 2, replace=False))
    kind = BY_CODE[rng.integers(len(BY_CODE))]
    phrase = signs.PHRASES[kind][rng.integers(2)]
    if kind == "sum":
        names = [a, b]
        if rng.random() < 0.7:
            sign, place = scene.signs[rng.integers(len(scene.signs))], rng.integers(2)
            names[place] = sign.colour
            a, b = (sign.code, b) if place == 0 else (a, sign.code)
        return signs.Question(kind, phrase.format(a=names[0], b=names[1]), str(int(a[2]) + int(b[2])))
    price, town = signs.catalogue()[a]
    answers = {"price": price, "origin": town, "digits": str(int(a[1]) + int(a[2]))}
    return signs.Question(kind, phrase.format(a=a), answers[kind])

"""Which transformer blocks stay when only some may run.

`block_order` lists all blocks from the most to the least important; a depth of n runs the first n of it, in their
usual order. The first and the last block are never skipped: one turns embeddings into features, the other turns
features into what the head reads. Shapes: L blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from budgetvlm.errors import ConfigError
from budgetvlm.vlm.decoding import PacedBlock, PacedReading, SkippedBlock


def active_blocks(order: Sequence[int], num_active_blocks: int) -> tuple[int, ...]:
    """Return indices of the blocks that run at this depth, ascending.

    Raises:
        ConfigError: fewer than 2 or more than L blocks asked for.
    """
    if not 2 <= num_active_blocks <= len(order):
        raise ConfigError(
            f"num_active_blocks={num_active_blocks} cannot run: this model has {len(order)} blocks, and the first and "
            f"the last are always among them. Choose 2 to {len(order)}."
        )
    return tuple(sorted(order[:num_active_blocks]))


def layer_list(layers: nn.ModuleList, active: Sequence[int], *, stand_ins: bool) -> nn.ModuleList:
    """Return the list of blocks to run: without the skipped ones, or with stand-ins in their places."""
    if len(active) == len(layers):
        return layers
    if not stand_ins:
        return nn.ModuleList(layers[i] for i in active)
    return nn.ModuleList(layer if i in active else SkippedBlock(layer) for i, layer in enumerate(layers))


def paced_list(
    layers: nn.ModuleList, whole: nn.ModuleList, reading: PacedReading, skipped: Callable[[torch.Tensor], Any]
) -> nn.ModuleList:
    """Return a list of blocks in which each that runs asks a pace first.

    Args:
        layers: a list of `layer_list`.
        whole: all blocks of the model.
        skipped: see `PacedBlock`.
    """
    numbers = {layer: i for i, layer in enumerate(whole)}  # a stand-in has none
    return nn.ModuleList(
        PacedBlock(layer, numbers[layer], reading, skipped) if layer in numbers else layer for layer in layers
    )


def check_order(order: Sequence[int], num_total_blocks: int, fixed: Sequence[int] = ()) -> tuple[int, ...]:
    """Check an order of blocks and return it as a tuple.

    Args:
        fixed: blocks that run at every depth beside the first and the last.

    Raises:
        ConfigError: it is not a permutation of the blocks that begins with the first, the last and the fixed ones.
    """
    ends, always = {0, num_total_blocks - 1}, {0, num_total_blocks - 1, *fixed}
    if set(order[: len(ends)]) == ends and set(order[: len(always)]) != always:
        raise ConfigError(
            f"block_order={list(order)} cannot be used: this model needs the blocks {sorted(always)} at every depth, "
            "so that they have to come in front"
        )
    if sorted(order) != list(range(num_total_blocks)) or set(order[: len(ends)]) != ends:
        raise ConfigError(
            f"block_order={list(order)} cannot be used: it must hold each of the blocks 0 to {num_total_blocks - 1} "
            "once, the first and the last in front"
        )
    return tuple(order)


def least_depth(num_total_blocks: int, fixed: Sequence[int] = ()) -> int:
    """Return the fewest blocks that can run: the first, the last and the fixed ones, but 2 at least."""
    return max(2, len({0, num_total_blocks - 1, *fixed}))


def default_order(num_total_blocks: int, fixed: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the order where nothing was measured: first, last, those that always run, then from early to late."""
    return order_by_importance([math.inf if i in fixed else float(-i) for i in range(num_total_blocks)])


def order_by_importance(importance: Sequence[float]) -> tuple[int, ...]:
    """Order blocks by importance ``[L]``: first and last, then the others, most important first."""
    last = len(importance) - 1
    inner = sorted(range(1, last), key=lambda block: (-importance[block], block))
    return tuple(dict.fromkeys([0, last, *inner]))


def change_by_block(hidden_states: Sequence[torch.Tensor]) -> list[float]:
    """Return how much each block changes its input: 1 - mean cosine of input and output over the tokens, ``[L]``.

    The "block influence" of ShortGPT (Men et al., 2024, arXiv:2403.03853, eq. 1). A block that hardly turns its input
    can be skipped at little cost.

    Args:
        hidden_states: L + 1 tensors ``[..., C]``: the input of the first block and the output of every block.
    """
    pairs = itertools.pairwise(hidden_states)
    return [1 - float(torch.cosine_similarity(a.float(), b.float(), dim=-1).mean()) for a, b in pairs]


def order_by_score(num_total_blocks: int, score: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Eliminate greedily: skip, one after the other, the inner block whose absence leaves the best score.

    Needs about L² / 2 scores. A block skipped early is unimportant, so the order is that of elimination reversed.

    Args:
        score: quality with only these blocks running (ascending indices), larger is better: accuracy, or minus the
            negative log-likelihood, on a calibration set that is neither validation nor test.
    """
    left = list(range(num_total_blocks))
    skipped: list[int] = []
    while len(left) > 2:
        block = max(left[1:-1], key=lambda b: score(tuple(i for i in left if i != b)))
        left.remove(block)
        skipped.append(block)
    return (*left, *reversed(skipped))


def order_by_addition(num_total_blocks: int, score: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Add greedily: from the first and the last block on, add the one whose presence gives the best score.

    Elimination judges small depths by what little is lost near the full depth; addition starts from them. For a model
    trained to run at few blocks the two can differ much, see `best_order`. Needs about L² / 2 scores.
    """
    order = [0, num_total_blocks - 1]
    while len(order) < num_total_blocks:
        rest = [b for b in range(num_total_blocks) if b not in order]
        order.append(max(rest, key=lambda b: score(tuple(sorted([*order, b])))))
    return tuple(order)


def best_order(
    orders: Sequence[Sequence[int]], depths: Sequence[int], score: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...]:
    """Return the order with the best mean score over the depths that will be used; the first of equals."""

    def total(order: Sequence[int]) -> float:
        return sum(score(active_blocks(order, depth)) for depth in depths)

    best = max(orders, key=total)
    return tuple(best)

"""Which transformer blocks stay when only some may run.

`block_order` lists all blocks from the most to the least important; a depth of n runs the first n of it, in their
usual order. The first and the last block are never skipped: one turns embeddings into features, the other turns
features into what the head reads. Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from budgetvlm.errors import ConfigError
from budgetvlm.vlm.decoding import PacedBlock, PacedReading, SkippedBlock


def active_blocks(order: Sequence[int], num_active_blocks: int) -> tuple[int, ...]:
    """Return indices of the blocks that run at this depth, ascending. Raises ConfigError: below 2 or above L."""
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
    """Return a list of `layer_list` in which each of the ``whole`` model's blocks asks a pace first: `PacedBlock`."""
    numbers = {layer: i for i, layer in enumerate(whole)}  # a stand-in has none
    return nn.ModuleList(
        PacedBlock(layer, numbers[layer], reading, skipped) if layer in numbers else layer for layer in layers
    )


def check_order(order: Sequence[int], num_total_blocks: int, fixed: Sequence[int] = ()) -> tuple[int, ...]:
    """Check an order of blocks, in which the first, the last and the fixed ones lead. Raises ConfigError."""
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
    return tuple(dict.fromkeys([0, num_total_blocks - 1, *sorted(fixed), *range(num_total_blocks)]))

"""From visual tokens and a question to what the controller reads.

The controller reads a handful of vectors, for which starting tensor operations takes longer than the sums; plain arrays
in main memory are pooled by NumPy. What comes out is an array: nothing that reads it needs PyTorch.
Shapes: T tokens, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def pool(tokens: torch.Tensor, deepstack_levels: int = 0) -> np.ndarray:
    """Return the controller's view of visual tokens: mean and maximum over them, float32 ``[2 * C]``.

    Args:
        tokens: ``[T, C]``, or ``[T, C * (1 + levels)]`` with deepstack levels, which do not count.
    """
    if deepstack_levels:
        tokens = tokens[:, : tokens.shape[1] // (1 + deepstack_levels)]
    plain = tokens.dtype is torch.float32 and tokens.is_cpu
    rows: np.ndarray = (tokens if plain else tokens.float().cpu()).numpy()
    width = rows.shape[1]
    out = np.empty(2 * width, dtype=np.float32)
    np.add.reduce(rows, out=out[:width])
    out[:width] /= len(rows)
    np.maximum.reduce(rows, out=out[width:])
    return out


class WordMeans:
    """Averages word embeddings.

    Args:
        table: a module that embeds ids.
    """

    def __init__(self, table: nn.Module) -> None:
        self._table = table
        weight = table.weight.detach() if type(table) is nn.Embedding else torch.empty(0, device="meta")
        self._rows = weight.numpy() if weight.is_cpu and weight.dtype is torch.float32 else None  # without PyTorch

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Return the mean of the embeddings of these tokens, int64 ``[T]``, float32 ``[C]``."""
        if self._rows is not None:
            out: np.ndarray = np.add.reduce(self._rows[ids]) / np.float32(len(ids))
            return out
        device = next(self._table.parameters()).device
        with torch.inference_mode():
            mean: np.ndarray = self._table(torch.tensor(ids, device=device)).float().mean(0).cpu().numpy()
        return mean

"""What the controller sees of an image and of a question: visual tokens and embeddings, pooled.

Both are a handful of vectors, so starting tensor operations takes longer than the sums; plain arrays in main memory are
pooled by compiled loops. What comes out is an array: nothing that reads it needs PyTorch. Shapes: T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from budgetvlm._compiled import compiled


def pool(tokens: torch.Tensor) -> np.ndarray:
    """The controller's view of visual tokens ``[T, C]``: mean and maximum over the tokens, float32 ``[2 * C]``."""
    if _plain(tokens):
        return _mean_and_most(tokens.numpy())
    tokens = tokens.float()
    out: np.ndarray = torch.cat([tokens.mean(0), tokens.amax(0)]).cpu().numpy()
    return out


class WordMeans:
    """Means of word embeddings.

    Args:
        table: a module that embeds ids.
    """

    def __init__(self, table: nn.Module) -> None:
        self._table = table
        weight = table.weight.detach() if type(table) is nn.Embedding else None
        self._rows = weight.numpy() if weight is not None and _plain(weight) else None

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """Mean of the embeddings of these tokens, float32 ``[C]``."""
        # Compiled loops do not look where an array ends; the table itself raises IndexError there.
        if self._rows is not None and max(ids) < len(self._rows):
            out = np.zeros(self._rows.shape[1], np.float32)
            _mean_of(self._rows, np.array(ids), out)
            return out
        device = next(self._table.parameters()).device
        with torch.inference_mode():
            mean: np.ndarray = self._table(torch.tensor(ids, device=device)).float().mean(0).cpu().numpy()
        return mean


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


@compiled
def _mean_and_most(tokens: np.ndarray) -> np.ndarray:
    count, width = tokens.shape
    out = np.empty(2 * width, np.float32)
    for j in range(width):
        out[j] = out[width + j] = tokens[0, j]
    for i in range(1, count):
        for j in range(width):
            out[j] += tokens[i, j]
            out[width + j] = max(out[width + j], tokens[i, j])
    for j in range(width):
        out[j] /= np.float32(count)
    return out


@compiled
def _mean_of(rows: np.ndarray, numbers: np.ndarray, out: np.ndarray) -> None:
    """Into ``out``, which is 0: an array that a compiled loop makes costs as much again as the loop."""
    for number in numbers:
        for j in range(len(out)):
            out[j] += rows[number, j]
    for j in range(len(out)):
        out[j] /= np.float32(len(numbers))

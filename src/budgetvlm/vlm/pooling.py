"""What the controller sees of an image and of a question: visual tokens and embeddings, pooled.

Both are a handful of vectors, so starting tensor operations takes longer than the sums; plain arrays in main memory are
pooled by compiled loops. What comes out is an array: nothing that reads it needs PyTorch. Shapes: T tokens, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from budgetvlm._compiled import compiled


def pool(tokens: torch.Tensor) -> np.ndarray:
    """The controller's view of visual tokens ``[T, C]``: mean and maximum over the tokens, float32 ``[2 * C]``."""
    if _plain(tokens):
        return _mean_and_most(tokens.numpy())
    tokens = tokens.float()
    pooled: np.ndarray = torch.cat([tokens.mean(0), tokens.amax(0)]).cpu().numpy()
    return pooled


class WordMeans:
    """Means of word embeddings.

    Args:
        table: a module that embeds ids.
    """

    def __init__(self, table: nn.Module) -> None:
        self._table = table
        weight = table.weight.detach() if type(table) is nn.Embedding else None
        self._rows = weight.numpy() if weight is not None and _plain(weight) else None

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Mean of the embeddings of these tokens, int64 ``[T]``, float32 ``[C]``."""
        if self._rows is not None and len(out := _mean_of(self._rows, ids)):
            return out
        device = next(self._table.parameters()).device
        with torch.inference_mode():
            mean: np.ndarray = self._table(torch.tensor(ids, device=device)).float().mean(0).cpu().numpy()
        return mean


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()


# Loops make the arrays that they return: between two runs of the model `numpy.empty` takes as long as all of this.


@compiled
def _mean_and_most(tokens: np.ndarray) -> np.ndarray:
    count, width = tokens.shape
    out = np.empty(2 * width, np.float32)
    mean, most = out[:width], out[width:]
    mean[:] = tokens[0]
    most[:] = tokens[0]
    for i in range(1, count):
        for j in range(width):
            x = tokens[i, j]
            mean[j] += x
            most[j] = x if x > most[j] else most[j]
    for j in range(width):
        mean[j] /= np.float32(count)
    return out


@compiled
def _mean_of(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """An empty array where a number is beyond the rows: the table itself raises IndexError then."""
    out = np.zeros(rows.shape[1], np.float32)
    for number in numbers:
        if not 0 <= number < len(rows):
            return out[:0]
        row = rows[number]
        for j in range(len(out)):
            out[j] += row[j]
    for j in range(len(out)):
        out[j] /= np.float32(len(numbers))
    return out

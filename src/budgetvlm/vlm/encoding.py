"""From visual tokens and a question to what the controller reads: plain arrays, which need no PyTorch.

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
    rows = tokens[:, : tokens.shape[1] // (1 + deepstack_levels)].float().cpu().numpy()
    return np.concatenate([rows.mean(axis=0), rows.max(axis=0)])


@torch.inference_mode()
def word_mean(table: nn.Module, ids: np.ndarray) -> np.ndarray:
    """Return the mean of the embeddings of these tokens, int64 ``[T]``, float32 ``[C]``."""
    device = next(table.parameters()).device
    mean: np.ndarray = table(torch.tensor(ids, device=device)).float().mean(0).cpu().numpy()
    return mean

"""The principal directions of features that are wider than a regression can use. Shapes: S samples, D features."""

from __future__ import annotations

import numpy as np

MOST_DIRECTIONS = 256  # that a regression reads


def principal_directions(x: np.ndarray) -> np.ndarray:
    """Return the directions of standardised features ``[S, D]`` in which they vary most, ``[D, R]``.

    R is at most `MOST_DIRECTIONS`; features that are no wider are left as they are.
    """
    if x.shape[1] <= MOST_DIRECTIONS:
        return np.eye(x.shape[1])
    if len(x) <= MOST_DIRECTIONS:
        few: np.ndarray = np.linalg.svd(x, full_matrices=False)[2].T
        return few
    from scipy.sparse.linalg import svds

    found: np.ndarray = svds(x, MOST_DIRECTIONS, random_state=0)[2].T
    return found

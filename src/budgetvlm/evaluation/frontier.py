"""Which mean latency buys which mean accuracy when choices are mixed at random.

Drawing between two points (mean latency, mean accuracy) at random gives every point on the line between them, so a
set of choices is worth its upper concave hull. The hull's vertices are picked on one split and measured on another;
between them the measured points are joined by straight lines. Shapes: V vertices in order of latency.
"""

from __future__ import annotations

import numpy as np

NEARLY = 0.005  # accuracies this close are not told apart by the few samples that vertices are picked on


def upper_hull(latency_ms: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Indices of the upper concave hull of points ``[P]``, from lowest latency to highest accuracy, int64 ``[V]``.

    NaN points are left out; of equal points the first is kept (Andrew's monotone chain).
    """
    known = np.flatnonzero(np.isfinite(latency_ms) & np.isfinite(accuracy))
    order = known[np.lexsort((-accuracy[known], latency_ms[known]))]
    hull: list[int] = []
    for point in order:
        if hull and accuracy[point] <= accuracy[hull[-1]]:
            continue
        while len(hull) > 1 and not _turns_right(hull[-2], hull[-1], point, latency_ms, accuracy):
            hull.pop()
        hull.append(int(point))
    return np.array(hull, dtype=np.int64)


def mixing_path(latency_ms: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """The hull's vertices, then the slowest point that is nearly as accurate as the last of them, int64 ``[V]``.

    The last vertex is the most accurate point on the samples that it was picked on. On other samples a slower point
    may be, and without it the path could stop just short of an accuracy that the policy reaches.
    """
    hull = upper_hull(latency_ms, accuracy)
    if not len(hull):
        return hull
    last = hull[-1]
    slower = np.flatnonzero((latency_ms > latency_ms[last]) & (accuracy >= accuracy[last] - NEARLY))
    return np.append(hull, slower[latency_ms[slower].argmax()]) if len(slower) else hull


def _turns_right(a: int, b: int, c: int, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the path a, b, c bends downwards, so that b lies above the line from a to c."""
    return bool((x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]) < 0)


def latency_at(latency_ms: np.ndarray, accuracy: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """Least mean latency at which a path reaches a target accuracy; NaN where it does not. ``[...]``

    Args:
        latency_ms, accuracy: vertices ``[..., V]``; neighbours are joined by straight lines.
        target: ``[...]``.
    """
    goal = np.asarray(target, dtype=np.float64)[..., None]
    at_vertex = np.where(accuracy >= goal, latency_ms, np.inf)
    low, high = accuracy[..., :-1], accuracy[..., 1:]
    crossed = (low < goal) != (high < goal)
    share = (goal - low) / np.where(crossed, high - low, 1.0)
    between = latency_ms[..., :-1] + share * np.diff(latency_ms, axis=-1)
    on_line = np.where(crossed, between, np.inf)
    least = np.concatenate([at_vertex, on_line], axis=-1).min(axis=-1)
    return np.where(np.isfinite(least), least, np.nan)


def accuracy_at(latency_ms: np.ndarray, accuracy: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """Mean accuracy where a path first takes a target latency, ``[...]``: NaN below its start, that of its end beyond.

    The path is followed although a faster part of it may be more accurate here: where it leads was chosen on other
    samples.

    Args:
        latency_ms, accuracy: points ``[..., V]`` from fast to slow; neighbours are joined by straight lines.
        target: ``[...]``.
    """
    slowest = np.maximum.accumulate(latency_ms, axis=-1)
    goal = np.asarray(target, dtype=np.float64)[..., None]
    after = (slowest <= goal).sum(axis=-1, keepdims=True)
    low, high = (after - 1).clip(0), after.clip(max=slowest.shape[-1] - 1)
    fast, slow = (np.take_along_axis(slowest, at, axis=-1) for at in (low, high))
    share = np.where(slow > fast, (goal - fast) / np.where(slow > fast, slow - fast, 1.0), 0.0)
    worse, better = (np.take_along_axis(accuracy, at, axis=-1) for at in (low, high))
    found: np.ndarray = np.where(after > 0, worse + share * (better - worse), np.nan)[..., 0]
    return found

"""Loops that run in every request and in every step of training, compiled to machine code.

Between two requests lies a run of the model, and nothing of ours is in the caches then: each NumPy operation costs 10
microseconds or more where it costs one in a loop. A compiled loop does the work of a dozen of them in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")

# Sums may be put in another order, so that they use vector instructions; infinity and NaN keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of numbers and arrays when it is first called; the machine code is kept for the next run.

    It holds Python's lock, so no other thread changes what it reads.
    """
    out: Callable[P, R] = njit(cache=True, fastmath=_FAST, error_model="numpy")(function)
    return out

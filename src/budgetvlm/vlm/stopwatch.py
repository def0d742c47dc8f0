"""A clock for every stage of a request, in ms, which waits for the device at each reading; and one that takes notes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch


def waiting_for(tensor: torch.Tensor) -> Callable[[], None] | None:
    """What waits until a tensor's device has done all that was asked of it; None: a CPU has nothing to wait for."""
    if tensor.is_cpu:  # a device's type takes 16 microseconds to read between two runs of the model
        return None
    device = tensor.device
    if device.type == "cuda":
        return partial(torch.cuda.synchronize, device)
    return torch.mps.synchronize if device.type == "mps" else None


class Stopwatch:
    """`lap()` gives the ms since the last lap (or the start).

    Args:
        wait: see `waiting_for`.
    """

    def __init__(self, wait: Callable[[], None] | None) -> None:
        self._wait = wait
        self._last = time.perf_counter()
        self.lap()

    def lap(self) -> float:
        if self._wait:
            self._wait()
        now = time.perf_counter()
        elapsed_ms, self._last = (now - self._last) * 1e3, now
        return elapsed_ms


class NotedClock:
    """A clock in seconds that remembers what was read."""

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._now_s = now_s
        self.readings: list[float] = []

    def read(self) -> float:
        self.readings.append(self._now_s())
        return self.readings[-1]

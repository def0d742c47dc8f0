"""A clock for every stage of a request, in ms, which waits for the device at each reading; and one that takes notes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """`lap()` gives the ms since the last lap (or the start)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronise(device)
        self._last = time.perf_counter()

    def lap(self) -> float:
        synchronise(self._device)
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

"""When an answer of an engine is broken off: at a time, or once nobody waits for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LEAVING_S = 0.1  # between two looks whether anybody still waits


class Limit:
    """See the module.

    Attributes:
        has_cut: it has cut a connection.

    Args:
        end_s: the time, on the clock of `time.perf_counter`.
        left: says that nobody waits any more.
    """

    def __init__(self, end_s: float, left: Callable[[], bool] | None = None) -> None:
        self._end_s, self._left, self._done = end_s, left, threading.Event()
        self._ending, self.has_cut = threading.Lock(), False

    def reached(self) -> str:
        """Return why an answer ends here, as `budgetvlm.vlm.Generation` has it; empty: it does not."""
        if self._left is not None and self._left():
            return "stopped"
        return "budget" if time.perf_counter() >= self._end_s else ""

    @contextmanager
    def cutting(self, connection: socket.socket) -> Iterator[None]:
        """Cut a connection once the limit is reached, for a ``with`` block, whatever the block waits for."""
        if self._left is None and self._end_s == float("inf"):
            yield
            return
        threading.Thread(target=self._watch, args=[connection], daemon=True).start()
        try:
            yield
        finally:
            with self._ending:
                self._done.set()

    def _watch(self, connection: socket.socket) -> None:
        while not self.reached():
            left_s = max(self._end_s - time.perf_counter(), 0.0)
            if self._done.wait(left_s if self._left is None else min(left_s, LEAVING_S)):
                return
        with self._ending:
            if not self._done.is_set():
                self.has_cut = True
                cut(connection)


def cut(connection: socket.socket) -> None:
    """End what waits for a connection."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)

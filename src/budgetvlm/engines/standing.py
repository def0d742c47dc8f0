"""Whether an engine may be asked now, and when one that failed is tried again."""

from __future__ import annotations

import threading
import time

from budgetvlm.errors import EngineChangedError, EngineError, EngineFailedError

FIRST_PAUSE_S, LONGEST_PAUSE_S, GROWTH = 0.25, 5.0, 1.5
REFUSALS = 3  # in a row, after which an engine that still speaks is taken for down


class Standing:
    """What is known of an engine's health. Threads share it.

    Attributes:
        healthy: it may be asked.
        in_flight: requests that it works on for us. failures: how often it failed.
        pause_s: until it is tried again after the next failure; it grows, until an answer is whole.
        suspect: it may not be what it was, and is to be verified before it is asked again.
        woken: set when it is to be looked at now.
        watched: somebody looks after it, so that no request has to try whether it is back.

    Args:
        concurrency: requests in flight at most.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.healthy, self.in_flight, self.failures = True, 0, 0
        self.pause_s, self._again_s, self._refusals, self.suspect = 0.0, 0.0, 0, False
        self.woken, self.watched = threading.Event(), False

    @property
    def load(self) -> float:
        """The share of its places that are taken."""
        return self.in_flight / self.concurrency

    @property
    def out_for_s(self) -> float:
        """How long it is not to be tried."""
        return max(0.0, self._again_s - time.perf_counter())

    def may_be_asked(self) -> bool:
        """Tell whether it is up, or its pause is over and only a request can show whether it is back."""
        return self.healthy or not (self.watched or self.out_for_s)

    def answered(self) -> None:
        """Note a whole answer."""
        self.healthy, self.pause_s, self._refusals = True, 0.0, 0

    def failed(self, error: EngineError) -> None:
        """Note a failure; an error that it answers with may be the request's fault, and has to come several times."""
        self.suspect |= isinstance(error, EngineChangedError)
        self.failures += 1
        self._refusals += 1
        if not isinstance(error, EngineFailedError) or self._refusals >= REFUSALS:
            self.down()
            self.woken.set()

    def down(self) -> None:
        """Ask it nothing for a while, each time for longer."""
        self.healthy, self._refusals = False, 0
        self.pause_s = min(max(GROWTH * self.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self._again_s = time.perf_counter() + self.pause_s

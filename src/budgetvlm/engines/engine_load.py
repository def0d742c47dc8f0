"""What an engine has to do for others, as it says itself (`/metrics`)."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from budgetvlm.engines.endpoint import Endpoint
from budgetvlm.errors import EngineError

EVERY_S = 1.0  # between two questions


class LoadOfOthers:
    """Asks an engine in the background how many requests run and wait, when somebody wants to know and not too often.

    Nobody waits for the answer; until there is one, and where an engine does not say, there are none.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self._requests, self._asked_s = endpoint, 0, -EVERY_S

    def requests(self) -> int:
        """Return how many there were when it was last asked, beside ours."""
        now_s = time.monotonic()
        if self._endpoint.dialect.load_metrics and now_s - self._asked_s >= EVERY_S:
            self._asked_s = now_s
            threading.Thread(target=self._ask, daemon=True).start()
        return self._requests

    def _ask(self) -> None:
        before = self._endpoint.in_flight
        with suppress(EngineError):
            said = round(sum(self._endpoint.client.load(self._endpoint.dialect)))
            self._requests = max(0, said - max(before, self._endpoint.in_flight))

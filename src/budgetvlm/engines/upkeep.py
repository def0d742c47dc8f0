"""Looks after one engine in the background: whether it answers, and whether one that is down is back and the same."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from budgetvlm.engines.endpoint import Endpoint
from budgetvlm.engines.token_counts import verify
from budgetvlm.errors import BudgetVLMError, EngineDownError

CHECK_S = 1.0  # between two looks at an engine that is up
SILENT_CHECKS = 2  # without an answer in a row, after which it is taken for down: a busy one may be slow
_log = logging.getLogger(__name__)


class Upkeep:
    """A thread that checks an engine until it is closed.

    Args:
        changed: called when the engine goes down or is back.
    """

    def __init__(self, endpoint: Endpoint, changed: Callable[[], None]) -> None:
        self._endpoint, self._changed = endpoint, changed
        self._closed, self._was_up, self._silent = False, endpoint.healthy, 0
        endpoint.watched, endpoint.suspect = True, not endpoint.healthy
        threading.Thread(target=self._run, name=f"upkeep of {endpoint.name}", daemon=True).start()

    def close(self) -> None:
        """End the thread after the check that is under way."""
        self._closed = True
        self._endpoint.woken.set()

    def _run(self) -> None:
        endpoint = self._endpoint
        while True:
            endpoint.woken.wait(CHECK_S if endpoint.healthy else endpoint.out_for_s)
            endpoint.woken.clear()
            if self._closed:
                return
            if endpoint.healthy or not endpoint.out_for_s:
                self._look()
            if self._was_up != endpoint.healthy:
                self._was_up = endpoint.healthy
                _log.warning("the engine at %s is %s", endpoint.name, "back" if self._was_up else "down")
                self._changed()

    def _look(self) -> None:
        endpoint = self._endpoint
        try:
            self._silent = 0 if endpoint.client.check(endpoint.dialect.health) else self._silent + 1
            if self._silent >= SILENT_CHECKS:
                raise EngineDownError(f"the engine at {endpoint.name} says nothing")
            if endpoint.suspect:
                verify(endpoint, strict=True)
                endpoint.suspect = False
            endpoint.healthy = True
        except EngineDownError:
            endpoint.suspect = True  # when it is back it may have been started with other flags
            endpoint.down()
            endpoint.client.break_off()
        except BudgetVLMError as error:
            _log.error("the engine at %s stays out: %s", endpoint.name, error)
            endpoint.down()

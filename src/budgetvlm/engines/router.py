"""Which engine of a fleet answers a setting."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from budgetvlm.engines.endpoint import Endpoint
from budgetvlm.errors import EngineDownError
from budgetvlm.knobs import Setting


class EngineRouter:
    """Picks the engine with the least to do among those that answer a setting. Threads share it."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self._changed = threading.Condition()

    def serving(self, setting: Setting) -> list[Endpoint]:
        """Return the engines that answer a setting."""
        return [one for one in self.endpoints if one.serves(setting)]

    @contextmanager
    def pick(self, setting: Setting, key: str | None = None) -> Iterator[Endpoint]:
        """Hold a place at an engine for a ``with`` block, and wait for one where all are taken.

        An engine that goes down in the block is left out from then on.

        Args:
            key: requests of one key had better go to the same engine.

        Raises EngineDownError: none that answers the setting is up.
        """
        with self._changed:
            while (found := self._least_busy(setting)) is None:
                self._changed.wait()
            found.in_flight += 1
        try:
            yield found
        except EngineDownError:
            found.healthy = False
            raise
        finally:
            with self._changed:
                found.in_flight -= 1
                self._changed.notify_all()

    def _least_busy(self, setting: Setting) -> Endpoint | None:
        """Return an engine with a free place; None: all are taken."""
        up = [one for one in self.serving(setting) if one.healthy]
        if not up:
            where = ", ".join(one.client.spec.url for one in self.serving(setting))
            raise EngineDownError(f"no engine that answers {setting} is up: {where}")
        free = [one for one in up if one.in_flight < one.client.spec.concurrency]
        return min(free, key=lambda one: one.in_flight / one.client.spec.concurrency, default=None)

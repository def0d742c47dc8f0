"""Which engine of a fleet answers a setting: one that is up, the cheapest with a free place, which has the least to do.

Of equal ones the same image goes to the same engine.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from PIL import Image

from budgetvlm.engines.endpoint import Endpoint
from budgetvlm.engines.upkeep import Upkeep
from budgetvlm.errors import EngineChangedError, EngineDownError, EngineError, EngineFailedError
from budgetvlm.knobs import Setting

T = TypeVar("T")
BUSIER = 0.25  # of its places, by which an engine may be fuller than the least busy one and still be taken for a key
TRIES = 3  # of a request that engines answer with an error of their own: it may be the request's fault
SEEN = (16, 16)  # pixels of an image by which it is known again
RETURNING_S, WAITING_S = 0.05, 1.0  # between two looks whether an engine is back, or has a place
PATIENCE_S = 10.0  # that a request without a deadline waits for an engine to come back


class EngineRouter:
    """Picks engines for requests. Threads share it.

    Attributes:
        patience_s: how long a request may wait for an engine of its setting to come back. 0 where another setting is
            the better answer to that.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints, self.patience_s = tuple(endpoints), PATIENCE_S
        self._changed = threading.Condition()
        self._upkeep: list[Upkeep] = []

    @property
    def slots(self) -> int:
        """Requests that all engines take at once."""
        return sum(one.client.spec.concurrency for one in self.endpoints)

    @property
    def capacity(self) -> int:
        """Requests that the engines which are up take at once."""
        return sum(one.client.spec.concurrency for one in self.endpoints if one.healthy)

    def serving(self, setting: Setting) -> list[Endpoint]:
        """Return the engines that answer a setting."""
        return [one for one in self.endpoints if one.serves(setting)]

    def is_up(self, setting: Setting) -> bool:
        """Tell whether an engine that answers a setting is up."""
        return any(one.may_be_asked() for one in self.serving(setting))

    def watch(self, changed: Callable[[], None]) -> None:
        """Look after the engines in the background; ``changed`` is called when one goes down or is back."""
        self._upkeep = [Upkeep(one, changed) for one in self.endpoints]

    def close(self) -> None:
        """Break off what is under way and close all connections."""
        for one in self._upkeep:
            one.close()
        for endpoint in self.endpoints:
            endpoint.client.close()

    def ask(
        self, setting: Setting, work: Callable[[Endpoint], T], *, key: bytes | None = None, end_s: float = math.inf,
        again: Callable[[], bool] = lambda: True,
    ) -> T:  # fmt: skip
        """Have an engine do some work, and another one where it fails, as long as there is time.

        Args:
            end_s: after which moment nothing is tried again.
            again: whether the work may be done anew after it failed.

        Raises EngineError: none that answers the setting is up, or none did the work.
        """
        give_up_s = min(end_s, time.perf_counter() + self.patience_s)
        failed: list[Endpoint] = []
        while True:
            with self.pick(setting, key, give_up_s, failed, end_s) as endpoint:
                try:
                    made = work(endpoint)
                    endpoint.answered()
                    return made
                except (EngineDownError, EngineChangedError) as error:
                    endpoint.failed(error)
                    failed.append(endpoint)
                    in_time = time.perf_counter() < end_s and (self.patience_s or self.is_up(setting))
                    if not (again() and in_time and self._may_try(error, len(failed))):
                        raise

    def _may_try(self, error: EngineError, tries: int) -> bool:
        """Tell whether another engine may be asked, or the same one later."""
        if isinstance(error, EngineChangedError):
            return not self.patience_s  # what is measured is measured no further
        return not isinstance(error, EngineFailedError) or tries < TRIES

    @contextmanager
    def pick(
        self, setting: Setting, key: bytes | None = None, give_up_s: float = 0.0, last: Sequence[Endpoint] = (),
        end_s: float = math.inf,
    ) -> Iterator[Endpoint]:  # fmt: skip
        """Hold a place at an engine for a ``with`` block, and wait for one where all are taken.

        Args:
            key: requests of one key go to the same engine, unless it is clearly busier than others.
            give_up_s: until when to wait for one to come back where all are down.
            last: those that are taken only where there is no other.
            end_s: until when to wait for a place.

        Raises EngineDownError: none that answers the setting is up, or has a place.
        """
        with self._changed:
            while (found := self._chosen(setting, key, give_up_s, last)) is None:
                left_s = end_s - time.perf_counter()
                if left_s <= 0:
                    raise EngineDownError(f"all engines that answer {setting} have as many requests as they take")
                self._changed.wait(min(left_s, WAITING_S if self.is_up(setting) else RETURNING_S))
            found.in_flight += 1
        try:
            yield found
        finally:
            with self._changed:
                found.in_flight -= 1
                self._changed.notify_all()

    def _chosen(
        self, setting: Setting, key: bytes | None, give_up_s: float, last: Sequence[Endpoint]
    ) -> Endpoint | None:
        """Return an engine with a free place; None: all are taken, or down and not for long."""
        up = [one for one in self.serving(setting) if one.may_be_asked()]
        if not up:
            if time.perf_counter() < give_up_s:
                return None
            where = ", ".join(one.client.spec.url for one in self.serving(setting))
            raise EngineDownError(f"no engine that answers {setting} is up: {where}")
        up = [one for one in up if one not in last] or up
        free = [one for one in up if one.load < 1]
        if not free:
            return None
        cheapest = min(one.client.spec.cost for one in free)
        free = [one for one in free if one.client.spec.cost == cheapest]
        least = min(one.load for one in free)
        if key is None:
            return min(free, key=lambda one: one.load)
        return max((one for one in free if one.load <= least + BUSIER), key=lambda one: _rank(key, one))


def key_of(images: Sequence[Image.Image]) -> bytes | None:
    """Return what requests about the same images have in common, read off some pixels; None: there is no image."""
    seen = [image.resize(SEEN, Image.Resampling.NEAREST).convert("RGB").tobytes() for image in images]
    return hashlib.blake2b(b"".join(seen), digest_size=16).digest() if seen else None


def _rank(key: bytes, endpoint: Endpoint) -> bytes:
    """Rank engines for a key: each key has an order of its own, which lasts when others come and go (rendezvous)."""
    return hashlib.blake2b(endpoint.client.spec.url.encode(), key=key, digest_size=8).digest()

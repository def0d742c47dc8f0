"""Requests that are equal are sent once: their answers, and the images in them, are remembered for a while."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from PIL import Image

from budgetvlm._io import to_rgb

T = TypeVar("T")


class Remembered(Generic[T]):
    """What was made last, by a key; of what was made longest ago the room is taken. Threads may share it.

    Args:
        most: room, in the units of ``size``.
        size: of one value; None: each counts 1.
    """

    def __init__(self, most: int, size: Callable[[T], int] | None = None) -> None:
        self._most, self._size, self._held = most, size or (lambda value: 1), 0
        self._values: dict[Hashable, T] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made for a key, or make it."""
        found = self._values.get(key)
        if found is not None:
            return found
        found = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = found
                self._held += self._size(found)
            while self._held > self._most:
                self._held -= self._size(self._values.pop(next(iter(self._values))))
        return found


def all_at_once(keys: Sequence[Hashable], make: Callable[[int], T], threads: int) -> list[T]:
    """Return what is made of each number, with equal keys made once, in threads. Raises what making raises."""
    first: dict[Hashable, int] = {}
    for number, key in enumerate(keys):
        first.setdefault(key, number)
    with ThreadPoolExecutor(max(1, min(threads, len(first)))) as pool:
        made = dict(zip(first, pool.map(make, first.values()), strict=True))
    return [made[key] for key in keys]


def digest_of(image: Image.Image) -> bytes:
    """Return a digest of an image's pixels."""
    return hashlib.blake2b(to_rgb(image).tobytes(), digest_size=16, key=repr(image.size).encode()).digest()

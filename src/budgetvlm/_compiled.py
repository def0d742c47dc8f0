"""Machine code of a module of loops, made by Numba and kept on disk.

The module is plain Python, and runs as such where nothing is compiled. Its machine code is kept in a folder that is
named after a digest of the module's source and of the constants that it imports: Numba notices a change of the file
that defines a function, but no change in other files.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

# Sums may be put in another order, so that they use vector instructions; infinity and NaN keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def compile_module(module: ModuleType) -> SimpleNamespace:
    """Every function that the module defines, compiled when it is first called.

    They call each other's machine code. They hold Python's lock, so no other thread changes what they read.
    """
    from numba import njit

    compiled = dict(vars(module))
    with _cache_in(_directory(module)):
        for name, function in vars(module).items():
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                same = FunctionType(function.__code__, compiled, name, function.__defaults__)
                compiled[name] = njit(cache=True, fastmath=_FAST, error_model="numpy")(same)
    return SimpleNamespace(**compiled)


class InBackground:
    """Something that takes long to make: a thread makes it, while others do without.

    Attributes:
        made: what was made; None where it is not there yet.
    """

    def __init__(self) -> None:
        self.made: Any = None
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, make: Callable[[], Any]) -> None:
        """Begin to make it, if nobody has."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(make,), name="budgetvlm-compile", daemon=True)
                self._thread.start()

    def wait(self, seconds: float | None = None) -> Any:
        """It, once it is there; None if nobody began to make it, or it took longer. Raises what making it raised."""
        if self._thread is not None:
            self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        return self.made

    def _run(self, make: Callable[[], Any]) -> None:
        try:
            self.made = make()
        except Exception as error:  # all go on without; whoever waits is told
            self._error = error


def is_kept(module: ModuleType) -> bool:
    """Whether `mark_kept` has said that the machine code of this source is complete."""
    return (_directory(module) / "complete").exists()


def mark_kept(module: ModuleType) -> None:
    """Say that the machine code of this source has been written."""
    (_directory(module) / "complete").touch()


def _directory(module: ModuleType) -> Path:
    """Where the machine code of this source is kept."""
    assert module.__file__ is not None
    constants = sorted((name, value) for name, value in vars(module).items() if isinstance(value, (int, float)))
    digest = hashlib.sha256(Path(module.__file__).read_bytes() + repr(constants).encode()).hexdigest()[:16]
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "budgetvlm" / f"{module.__name__}-{digest}-{sys.implementation.cache_tag}"


@contextmanager
def _cache_in(directory: Path) -> Iterator[None]:
    """Numba asks for its directory when a function is decorated, and uses another where this one cannot be written."""
    from numba.core import config as numba_config

    config: Any = numba_config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(directory)
    try:
        yield
    finally:
        config.CACHE_DIR = before

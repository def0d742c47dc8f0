"""Import Transformers without the parts of it and of PyTorch that a single process without compilation never uses.

Opening a model takes some seconds, and most of them go into importing code for clusters (`torch.distributed.tensor`),
for compilation (`torch._dynamo`, with SymPy) and for losses of other models (with SciPy). `budgetvlm ask` answers one
request, so it leaves them out. What is left out is still there: a package is run when one of its names is first used.

This relies on how Transformers and PyTorch are put together, and what follows in the process can neither compile nor
run on several machines. So only a command that owns its process calls it, and `BUDGETVLM_FULL_IMPORTS=1` turns it off.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

FULL = "BUDGETVLM_FULL_IMPORTS"  # "1" imports everything


class _LatePackage(ModuleType):
    """A package whose own file runs when one of its names is first used; its modules can be imported before that."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return importlib.metadata.version(self.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        folders = self.__dict__.get("__path__", [])
        if not self.__dict__.get("_has_run") and PathFinder.find_spec(f"{self.__name__}.{name}", folders):
            return importlib.import_module(f"{self.__name__}.{name}")
        found = vars(self._run())
        if name in found:
            return found[name]
        if self is not sys.modules[self.__name__]:
            return getattr(sys.modules[self.__name__], name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def _run(self) -> ModuleType:
        """Run the package's file, once; it may put another module in its own place."""
        if not self.__dict__.get("_has_run"):
            self.__dict__["_has_run"] = True
            assert self.__spec__ is not None and self.__spec__.loader is not None
            self.__spec__.loader.exec_module(self)
        return sys.modules[self.__name__]


def _make_late(name: str, **names: Any) -> None:
    """Put a package that runs late, and stand-ins for some of its names, in the place of one not imported yet."""
    parent, _, last = name.rpartition(".")
    if name in sys.modules:
        return
    spec = PathFinder.find_spec(name, importlib.import_module(parent).__path__ if parent else None)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _LatePackage
    module.__dict__.update(names)
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], last, module)


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    """What a decorator of the compiler comes to where nothing is compiled."""
    return function if callable(function) else lambda decorated: decorated


def _late_function(package: str, name: str) -> Callable[..., Any]:
    """A function of a package that runs late; calling it runs the package."""

    def call(*args: Any, **options: Any) -> Any:
        late = sys.modules[package]
        if isinstance(late, _LatePackage):
            late._run()
        return getattr(late, name)(*args, **options)

    return call


@contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute inside the ``with`` block."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import Transformers and open one model inside the ``with`` block, without what is never used.

    Weights are not drawn inside the block, so every weight has to come from a file.
    """
    if os.environ.get(FULL) == "1" or "transformers" in sys.modules or "torch._dynamo" in sys.modules:
        yield
        return
    import torch
    import torch.distributed

    _make_late("scipy.optimize", linear_sum_assignment=_late_function("scipy.optimize", "linear_sum_assignment"))
    _make_late("torch._dynamo", assume_constant_result=_undecorated, disable=_undecorated, allow_in_graph=_undecorated)
    for name in ("transformers", "transformers.models", "pyarrow", "pyarrow.parquet"):
        _make_late(name)
    import transformers.utils

    with (
        _replaced(transformers.utils, "direct_transformers_import", lambda *_: sys.modules["transformers"]),
        _replaced(torch.distributed, "is_available", lambda: False),
        _replaced(torch.compiler, "disable", _undecorated),
        _replaced(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor),
        # without the device of a surrounding context, for which alone SymPy would be imported
        _replaced(torch, "arange", partial(torch.arange, device="cpu")),
    ):
        yield

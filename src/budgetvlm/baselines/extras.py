"""Packages that only some policies need: found, or named with the command that installs them."""

from __future__ import annotations

import importlib.util

from budgetvlm.errors import MissingExtraError

EXTRAS = {"sklearn": ("scikit-learn", "compare"), "vowpalwabbit": ("vowpalwabbit", "vw")}  # module: package, extra


def installed(module: str) -> bool:
    """Whether a module can be imported; it is not imported for that."""
    return importlib.util.find_spec(module) is not None


def require(module: str) -> None:
    """Raise MissingExtraError where one of `EXTRAS` is not installed."""
    if not installed(module):
        package, extra = EXTRAS[module]
        raise MissingExtraError(
            f"{package} is not installed, and this policy is learnt with it; pip install 'budgetvlm[{extra}]'"
        )

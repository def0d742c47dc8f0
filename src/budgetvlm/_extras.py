"""Packages that only some parts need: found, or named with the command that installs them."""

from __future__ import annotations

import importlib.util

from budgetvlm.errors import MissingExtraError


def installed(module: str) -> bool:
    """Tell whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str, extra: str, purpose: str) -> None:
    """Raise MissingExtraError, which says what to install, where a module is not there; nothing is imported."""
    if not installed(module):
        raise MissingExtraError(
            f"{module} is not installed; without it there is no {purpose}. "
            f"pip install 'budgetvlm[{extra}]', or in a clone pip install -e '.[{extra}]'"
        )

"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from budgetvlm.errors import ConfigError

EXTRAS = {  # module -> package, extra, what is missing without it
    "plotly": ("plotly", "report", "page with plots"),
    "captum": ("captum", "explain", "attribution"),
    "sklearn": ("scikit-learn", "explain", "surrogate tree"),
}


def require(module: str) -> None:
    """Raise ConfigError, which says what to install, where one of `EXTRAS` is not there; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        package, extra, purpose = EXTRAS[module]
        raise ConfigError(
            f"{package} is not installed; without it there is no {purpose}. pip install 'budgetvlm[{extra}]'"
        )

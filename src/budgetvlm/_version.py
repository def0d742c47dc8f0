"""The version of the package, and of what else influences a result."""

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """The versions of this package, of Python and of the named distributions."""
    import importlib.metadata
    import platform

    named = {name: importlib.metadata.version(name) for name in packages}
    return {"budgetvlm": __version__, "python": platform.python_version(), **named}

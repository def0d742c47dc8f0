"""The guard's file beside a controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetvlm._io import read_json, write_json
from budgetvlm.errors import CheckpointError, DataError
from budgetvlm.guard.adaptive import AdaptiveGuard

GUARD_FILE = "guard.json"


def load_guard(path: Path) -> AdaptiveGuard | None:
    """The guard beside a controller (a directory or a file in it), or None. Raises CheckpointError."""
    file = (path if path.is_dir() else path.parent) / GUARD_FILE
    if not file.exists():
        return None
    try:
        return AdaptiveGuard.from_dict(read_json(file))
    except DataError as error:
        raise CheckpointError(f"{file} is not usable: {error}") from None


def save_guard(document: dict[str, Any], directory: Path) -> Path:
    """Write a guard's document beside a controller; returns the file. Raises OutputError."""
    path = directory / GUARD_FILE
    write_json(path, document)
    return path

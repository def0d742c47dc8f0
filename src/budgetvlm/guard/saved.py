"""The guard's file beside a controller."""

from __future__ import annotations

import hashlib
import os
import platform
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
    """Write a guard's document beside a controller, with the machine; returns the file. Raises OutputError."""
    path = directory / GUARD_FILE
    write_json(path, {**document, "machine": this_machine()})
    return path


def is_from_elsewhere(path: Path) -> bool:
    """Whether the guard beside a controller was saved on a machine of another kind."""
    file = (path if path.is_dir() else path.parent) / GUARD_FILE
    return file.exists() and read_json(file).get("machine", this_machine()) != this_machine()


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A short digest of processor and number of cores; equal machines have equal ones, and it names none of them."""
    try:
        lines = sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")})
    except OSError:  # there is no such file beyond Linux
        lines = [platform.processor()]
    return hashlib.sha256(repr((lines, platform.machine(), os.cpu_count())).encode()).hexdigest()[:16]

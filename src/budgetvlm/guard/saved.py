"""The guard's file: beside its controller, or among the user's data where the controller comes with this package."""

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
PACKAGE = Path(__file__).resolve().parents[1]


def guard_file(controller: Path, *, saving: bool = False) -> Path:
    """The file of a controller's guard.

    Nothing is written into this package: the guard of a controller in it goes to ``budgetvlm/MODEL/`` in the user's
    data directory ($XDG_DATA_HOME, or ~/.local/share), and is taken from there as soon as there is one.

    Args:
        controller: the controller's directory or a file in it.
        saving: whether the guard is to be written.
    """
    directory = controller if controller.is_dir() else controller.parent
    beside = directory / GUARD_FILE
    if not directory.resolve().is_relative_to(PACKAGE):
        return beside
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    own = data / "budgetvlm" / directory.resolve().parent.name / GUARD_FILE
    return own if saving or own.exists() else beside


def load_guard(path: Path) -> AdaptiveGuard | None:
    """The guard of a controller (a directory or a file in it), or None. Raises CheckpointError."""
    file = guard_file(path)
    if not file.exists():
        return None
    try:
        return AdaptiveGuard.from_dict(read_json(file))
    except DataError as error:
        raise CheckpointError(f"{file} is not usable: {error}") from None


def save_guard(document: dict[str, Any], controller: Path) -> Path:
    """Write the document of a controller's guard, with the machine; returns the file. Raises OutputError."""
    path = guard_file(controller, saving=True)
    write_json(path, {**document, "machine": this_machine()})
    return path


def is_from_elsewhere(path: Path) -> bool:
    """Whether the guard of a controller was saved on a machine of another kind."""
    file = guard_file(path)
    return file.exists() and read_json(file).get("machine", this_machine()) != this_machine()


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A short digest of processor and number of cores; equal machines have equal ones, and it names none of them."""
    try:
        lines = sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")})
    except OSError:  # there is no such file beyond Linux
        lines = [platform.processor()]
    return hashlib.sha256(repr((lines, platform.machine(), os.cpu_count())).encode()).hexdigest()[:16]

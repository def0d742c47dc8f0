"""A journal of a sweep that is not finished: one JSON line a batch, on the disk before the next batch starts.

A line is whole or is dropped: what a kill leaves after the last line break is cut off when the journal is opened
again. The first line says what is measured; another sweep cannot go on with it. While a journal is open no other
process can open it (where the system has file locks).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from budgetvlm.errors import DataError, OutputError
from budgetvlm.profiling.results.result_files import identity

try:
    import fcntl
except ImportError:  # not on Windows: two sweeps into one directory are then the user's care
    fcntl = None  # type: ignore[assignment]

REMEDY = "To measure anew and replace what is there, add --overwrite; to keep it, give another --output_dir."


class Journal:
    """An append-only file of entries.

    Attributes:
        entries: what an earlier, killed run had finished, in its order, and all that was added since.

    Args:
        path: where; the directory is made.
        header: what is measured, JSON-able.

    Raises:
        OutputError: it belongs to another sweep, is in use, or cannot be written.
        DataError: it is damaged elsewhere than at its end.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: list[Any] = []
        self._file = self._open()
        try:
            self._recover({"journal": 1, **header})
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: Any) -> None:
        """Add an entry, which is on the disk when this returns. Raises OutputError, and has then not added it."""
        self._write(entry)
        self.entries.append(entry)

    def remove(self) -> None:
        """Close the journal and delete it: its entries lie elsewhere now."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__ or remove
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}. Choose a writable directory with --output_dir."
            ) from error
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise OutputError(
                f"{self.path} is in use by another sweep. Wait for it, or give another --output_dir."
            ) from None
        return file

    def _recover(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise DataError(f"{self.path} is damaged ({error}). {REMEDY}") from None
        if not lines:
            self._write(header)
            return
        differing = differences(lines[0], json.loads(json.dumps(header)))
        if differing:
            raise OutputError(
                f"an unfinished sweep lies in {self.path.parent}, made with other {', '.join(differing)}. {REMEDY}"
            )
        self.entries = lines[1:]

    def _write(self, entry: Any) -> None:
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}. Free some space and run again: what is finished is kept."
            ) from error


def differences(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """Return names of the entries of ``wanted`` that ``found`` lacks or has otherwise, wherever data and model lie."""
    theirs = identity(found)
    return [name for name, value in identity(wanted).items() if theirs.get(name) != value]

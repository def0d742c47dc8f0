"""A journal of a sweep that is not finished: one JSON line a batch, on the disk before the next batch starts.

A line is whole or is dropped: what a kill leaves after the last line break is cut off when the journal is opened
again. The first line says what is measured; another sweep cannot go on with it. While a journal is open no other
process can open it (where the system has file locks). Entries stay on the disk, so that a sweep of any length takes
little memory; whoever needs one again remembers where it lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
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

    Args:
        path: where; the directory is made.
        header: what is measured, JSON-able.

    Raises:
        OutputError: it belongs to another sweep, is in use, or cannot be written.
        DataError: it is damaged elsewhere than at its end.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._file = self._open()
        try:
            self._end = self._cut()
            self._reader = open(path, "rb")  # noqa: SIM115 - closed with the file
            self._recover({"journal": 1, **header})
        except BaseException:
            self._file.close()
            raise

    @property
    def entries(self) -> list[Any]:
        """All entries, in their order: those of an earlier, killed run first."""
        return [entry for _, entry in self.placed()]

    def placed(self) -> Iterator[tuple[int, Any]]:
        """Yield each entry with its place in the file. Raises DataError: it is damaged elsewhere than at its end."""
        place = self._start
        while place < self._end:
            entry, after = self.read(place), self._reader.tell()
            yield place, entry
            place = after

    def read(self, place: int) -> Any:
        """Return the entry at a place. Raises DataError: it is damaged."""
        self._reader.seek(place)
        try:
            return json.loads(self._reader.readline())
        except ValueError as error:
            raise DataError(f"{self.path} is damaged ({error}). {REMEDY}") from None

    def append(self, entry: Any) -> int:
        """Add an entry, which is on the disk when this returns; return its place.

        Raises OutputError, and has then not added it.
        """
        place = self._end
        self._write(entry)
        return place

    def remove(self) -> None:
        """Close the journal and delete it: its entries lie elsewhere now."""
        self.path.unlink(missing_ok=True)
        self._close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        self._file.close()
        self._reader.close()

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

    def _cut(self) -> int:
        """Cut off a line that is not whole; return the length of the rest."""
        with open(self.path, "rb") as file:
            length = sum(len(line) for line in file if line.endswith(b"\n"))
        self._file.truncate(length)
        return length

    def _recover(self, header: dict[str, Any]) -> None:
        if not self._end:
            self._write(header)
        found = self.read(0)
        self._start = self._reader.tell()
        differing = differences(found, json.loads(json.dumps(header)))
        if differing:
            raise OutputError(
                f"an unfinished sweep lies in {self.path.parent}, made with other {', '.join(differing)}. {REMEDY}"
            )

    def _write(self, entry: Any) -> None:
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._end)
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}. Free some space and run again: what is finished is kept."
            ) from error
        self._end += len(line)


def differences(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """Return names of the entries of ``wanted`` that ``found`` lacks or has otherwise, wherever data and model lie."""
    theirs = identity(found)
    return [name for name, value in identity(wanted).items() if theirs.get(name) != value]

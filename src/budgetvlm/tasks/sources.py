"""Rows of local files: Parquet, JSON lines, CSV, folders of images with a list of them. Read as they are needed.

Of a Parquet file one row group is held at a time. The images of the other formats are files of their own, named in
a column, relative to the list's folder.
"""

from __future__ import annotations

import csv
import glob
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from budgetvlm._io import first_few, json_lines, reading_text
from budgetvlm.errors import DataError
from budgetvlm.tasks.layouts import SPLIT_NAMES
from budgetvlm.tasks.stored_types import decoded, features_of, plain_numbers

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT = (".jsonl", ".json", ".csv", ".tsv")
FORMATS = "Parquet (.parquet), JSON lines (.jsonl, .json), CSV (.csv, .tsv), or a folder with metadata.jsonl or .csv"

Row = dict[str, Any]


class Source(Protocol):
    """One split as numbered rows.

    Attributes:
        name: for messages.
        columns: their names.
    """

    name: str

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def rows(self, columns: Sequence[str], wanted: np.ndarray | None = None) -> Iterator[tuple[int, Row]]:
        """Yield numbers and rows in order; of all rows or of the ``wanted`` numbers (sorted)."""
        ...

    def value(self, row: int, column: str) -> Any:
        """Read one value anew: an image is not kept."""
        ...

    def folder(self, row: int) -> Path | None:
        """Return what image files are named relative to."""
        ...


class ParquetSource:
    """Rows of Parquet files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.name = first_few(map(str, paths), 2)
        self._files = [_parquet(path) for path in self.paths]
        self._features = [features_of(file.schema_arrow) for file in self._files]
        groups = [(f, g) for f, file in enumerate(self._files) for g in range(file.metadata.num_row_groups)]
        sizes = [self._files[f].metadata.row_group(g).num_rows for f, g in groups]
        self._groups, self._starts = groups, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._held: tuple[int, str, pa.Table] | None = None

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for file in self._files for name in file.schema_arrow.names))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, columns: Sequence[str], wanted: np.ndarray | None = None) -> Iterator[tuple[int, Row]]:
        for group, (start, end) in enumerate(zip(self._starts[:-1], self._starts[1:], strict=True)):
            numbers = np.arange(start, end)
            if wanted is not None:
                numbers = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)]
            if len(numbers):
                table, features = self._read(group, columns)
                found = table.take(pa.array(numbers - start)).to_pylist() or [{}] * len(numbers)  # no such column
                for number, row in zip(numbers.tolist(), found, strict=True):
                    yield number, {name: decoded(features.get(name), row.get(name)) for name in columns}

    def value(self, row: int, column: str) -> Any:
        group = self._group(row)
        if self._held is None or self._held[:2] != (group, column):
            self._held = (group, column, self._read(group, [column])[0])
        held = self._held[2]
        return held.column(column)[row - int(self._starts[group])].as_py() if held.num_columns else None

    def folder(self, row: int) -> Path | None:
        return self.paths[self._groups[self._group(row)][0]].parent

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _read(self, group: int, columns: Sequence[str]) -> tuple[pa.Table, dict[str, Any]]:
        """Return the columns that the group's file has, and their features."""
        file, number = self._groups[group]
        there = [name for name in columns if name in self._files[file].schema_arrow.names]
        with _reading_parquet(self.paths[file]):
            return plain_numbers(self._files[file].read_row_group(number, columns=there)), self._features[file]


class TextSource:
    """Rows of JSON lines or CSV files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.name = first_few(map(str, paths), 2)

    @property
    def columns(self) -> tuple[str, ...]:
        return self._facts[0]

    @cached_property
    def _facts(self) -> tuple[tuple[str, ...], list[int]]:
        """The columns that any row has, and the number of rows of each file."""
        columns: dict[str, None] = {}
        sizes = []
        for path in self.paths:
            sizes.append(0)
            for row in _records(path):
                columns |= dict.fromkeys(row)
                sizes[-1] += 1
        return tuple(columns), sizes

    def __len__(self) -> int:
        return sum(self._facts[1])

    def rows(self, columns: Sequence[str], wanted: np.ndarray | None = None) -> Iterator[tuple[int, Row]]:
        chosen = None if wanted is None else set(wanted.tolist())
        for number, row in enumerate(row for path in self.paths for row in _records(path)):
            if chosen is None or number in chosen:
                yield number, {column: row.get(column) for column in columns}

    def value(self, row: int, column: str) -> Any:
        return next(values[column] for _, values in self.rows([column], np.array([row])))

    def folder(self, row: int) -> Path | None:
        ends = np.cumsum(self._facts[1])
        return self.paths[int(np.searchsorted(ends, row, side="right"))].parent


def open_source(paths: Sequence[Path]) -> Source:
    """Open files of one format as rows. Raises DataError: no, an unknown or several formats, or an unreadable file."""
    kinds = {path.suffix.lower() for path in paths}
    if kinds == {".parquet"}:
        return ParquetSource(paths)
    if kinds and kinds <= set(TEXT):
        return TextSource(paths)
    raise DataError(f"{first_few(map(str, paths), 2)}: not a format that is read. Give {FORMATS}; one format a split.")


def find_files(text: str) -> dict[str, list[Path]]:
    """Split -> files, of "a.parquet", "x/*.parquet", "folder", "train=a.jsonl,test=b.jsonl".

    A file without a split belongs to the split named before it, or to the one that its name starts with, or to train.

    Raises:
        DataError: there is no such file, or a folder without a list of its images.
    """
    found: dict[str, list[Path]] = {}
    current: str | None = None
    for part in filter(None, (part.strip() for part in text.split(","))):
        before, sign, pattern = part.partition("=")
        named = canonical_split(before.strip()) if sign else None
        current, pattern = (named, pattern.strip()) if named else (current, part)
        for path in _expand(pattern):
            found.setdefault(current or _split_of(path, Path(pattern)), []).append(path)
    if not found:
        raise DataError(f"data_files={text!r} names no file. Give {FORMATS}.")
    return found


def canonical_split(name: str) -> str | None:
    """Return train, validation or test for any of their usual names; None for another word."""
    return next((ours for ours, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _split_of(path: Path, given: Path) -> str:
    """Tell the split by the name of the file, or of its folder within the folder that was given; else train."""
    start = path.name.replace("_", "-").replace(".", "-").split("-")[0]
    inner = path.parent.name if path.parent.parent == given.expanduser() else ""
    return canonical_split(start) or canonical_split(inner) or "train"


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return _in_folder(path)
    names = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not names:
        raise DataError(
            f"data_files: {pattern} does not exist. Give {FORMATS}; a relative name starts at {Path.cwd()}."
        )
    return names


def _in_folder(path: Path) -> list[Path]:
    """Find a folder's list of images, those of its sub-folders, or its Parquet files."""
    for pattern in (*LISTS, *(f"*/{name}" for name in LISTS), "*.parquet", "*/*.parquet"):
        names = sorted(path.glob(pattern))
        if names:
            return names
    raise DataError(
        f"data_files: the folder {path} has no list of its images. Put a metadata.jsonl or metadata.csv there, with a "
        "column file_name and columns for the question and its answers."
    )


def _parquet(path: Path) -> pq.ParquetFile:
    with _reading_parquet(path):
        return pq.ParquetFile(path)


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); it may be truncated. Fetch it again.") from None


def _records(path: Path) -> Iterator[Row]:
    if path.suffix.lower() not in (".csv", ".tsv"):
        yield from (row for _, row in json_lines(path))
        return
    with reading_text(path) as file:
        yield from _cells(file, path)


def _cells(file: TextIO, path: Path) -> Iterator[Row]:
    """Read rows of cells; an image in base64 is a cell of megabytes, and a cell that is not there is a gap."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(names) == 1 and (other := re.search("[;|\t,]", names[0])):
            raise DataError(
                f"{path}: its columns are parted by {other[0]!r}. Save it with {reader.dialect.delimiter!r}"
            )
        twice = [name for name in names if name and names.count(name) > 1]
        if twice:
            raise DataError(f"{path} has two columns {twice[0]!r}. Give each a name of its own.")
        for row in reader:
            if len(row) > len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} cells, but the first line names {len(names)} columns. "
                    "Put cells with a separator in them into quotes."
                )
            if row:
                yield {name: cell for name, cell in zip_longest(names, row) if name}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}. Is it {path.suffix[1:].upper()}?") from None

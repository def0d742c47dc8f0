"""Rows of a data set on the hub of Hugging Face, by its library `datasets`: fetched once, then mapped from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.tasks.sources import Row
from budgetvlm.tasks.stored_types import decoded, encoded_only

LOCAL = "or give files that you have with --data_files"


class HubSource:
    """One split of a repository. Only the files of this split are fetched.

    Args:
        repository: its id, or a folder laid out like one.
        split: the data set's name of the split; its files are ``<folder>/<split>-*``.

    Raises:
        ConfigError: the library is not installed.
        DataError: the repository is missing, gated, not reachable, or has no such files.
    """

    def __init__(self, repository: str, split: str, folder: str = "data") -> None:
        self.name = f"{repository} ({split})"
        self._narrow: dict[tuple[str, ...], Any] = {}
        self._rows = _undecoded(_load(repository, split, f"{folder}/{split}-*"))
        self._features = encoded_only(self._rows.features.to_dict())

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._rows.column_names)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, columns: Sequence[str], wanted: np.ndarray | None = None) -> Iterator[tuple[int, Row]]:
        chosen = self._only(tuple(columns))
        found = enumerate(chosen) if wanted is None else zip(wanted.tolist(), chosen.select(wanted), strict=True)
        for number, row in found:
            yield number, {name: decoded(self._features.get(name), value) for name, value in row.items()}

    def value(self, row: int, column: str) -> Any:
        return self._only((column,))[row][column]

    def _only(self, columns: tuple[str, ...]) -> Any:
        """Select some columns; done once for each selection, since the library takes its time for it."""
        if columns not in self._narrow:
            self._narrow[columns] = self._rows.select_columns(list(columns))
        return self._narrow[columns]

    def folder(self, row: int) -> Path | None:
        return None


def _load(repository: str, split: str, pattern: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"reading {repository} needs the package datasets, which is not installed. Install it with "
            f"pip install 'budgetvlm[data]' (in a clone: pip install -e '.[data]'), {LOCAL}."
        ) from None
    try:
        return datasets.load_dataset(
            repository, data_files={split: pattern}, split=split, verification_mode="no_checks"
        )
    except Exception as error:
        raise DataError(_explain(repository, pattern, error)) from error


def _explain(repository: str, pattern: str, error: Exception) -> str:
    """Say what failed and what to do; the library raises many types, and its messages tell them apart best."""
    said = f"{type(error).__name__}: {error}"
    lower = said.lower()
    if "gated" in lower:
        return (
            f"{repository} is gated: ask for access on its page, then log in with `hf auth login` (or set HF_TOKEN), "
            f"{LOCAL}."
        )
    if "offline" in lower or "couldn't reach" in lower or "connection" in lower or "couldn't find cache" in lower:
        return (
            f"{repository} is not in the cache and the hub cannot be reached ({said}). Connect (and unset "
            f"HF_HUB_OFFLINE), {LOCAL}."
        )
    if "doesn't exist" in lower or "notfound" in lower:
        return (
            f"{repository} does not exist on the hub, has no files {pattern}, or is private ({said}). Give another "
            f"one with --repository, log in with `hf auth login`, {LOCAL}."
        )
    return f"{repository} cannot be loaded ({said}). Try again, {LOCAL}."


def _undecoded(rows: Any) -> Any:
    """Keep images as {"bytes", "path"}: they are decoded one by one, so that a corrupt one harms no other."""
    import datasets

    for name, feature in rows.features.items():
        kind = type(feature).__name__
        if kind in ("Image", "Json"):  # the library reads "007" in JSON as 7
            rows = rows.cast_column(name, getattr(datasets, kind)(decode=False))
    return rows

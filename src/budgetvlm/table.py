"""The profile table: what was measured, for every sample and every setting. The waist of the system.

Profiling writes it, learning reads it, and anybody can make one from arrays; it knows nothing of any model.
Shapes: S samples, K settings; column k is ``knob_space.settings[k]``. On disk it is one Parquet file with a row a
sample; knob space, metadata and schema version are in the Parquet schema's own metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from budgetvlm._io import atomic_path, check_schema, first_few, header_text, time_text
from budgetvlm.errors import ConfigError, DataError, KnobSpaceError
from budgetvlm.knobs import KnobSpace

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
STAGES_AT_MOST = 1.5  # times the latency
UNIT, DATASET = "unit", "dataset"  # what names the label of `unit` in the metadata; the label of several data sets
TEST_SHARE, LEAST_UNITS = 0.2, 10  # that is held out unasked, and of how many units at least
_HEADER = b"budgetvlm.profile_table"


@dataclass(frozen=True, eq=False)
class ProfileTable:
    """Accuracy and latency of every setting on every sample.

    Attributes:
        knob_space: names and values of the knobs; its settings are the K columns.
        sample_ids: ``[S]``, unique.
        accuracy: float32 ``[S, K]``, 0 to 1, NaN where not measured.
        latency_ms: float32 ``[S, K]``, end to end, above 0, NaN where not measured.
        stages_ms: stage -> float32 ``[S, K]``, 0 or more, NaN where not measured.
        tokens: kind -> float32 ``[S, K]`` counts, for example "vision", "language", "output"; NaN where not known.
        groups: label -> ``[S]`` strings, for example "image_id", "kind", "difficulty".
        split: ``[S]`` of `SPLITS`, or None. Splits never share a unit.
        metadata: how it was made; JSON-able. Its "unit" names the label of `unit`.

    Raises:
        DataError: anything above does not hold; all problems are named at once.
    """

    knob_space: KnobSpace
    sample_ids: tuple[str, ...]
    accuracy: np.ndarray
    latency_ms: np.ndarray
    stages_ms: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    split: tuple[str, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(_problems(self)) or list(_stage_problems(self))
        if problems:
            raise DataError("not a profile table: " + "; ".join(problems))

    @classmethod
    def from_arrays(
        cls,
        knob_space: KnobSpace,
        sample_ids: Sequence[str | int],
        accuracy: Any,
        latency_ms: Any,
        *,
        stages_ms: Mapping[str, Any] | None = None,
        tokens: Mapping[str, Any] | None = None,
        groups: Mapping[str, Sequence[Any]] | None = None,
        split: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ProfileTable:
        """Make a table from anything array-like; numbers become float32, ids and labels strings. Raises DataError."""
        return cls(
            knob_space=knob_space,
            sample_ids=tuple(str(name) for name in sample_ids),
            accuracy=_float32(accuracy, "accuracy"),
            latency_ms=_float32(latency_ms, "latency_ms"),
            stages_ms={name: _float32(values, f"stage {name}") for name, values in (stages_ms or {}).items()},
            tokens={name: _float32(values, f"tokens {name}") for name, values in (tokens or {}).items()},
            groups={name: tuple(str(label) for label in labels) for name, labels in (groups or {}).items()},
            split=None if split is None else tuple(str(name) for name in split),
            metadata=dict(metadata or {}),
        )

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.sample_ids)

    @property
    def num_settings(self) -> int:
        """K."""
        return self.knob_space.num_settings

    @property
    def unit(self) -> str:
        """The label whose samples belong together in splits and intervals; "sample_id" where each stands alone."""
        return str(self.metadata.get(UNIT, "image_id" if "image_id" in self.groups else "sample_id"))

    @property
    def units(self) -> tuple[str, ...]:
        """The unit of each sample, ``[S]``."""
        return self.sample_ids if self.unit == "sample_id" else self.groups[self.unit]

    @property
    def unit_name(self) -> str:
        """What a unit is called: "image", "document", "sample"."""
        return self.unit.removesuffix("_id")

    def grouped_by(self, label: str) -> ProfileTable:
        """Return the same table with another `unit`, of `groups` or "sample_id". Raises DataError: splits share one."""
        return replace(self, metadata={**self.metadata, UNIT: label})

    def __len__(self) -> int:
        return self.num_samples

    def subset(self, which: str | np.ndarray | Sequence[int] | Sequence[bool]) -> ProfileTable:
        """Return the rows of one split (by name), of a boolean mask ``[S]`` or of an integer index array.

        Raises:
            DataError: no split is stored, that side is empty, or the rows do not exist.
        """
        rows = self.rows_of(which) if isinstance(which, str) else self._rows(np.asarray(which))
        return replace(
            self,
            sample_ids=_take(self.sample_ids, rows),
            accuracy=self.accuracy[rows],
            latency_ms=self.latency_ms[rows],
            stages_ms={name: values[rows] for name, values in self.stages_ms.items()},
            tokens={name: values[rows] for name, values in self.tokens.items()},
            groups={name: _take(labels, rows) for name, labels in self.groups.items()},
            split=None if self.split is None else _take(self.split, rows),
        )

    def thinned(self, most: int) -> ProfileTable:
        """Return the table, or ``most`` of its samples if it has more, evenly spread over its rows."""
        count = self.num_samples
        return self if count <= most else self.subset(np.linspace(0, count - 1, most).astype(np.int64))

    def rows_of(self, split: str) -> np.ndarray:
        """Return which rows a split has, int64, ascending. Raises DataError: no split is stored, or it is empty."""
        if self.split is None:
            raise DataError(f"no {split!r} rows: the table stores no splits. Give it some with with_splits().")
        rows = np.flatnonzero(np.array(self.split) == split)
        if not len(rows):
            sides = ", ".join(sorted(set(self.split)))
            raise DataError(f"split {split!r} is empty; this table has: {sides}. Split it anew with with_splits().")
        return rows

    def with_splits(self, fractions: Mapping[str, float], seed: int = 0, by: str | None = None) -> ProfileTable:
        """Return the same table with new splits, drawn over the units, so that none is on two sides.

        ``fractions``: split -> share of the units; the shares sum to 1 and a share of 0 leaves the split out. ``by``: a
        label that becomes the `unit`. Raises ConfigError: shares that cannot work, or that leave a side empty;
        DataError: there is no label ``by``.
        """
        table = replace(self, split=None)
        table = table if by is None else table.grouped_by(by)
        side_of = draw_splits(table.units, fractions, seed)
        return replace(table, split=tuple(side_of[unit] for unit in table.units))

    def shares_of_splits(self, train_split: float, test_split: float | None = None) -> dict[str, float]:
        """Return shares for `with_splits`: ``train_split`` of what is not held out for testing.

        ``test_split``: what is held out; None: `TEST_SHARE` where there are `LEAST_UNITS`, else nothing.
        """
        test = TEST_SHARE * (len(set(self.units)) >= LEAST_UNITS) if test_split is None else test_split
        return {"train": train_split * (1 - test), "validation": (1 - train_split) * (1 - test), "test": test}

    def save(self, path: str | Path) -> None:
        """Write one Parquet file, whole or not at all. Raises OutputError, or DataError: metadata that is not JSON."""
        arrow = _to_arrow(self)
        with atomic_path(path) as temporary:
            pq.write_table(arrow, temporary, compression="zstd")

    @classmethod
    def load(cls, path: str | Path) -> ProfileTable:
        """Read a table that `save` wrote. Raises DataError: the file is missing, truncated, or not such a table."""
        path = Path(path)
        arrow, header = _read(path)
        try:
            table = _from_arrow(arrow, header)
        except (KeyError, TypeError, ValueError, KnobSpaceError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is not a usable profile table: {error}. Make it again.") from error
        del arrow
        pa.default_memory_pool().release_unused()  # it would keep twice what the table takes
        return table

    def _rows(self, which: np.ndarray) -> np.ndarray:
        if which.dtype == bool:
            if which.shape != (self.num_samples,):
                raise DataError(f"a mask of shape {which.shape} does not fit a table of {self.num_samples} samples")
            which = np.flatnonzero(which)
        if which.ndim != 1 or not len(which) or not np.issubdtype(which.dtype, np.integer):
            raise DataError("a subset needs a split's name, a boolean mask or row numbers, with a row at least")
        if which.min() < -self.num_samples or which.max() >= self.num_samples:
            raise DataError(f"row numbers {which.min()} to {which.max()} go beyond the {self.num_samples} samples")
        return which


def draw_splits(labels: Sequence[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Assign each label to a split at random. Raises ConfigError: shares that cannot work, or leave a side empty."""
    wanted = {name: float(share) for name, share in fractions.items() if share != 0}
    if not wanted or set(wanted) - set(SPLITS) or min(wanted.values()) < 0 or abs(sum(wanted.values()) - 1) > 1e-6:
        raise ConfigError(f"splits need shares of {', '.join(SPLITS)} that sum to 1; given: {dict(fractions)}")
    units = sorted(set(labels))
    order = np.random.default_rng(seed).permutation(len(units))
    cuts = np.rint(np.cumsum(list(wanted.values())) * len(units)).astype(int)
    sizes = np.diff(cuts, prepend=0)
    if sizes.min() < 1:
        empty = list(wanted)[int(sizes.argmin())]
        raise ConfigError(
            f"a share of {wanted[empty]:.3g} leaves split {empty!r} empty: there are {len(units)} images (or other "
            "groups) to share out. Profile more, or choose other shares or smaller groups."
        )
    sides = np.repeat(list(wanted), sizes)
    return {units[unit]: str(side) for unit, side in zip(order, sides, strict=True)}


def _problems(table: ProfileTable) -> Iterator[str]:
    shape = (table.num_samples, table.num_settings)
    if not table.sample_ids:
        yield "it has no samples"
    if len(set(table.sample_ids)) != len(table.sample_ids):
        repeated = {name for name, count in Counter(table.sample_ids).items() if count > 1}
        yield f"sample ids occur more than once: {first_few(repeated)}"
    yield from _number_problems("accuracy", table.accuracy, shape, "between 0 and 1", 0.0, 1.0)
    yield from _number_problems("latency_ms", table.latency_ms, shape, "above 0", float(np.finfo("f4").tiny), np.inf)
    for kind, matrices in (("stage", table.stages_ms), ("tokens", table.tokens)):
        for name, values in matrices.items():
            yield from _number_problems(f"{kind} {name}", values, shape, "0 or more", 0.0, np.inf)
    for name, labels in table.groups.items():
        if len(labels) != table.num_samples:
            yield f"group {name!r} has {len(labels)} labels for {table.num_samples} samples"
    if table.unit not in (*table.groups, "sample_id"):
        yield f"samples cannot be grouped by {table.unit!r}: the labels are {', '.join(table.groups) or 'none'}"
    elif table.split is not None and len(table.units) == table.num_samples:
        yield from _split_problems(table, table.split)


def _stage_problems(table: ProfileTable) -> Iterator[str]:
    """Stages are parts of the latency. Predicted ones may exceed it a little; those of another unit do so by far."""
    total: Any = sum(np.nan_to_num(values) for values in table.stages_ms.values())
    wrong = np.argwhere(total > STAGES_AT_MOST * table.latency_ms + 1)
    for row, column in wrong[:1]:
        yield (
            f"the stages of sample {table.sample_ids[row]} are {time_text(total[row, column])} in all, and its latency "
            f"is {time_text(table.latency_ms[row, column])} ({len(wrong)} such cells); give both in one unit"
        )


def _number_problems(
    name: str, values: np.ndarray, shape: tuple[int, int], allowed: str, low: float, high: float
) -> Iterator[str]:
    if values.dtype != np.float32:
        yield f"{name} is {values.dtype}, not float32 (use ProfileTable.from_arrays)"
    elif values.shape != shape:
        yield f"{name} has shape {values.shape}; {shape[0]} samples x {shape[1]} settings need {shape}"
    else:
        wrong = (values < low) | (values > high) | np.isinf(values)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            yield f"{name}[{row}, {column}] is {values[row, column]}; it has to be {allowed}, or NaN if not measured"


def _split_problems(table: ProfileTable, split: tuple[str, ...]) -> Iterator[str]:
    if len(split) != table.num_samples:
        yield f"split has {len(split)} entries for {table.num_samples} samples"
        return
    unknown = set(split) - set(SPLITS)
    if unknown:
        yield f"unknown splits {first_few(unknown)}; allowed: {', '.join(SPLITS)}"
    sides: dict[str, str] = {}
    shared = {unit for unit, side in zip(table.units, split, strict=True) if sides.setdefault(unit, side) != side}
    if shared:
        yield f"splits share {len(shared)} {table.unit_name}s ({first_few(shared)}); draw splits by {table.unit_name}"


def _float32(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not an array of numbers: {error}") from None


def _take(values: Sequence[str], rows: np.ndarray) -> tuple[str, ...]:
    return tuple(values[row] for row in rows)


def _to_arrow(table: ProfileTable) -> pa.Table:
    columns: dict[str, Any] = {"sample_id": pa.array(table.sample_ids, pa.string())}
    if table.split is not None:
        columns["split"] = pa.array(table.split, pa.string())
    for name, labels in table.groups.items():
        columns[f"group.{name}"] = pa.array(labels, pa.string())
    matrices = {"accuracy": table.accuracy, "latency_ms": table.latency_ms}
    matrices |= {f"stage.{name}": values for name, values in table.stages_ms.items()}
    matrices |= {f"tokens.{name}": values for name, values in table.tokens.items()}
    for name, values in matrices.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), table.num_settings)
    header = {"schema_version": SCHEMA_VERSION, "knobs": table.knob_space.to_dict(), "metadata": table.metadata}
    return pa.table(columns).replace_schema_metadata({_HEADER: header_text(header, "table").encode()})


def _read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; `budgetvlm prepare` and `import` write a profile table (.parquet)")
    try:
        arrow = pq.read_table(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file, or truncated ({error}). Make it again.") from None
    text = (arrow.schema.metadata or {}).get(_HEADER)
    if text is None:
        raise DataError(f"{path} is a Parquet file but no profile table; write one with ProfileTable.save()")
    header: dict[str, Any] = json.loads(text)
    check_schema(path, header, SCHEMA_VERSION)
    return arrow, header


def _from_arrow(arrow: pa.Table, header: Mapping[str, Any]) -> ProfileTable:
    space = KnobSpace(header["knobs"])
    names = arrow.column_names

    def matrix(name: str) -> np.ndarray:
        flat = arrow[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.array(flat, dtype=np.float32).reshape(arrow.num_rows, -1)  # a copy: Arrow's buffers are read-only

    def matrices(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): matrix(name) for name in names if name.startswith(prefix)}

    return ProfileTable.from_arrays(
        space,
        arrow["sample_id"].to_pylist(),
        matrix("accuracy"),
        matrix("latency_ms"),
        stages_ms=matrices("stage."),
        tokens=matrices("tokens."),
        groups={name.removeprefix("group."): arrow[name].to_pylist() for name in names if name.startswith("group.")},
        split=arrow["split"].to_pylist() if "split" in names else None,
        metadata=header["metadata"],
    )

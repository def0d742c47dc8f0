"""Plain tables of other programs: CSV, Parquet or JSON lines, a row for each sample at each setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, json, parquet

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.importing.measured_rows import Cells
from budgetvlm.knobs import KNOBS
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TOKEN_KINDS

PLAIN = ("sample_id", "score", "latency_ms")
USUAL = {  # columns that are taken without being asked for
    "image_id": "group.image_id",
    **{column: f"stage.{stage}" for stage, column in STAGE_FIELDS.items()},
    **{f"num_{kind}_tokens": f"tokens.{kind}" for kind in TOKEN_KINDS},
}
UNITS = {"ms": 1.0, "s": 1000.0}
READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": csv.read_csv,
    ".tsv": partial(csv.read_csv, parse_options=csv.ParseOptions(delimiter="\t")),
    ".parquet": parquet.read_table,
    ".jsonl": json.read_json,
    ".ndjson": json.read_json,
}


def read_flat(
    path: Path,
    *,
    knobs: Sequence[str] = KNOBS,
    columns: Mapping[str, str] | None = None,
    score_scale: float = 1.0,
    latency_unit: str = "ms",
    optional: Sequence[str] = (),
) -> Cells:
    """Read a file.

    Args:
        knobs: the columns that are knobs.
        columns: what a column is -> its name in the file, where that is another: sample_id, score, latency_ms, a
            knob, image_id, stage.NAME, tokens.NAME, group.NAME.
        score_scale: the largest score; scores are divided by it.
        latency_unit: "ms" or "s", of the latency and the stages.
        optional: of sample_id, score and latency_ms: what may be missing.

    Raises:
        ConfigError: a mapping that means nothing.
        DataError: a file that cannot be read, a missing column, values that are no numbers.
    """
    wanted = {name: name for name in (*PLAIN, *knobs)} | _mapping(columns or {}, knobs)
    table = _read(path)
    taken = set(wanted.values())
    wanted |= {role: name for name, role in USUAL.items() if name in table.column_names and name not in taken}
    _require_columns(path, table, wanted, optional)
    present = {role: name for role, name in wanted.items() if name in table.column_names}
    return to_cells(str(path), table, present, knobs, score_scale=score_scale, latency_unit=latency_unit)


def to_cells(
    source: str,
    table: pa.Table,
    columns: Mapping[str, str],
    knobs: Sequence[str],
    *,
    score_scale: float = 1.0,
    latency_unit: str = "ms",
) -> Cells:
    """Take the columns of a table that mean something: what a column is -> its name. Scales as in `read_flat`.

    Raises:
        ConfigError: a scale that cannot be.
        DataError: values that are no numbers, ids or labels that are missing.
    """
    if latency_unit not in UNITS or not score_scale > 0:
        raise ConfigError(f"latency_unit={latency_unit!r} has to be ms or s, score_scale={score_scale} above 0")
    scales = dict.fromkeys(
        ["latency_ms", *(role for role in columns if role.startswith("stage."))], UNITS[latency_unit]
    )
    scales["score"] = 1 / score_scale
    values: dict[str, np.ndarray] = {name: np.full(len(table), np.nan) for name in ("score", "latency_ms")}
    labels = {}
    for role, name in columns.items():
        if role == "sample_id" or role.startswith("group."):
            labels[role] = _texts(source, table, name)
        else:
            values[role] = _numbers(source, table, name) * scales.get(role, 1.0)
    numbered = "sample_id" in columns and pa.types.is_integer(table.schema.field(columns["sample_id"]).type)
    sample_ids = labels.pop("sample_id", np.full(len(table), ""))
    return Cells(source, tuple(knobs), sample_ids, values, labels, by_index=numbered)


def _mapping(columns: Mapping[str, str], knobs: Sequence[str]) -> dict[str, str]:
    known = {*PLAIN, *knobs, "image_id"}
    unknown = [r for r in columns if r not in known and not r.startswith(("stage.", "tokens.", "group."))]
    if unknown:
        raise ConfigError(
            f"--column {unknown[0]}={columns[unknown[0]]} means nothing; left of = may stand "
            f"{', '.join([*PLAIN, *knobs, 'image_id'])}, stage.NAME, tokens.NAME, group.NAME"
        )
    return {"group.image_id" if role == "image_id" else role: name for role, name in columns.items()}


def _read(path: Path) -> pa.Table:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{path} is of no known kind; give a .csv, .tsv, .parquet or .jsonl file")
    try:
        return READERS[suffix](path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {error}") from None


def _require_columns(path: Path, table: pa.Table, wanted: Mapping[str, str], optional: Sequence[str]) -> None:
    missing = [(role, name) for role, name in wanted.items() if name not in table.column_names]
    missing = [(role, name) for role, name in missing if not (role in optional and role == name)]
    if missing:
        role = missing[0][0]
        raise DataError(
            f"{path} lacks the columns {', '.join(name for _, name in missing)}; it has "
            f"{', '.join(table.column_names)}. Say which is which with --column {role}=NAME, and which columns are "
            "knobs with --knobs a,b,c."
        )


def _numbers(source: str, table: pa.Table, name: str) -> np.ndarray:
    """Return a column as float64 ``[n]``, NaN for what is empty."""
    column = table[name]
    try:
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        values: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values.astype(np.float64)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{source}: column {name} is not a column of numbers: {error}") from None


def _texts(source: str, table: pa.Table, name: str) -> np.ndarray:
    """Return a column as strings ``[n]``."""
    column = table[name]
    if column.null_count:
        row = next(number for number, value in enumerate(column.to_pylist(), 1) if value is None)
        raise DataError(f"{source}: column {name} is empty in row {row}; every row needs one")
    return np.array([str(value) for value in column.to_pylist()], dtype=object)

"""Plain tables of other programs: CSV, Parquet or JSON lines, a row for each sample at each setting."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, csv, parquet

from budgetvlm._io import json_lines, reading_text, shortened
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.importing.measured_rows import Cells
from budgetvlm.knobs import KNOBS
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TOKEN_KINDS
from budgetvlm.tasks.stored_types import plain_numbers
from budgetvlm.tasks.values import as_id, as_label, is_gap, is_index, unpacked

PLAIN = ("sample_id", "score", "latency_ms")
INPUTS = ("question", "image")  # of a sample; columns that are asked for where features are made from them
LABELS = ("image_id", *INPUTS)  # columns that are labels of a sample, under their own name
USUAL = {  # columns that are taken without being asked for
    "image_id": "group.image_id",
    **{column: f"stage.{stage}" for stage, column in STAGE_FIELDS.items()},
    **{f"num_{kind}_tokens": f"tokens.{kind}" for kind in TOKEN_KINDS},
}
UNITS = {"ms": 1.0, "s": 1000.0}
KINDS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
ASKED_MS = 10.0  # a median below it may as well be in seconds: no request to a model is that quick
LONGEST_MS = 600_000.0  # a median above it is in another unit
FASTER = 200.0  # times the median that no setting is faster; another unit is 1000 times
_SECONDS = re.compile(r"(?:^|[_ .(])(?:s|secs?|seconds?)\)?$", re.IGNORECASE)
_OTHER_UNIT = re.compile(r"(?:^|[_ .(])(?:[nuµμ]s|(?:nano|micro)s\w*|mins?|minutes?|hours?)\)?$", re.IGNORECASE)


def read_flat(
    path: Path,
    *,
    knobs: Sequence[str] = KNOBS,
    columns: Mapping[str, str] | None = None,
    score_scale: float = 1.0,
    latency_unit: str | None = None,
    optional: Sequence[str] = (),
    inputs: bool = False,
) -> Cells:
    """Read a file.

    Args:
        knobs: the columns that are knobs.
        columns: what a column is -> its name in the file, where that is another: sample_id, score, latency_ms, a
            knob, image_id, question, image, stage.NAME, tokens.NAME, group.NAME.
        score_scale: the largest score; scores are divided by it.
        latency_unit: "ms" or "s", of the latency and the stages; None: ms, unless they look like another.
        optional: of sample_id, score and latency_ms: what may be missing.
        inputs: take the columns question and image too, where there are any.

    Raises:
        ConfigError: a mapping that means nothing.
        DataError: a file that cannot be read, a missing column, values that are no numbers.
    """
    wanted = {name: name for name in (*PLAIN, *knobs)} | _mapping(columns or {}, knobs)
    table = _read(path, {name for role, name in wanted.items() if _is_text(role)} | set(LABELS))
    taken = set(wanted.values())
    usual = USUAL | {name: f"group.{name}" for name in INPUTS if inputs and f"group.{name}" not in wanted}
    wanted |= {role: name for name, role in usual.items() if name in table.column_names and name not in taken}
    _require_distinct(path, table, wanted)
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
    latency_unit: str | None = "ms",
) -> Cells:
    """Take the columns of a table that mean something: what a column is -> its name. Scales as in `read_flat`.

    Raises ConfigError: a scale that cannot be; DataError: values that are no numbers, ids or labels that are missing.
    """
    if latency_unit not in (*UNITS, None) or not score_scale > 0:
        raise ConfigError(f"latency_unit={latency_unit!r} has to be ms or s, score_scale={score_scale} above 0")
    values: dict[str, np.ndarray] = {name: np.full(len(table), np.nan) for name in ("score", "latency_ms")}
    labels: dict[str, np.ndarray] = {}
    for role, name in columns.items():
        if _is_text(role):
            labels[role] = _questions(table, name) if role == "group.question" else _texts(source, table, name)
        else:
            values[role] = _numbers(source, table, name)
    _check_unit(source, columns.get("latency_ms", ""), values["latency_ms"], latency_unit)
    _check_scale(source, values, knobs, score_scale)
    for role in values:
        if role == "latency_ms" or role.startswith("stage."):
            values[role] = values[role] * UNITS[latency_unit or "ms"]
    values["score"] = values["score"] / score_scale
    sample_ids = labels.pop("sample_id", np.full(len(table), ""))
    return Cells(source, tuple(knobs), sample_ids, values, labels, by_index=all(map(is_index, sample_ids)))


def _is_text(role: str) -> bool:
    return role == "sample_id" or role.startswith("group.")


def _check_unit(source: str, name: str, latencies: np.ndarray, unit: str | None) -> None:
    """Raise ConfigError where nobody said the unit and it may be seconds, DataError where what was said cannot be."""
    known = latencies[~np.isnan(latencies)]
    if not len(known):
        return
    median = float(np.median(known))
    seconds = median < ASKED_MS or _SECONDS.search(name)
    if unit is None and (seconds or median > LONGEST_MS or _OTHER_UNIT.search(name)):
        raise ConfigError(
            f"{source}: the latencies ({name}, median {median:g}) look like {'seconds' if seconds else 'another unit'} "
            "and milliseconds are expected. Say which unit they have with --latency_unit s or --latency_unit ms; "
            "convert any other."
        )
    if unit is not None and median * UNITS[unit] > LONGEST_MS:
        raise DataError(
            f"{source}: the latencies ({name}) have a median of {median:g} {unit}. Are they milliseconds? Leave out "
            "--latency_unit then, and convert what is neither milliseconds nor seconds."
        )
    low, high = float(known.min()), float(np.quantile(known, 0.95))  # a few may be slow, none can be that fast
    if 0 < low < median / FASTER or high > median * FASTER:
        raise DataError(
            f"{source}: the latencies ({name}) are {low:g} to {high:g}, with a median of {median:g}. Have some of them "
            "another unit? Give all in one."
        )


def _check_scale(source: str, values: Mapping[str, np.ndarray], knobs: Sequence[str], score_scale: float) -> None:
    """Raise DataError where the scores of a setting are fractions, though all are said to be per cent."""
    if score_scale < ASKED_MS:
        return
    settings = np.stack([values[name] for name in knobs] or [np.zeros(len(values["score"]))], axis=1)
    for setting in np.unique(settings, axis=0):
        scores = values["score"][(settings == setting).all(axis=1)]
        if (scores > 0).any() and not (scores > 1).any():
            where = ", ".join(f"{name}={value:g}" for name, value in zip(knobs, setting, strict=False))
            raise DataError(
                f"{source}: score_scale={score_scale:g}, but no score at {where} is above 1, so they are fractions. "
                "Give all scores on one scale."
            )


def _mapping(columns: Mapping[str, str], knobs: Sequence[str]) -> dict[str, str]:
    measured = [name for name in knobs if name in PLAIN]
    if measured:
        raise ConfigError(f"knobs={','.join(knobs)}: {measured[0]} is measured, and no knob. Leave it out.")
    known = {*PLAIN, *knobs, *LABELS}
    unknown = [r for r in columns if r not in known and not r.startswith(("stage.", "tokens.", "group."))]
    if unknown:
        raise ConfigError(
            f"--column {unknown[0]}={columns[unknown[0]]} means nothing; left of = may stand "
            f"{', '.join([*PLAIN, *knobs, *LABELS])}, stage.NAME, tokens.NAME, group.NAME"
        )
    return {f"group.{role}" if role in LABELS else role: name for role, name in columns.items()}


def _read(path: Path, texts: Collection[str]) -> pa.Table:
    """Read a file; columns of ``texts`` as they are written, so that "007" stays what it is."""
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise DataError(f"{path} is of no known kind; give a .csv, .tsv, .parquet or .jsonl file")
    try:
        if suffix == ".parquet":
            return plain_numbers(parquet.read_table(path))
        if suffix in (".jsonl", ".ndjson"):
            return _from_rows([row for _, row in json_lines(path)])
        with reading_text(path) as file:
            for _ in file:  # another encoding is named
                pass
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {error}") from None


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Make columns of texts, of all names that any row has."""
    names = dict.fromkeys(name for row in rows for name in row)
    cells = {name: [row.get(name) for row in rows] for name in names}
    return pa.table({name: pa.array([_cell(value) for value in column], pa.string()) for name, column in cells.items()})


def _cell(value: Any) -> str | None:
    if isinstance(value, dict | list):  # of no column that is read, or it will be refused there
        return json.dumps(value)
    text = None if is_gap(value) else as_label(value)
    return text and text.encode(errors="replace").decode()  # JSON may hold half of a surrogate pair, UTF-8 may not


def _require_distinct(path: Path, table: pa.Table, wanted: Mapping[str, str]) -> None:
    twice = [name for name in wanted.values() if table.column_names.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]!r}. Give each a name of its own.")
    for name in wanted.values():
        roles = [role for role, column in wanted.items() if column == name and not _is_text(role)]
        if len(roles) > 1:
            raise ConfigError(
                f"column {name} cannot be both {' and '.join(roles)}. Say what each is with --column and --knobs."
            )


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
        elif pa.types.is_string(column.type):
            column = compute.replace_substring_regex(column, "^(?i)true$", "1")
            column = compute.replace_substring_regex(column, "^(?i)false$", "0")
        values: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values.astype(np.float64)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"{source}: column {name} is not a column of numbers: {shortened(str(error))}. Write numbers alone, with a "
            "decimal point, and leave gaps empty; number what has names, for example the models 1 and 2."
        ) from None


def _texts(source: str, table: pa.Table, name: str) -> np.ndarray:
    """Return a column as strings ``[n]``."""
    try:
        found = [as_id(unpacked(value)) for value in table[name].to_pylist()]
    except DataError as error:
        raise DataError(f"{source}: column {name} has to hold texts or numbers: {error}") from None
    if "" in found:
        raise DataError(f"{source}: column {name} is empty in row {found.index('') + 1}; every row needs one")
    return np.array(found, dtype=object)


def _questions(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of questions as strings ``[n]``; a gap is an empty one."""
    cells = table[name].to_pylist()
    texts = [cell if isinstance(cell, str) else "" if is_gap(cell) else as_label(cell) for cell in cells]
    return np.array(texts, dtype=object)

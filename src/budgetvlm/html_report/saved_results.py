"""Reads what other commands wrote: evaluation.json, live.json, comparison.json and the files of a training run.

Every document is checked for what the report reads from it; an error names the field that does not fit.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetvlm._io import read_json
from budgetvlm.controller.checkpoint import GUARD
from budgetvlm.controller.run_directory import METRICS, members_of
from budgetvlm.errors import DataError
from budgetvlm.evaluation.records import SCHEMA_VERSION, Estimate, EvaluationReport

LIVE_NUMBERS = (
    "requests", "violation_rate", "interval", "infeasible", "cut", "accuracy", "latency_ms", "controller_ms",
)  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    """What a training run left beside its checkpoint.

    Attributes:
        name: of the controller.
        history: one dict for each epoch, as in `metrics.json`; empty where there is none.
        best_epoch: the epoch whose weights were kept.
        maximised: the objective in words.
        training: the options of the training.
        other_ms: time of features, controller and guard where the guard was calibrated; None if it was not timed.
        calibrated_on: number of requests that calibrated the guard.
        members: the runs of an ensemble, which have the history in its place.
    """

    name: str
    history: tuple[dict[str, Any], ...] = ()
    best_epoch: int | None = None
    maximised: str = ""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    other_ms: float | None = None
    calibrated_on: int = 0
    members: tuple[SavedRun, ...] = ()


@dataclass(frozen=True)
class ComparedPolicy:
    """One policy of a comparison; None stands for what it does not say.

    Attributes:
        name: of the policy, with "(bound)" where it knows what cannot be known.
        gain: accuracy over the lookup table.
        late: share of the requests over their budget.
        regret: accuracy that the oracle has more.
        fit_seconds: time of learning.
        decision_us: median time of one decision in microseconds.
    """

    name: str
    gain: Estimate | None
    late: float | None
    regret: float | None
    fit_seconds: float | None
    decision_us: float | None


def read_evaluation(path: str | Path) -> EvaluationReport:
    """Read an `evaluation.json`.

    Raises:
        DataError: the file is missing, damaged, no evaluation, or of another schema version.
    """
    document = read_json(path)
    if not isinstance(document, dict) or "policies" not in document or "statics" not in document:
        raise DataError(f"{path} is no evaluation: it lacks policies or statics. Give the evaluation.json of evaluate.")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path}: field schema_version is {document.get('schema_version')!r}; this version reads {SCHEMA_VERSION}. "
            "Evaluate again."
        )
    try:
        report: EvaluationReport = _build(EvaluationReport, document)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}. Evaluate again.") from None
    return report


def _build(kind: Any, value: Any) -> Any:
    """Convert a value of a JSON document into a field's type; None becomes NaN where a number is expected."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        options = [a for a in arguments if a is not type(None)]
        return None if value is None else _build(options[0], value) if len(options) == 1 else value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in needed if name not in value]
        if missing:
            raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hint, value[name]) for name, hint in hints.items() if name in value})
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value)
    if kind is float:
        return math.nan if value is None else float(value)
    return value


def read_live(path: str | Path) -> dict[str, Any]:
    """Read the document of `budgetvlm evaluate --live`.

    Raises:
        DataError: the file is missing, damaged, or without the numbers that this version writes.
    """
    document = read_json(path)
    systems = document.get("systems") if isinstance(document, dict) else None
    if not isinstance(systems, dict) or "guarded" not in systems:
        raise DataError(f"{path} is no live evaluation: it lacks systems.guarded. Give live.json of evaluate --live.")
    missing = list(_missing(document, systems))
    if missing:
        raise DataError(
            f"{path} was written by another version of budgetvlm: it lacks {', '.join(missing[:4])}. "
            "Run evaluate --live again."
        )
    return {**document, "systems": dict(sorted(systems.items()))}  # the guarded one first


def _missing(document: Mapping[str, Any], systems: Mapping[str, Any]) -> typing.Iterator[str]:
    yield from (name for name in ("alpha", "reference_ms") if name not in document)
    for name, system in systems.items():
        parts = {part: system.get(part) for part in ("all", "by_budget", "by_group", "stretches")}
        yield from (f"systems.{name}.{part}" for part, value in parts.items() if value is None)
        numbers = parts["all"] or {}
        yield from (f"systems.{name}.all.{number}" for number in LIVE_NUMBERS if number not in numbers)


def read_comparison(path: str | Path) -> tuple[ComparedPolicy, ...] | None:
    """The policies of a comparison that have results; None where there is none.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    document = read_json(path)
    rows = document.get("policies", document.get("rows")) if isinstance(document, dict) else None
    if isinstance(rows, dict):
        rows = [{"name": name, **row} for name, row in rows.items() if isinstance(row, dict)]
    rows = [row for row in rows if isinstance(row, dict) and "name" in row] if isinstance(rows, list) else []
    return tuple(_compared(row) for row in rows if _has_results(row)) or None


def _has_results(row: Mapping[str, Any]) -> bool:
    return row.get("section", "policies") == "policies" and (
        isinstance(row.get("room"), dict) or bool(row.get("at_budget"))
    )


def _compared(row: Mapping[str, Any]) -> ComparedPolicy:
    gain = [_number(row, "room", "accuracy_gain", name) for name in ("value", "low", "high")]
    return ComparedPolicy(
        name=f"{row['name']}{' (bound)' if row.get('role') == 'bound' else ''}",
        gain=None if None in gain else Estimate(*gain),  # type: ignore[arg-type]
        late=_number(row, "room", "violation_rate", "value"),
        regret=_number(row, "regret"),
        fit_seconds=_number(row, "fit_seconds"),
        decision_us=_number(row, "decision_us"),
    )


def _number(document: Any, *path: str) -> float | None:
    """The number at a path of nested fields; None where there is none."""
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document if isinstance(document, float | int) else None


def read_run(checkpoint: Path, name: str) -> SavedRun:
    """Read the history of the training and the guard beside a checkpoint, where they exist.

    Raises:
        DataError: a file is damaged.
    """
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    metrics = read_json(directory / METRICS) if (directory / METRICS).exists() else {}
    guard = read_json(directory / GUARD) if (directory / GUARD).exists() else {}
    history = metrics.get("history", [])
    if not isinstance(history, list) or not all(isinstance(e, dict) and "epoch" in e for e in history):
        raise DataError(f"{directory / METRICS} is damaged: its history is no list of epochs. Train again.")
    return SavedRun(
        name=name,
        history=tuple(history),
        best_epoch=(metrics.get("best") or {}).get("epoch"),
        maximised=metrics.get("maximised", ""),
        training=metrics.get("training", {}),
        other_ms=guard.get("other_ms") or None,
        calibrated_on=guard.get("calibrated_on", 0),
        members=tuple(read_run(path, f"{name}, member {n}") for n, path in enumerate(members_of(directory), 1)),
    )

"""Reading what other commands left: evaluation.json, live.json, comparison.json, a controller's training figures.

Every document is checked for what the report reads of it; what does not fit is an error that names the field.
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
from budgetvlm.evaluation.records import SCHEMA_VERSION, EvaluationReport

LIVE_FIGURES = (
    "requests",
    "violation_rate",
    "interval",
    "infeasible",
    "cut",
    "accuracy",
    "latency_ms",
    "controller_ms",
)


@dataclass(frozen=True)
class Run:
    """A training run: figures of each epoch (maybe none), the best one, options, and the guard's cost of the rest.

    Attributes:
        history: one dict an epoch, as `metrics.json` has them.
        other_ms: features, controller and guard on the machine where the guard was calibrated; None: never timed.
        calibrated_on: requests that calibrated the guard.
        members: of an ensemble, whose own history is theirs.
    """

    name: str
    history: tuple[dict[str, Any], ...] = ()
    best_epoch: int | None = None
    maximised: str = ""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    other_ms: float | None = None
    calibrated_on: int = 0
    members: tuple[Run, ...] = ()


def read_evaluation(path: str | Path) -> EvaluationReport:
    """The report of an `evaluation.json`.

    Raises:
        DataError: missing, damaged, foreign, or of another schema version.
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
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}. Evaluate again.") from None
    return report


def _build(kind: Any, value: Any) -> Any:
    """A value of a JSON document as the type that a field has; None where a number should be is NaN."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        options = [a for a in arguments if a is not type(None)]
        return None if value is None else _build(options[0], value) if len(options) == 1 else value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        missing = [f.name for f in dataclasses.fields(kind) if f.name not in value and _required(f)]
        if missing:
            raise KeyError(f"{kind.__name__} lacks {', '.join(missing)}")
        return kind(**{name: _build(hint, value[name]) for name, hint in hints.items() if name in value})
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value)
    if kind is float:
        return math.nan if value is None else float(value)
    return value


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read_live(path: str | Path) -> dict[str, Any]:
    """The document of `budgetvlm evaluate --live`.

    Raises:
        DataError: missing, damaged, or without the figures that this version writes.
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
        figures = parts["all"] or {}
        yield from (f"systems.{name}.all.{figure}" for figure in LIVE_FIGURES if figure not in figures)


def read_comparison(path: str | Path) -> tuple[dict[str, Any], ...] | None:
    """Rows of a comparison, each with a name and either a gain or a list of accuracies; None: none can be read.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        return None
    rows = document.get("policies", document.get("rows"))
    if isinstance(rows, dict):
        rows = [{"name": name, **row} for name, row in rows.items() if isinstance(row, dict)]
    if not isinstance(rows, list):
        return None
    shown = [row for row in rows if isinstance(row, dict) and "name" in row and _has_figures(row)]
    return tuple(row for row in shown if row.get("section", "policies") == "policies") or None


def _has_figures(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("room"), dict) or bool(row.get("at_budget"))


def read_run(checkpoint: Path, name: str) -> Run:
    """What lies beside a checkpoint: training figures and the guard, as far as they are there.

    Raises:
        DataError: a file is there and is damaged.
    """
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    metrics = read_json(directory / METRICS) if (directory / METRICS).exists() else {}
    guard = read_json(directory / GUARD) if (directory / GUARD).exists() else {}
    history = metrics.get("history", [])
    if not isinstance(history, list) or not all(isinstance(e, dict) and "epoch" in e for e in history):
        raise DataError(f"{directory / METRICS} is damaged: its history is no list of epochs. Train again.")
    return Run(
        name=name,
        history=tuple(history),
        best_epoch=(metrics.get("best") or {}).get("epoch"),
        maximised=metrics.get("maximised", ""),
        training=metrics.get("training", {}),
        other_ms=guard.get("other_ms") or None,
        calibrated_on=guard.get("calibrated_on", 0),
        members=tuple(read_run(path, f"{name}, member {n}") for n, path in enumerate(members_of(directory), 1)),
    )

"""Reads what other commands wrote: evaluation.json, live.json, comparison.json and the files of a training run.

Every document is checked for what the report reads from it; an error names the field that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budgetvlm._io import read_json
from budgetvlm.comparison.comparison_records import CompareReport
from budgetvlm.controller.checkpoint import GUARD
from budgetvlm.controller.run_directory import METRICS, members_of
from budgetvlm.errors import DataError
from budgetvlm.evaluation.records import SCHEMA_VERSION, EvaluationReport, build

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
    training: Mapping[str, Any] = field(default_factory=dict)
    other_ms: float | None = None
    calibrated_on: int = 0
    members: tuple[SavedRun, ...] = ()


def read_evaluation(path: str | Path) -> EvaluationReport:
    """Read an `evaluation.json`. Raises DataError, see `_read_report`."""
    report: EvaluationReport = _read_report(path, EvaluationReport, "evaluation", ("policies", "statics"))
    return report


def read_comparison(path: str | Path) -> CompareReport:
    """Read a `comparison.json`. Raises DataError, see `_read_report`."""
    report: CompareReport = _read_report(path, CompareReport, "comparison", ("rows", "notes"))
    return report


def _read_report(path: str | Path, kind: type, name: str, needed: tuple[str, str]) -> Any:
    """Read a report that `to_dict` made.

    Raises:
        DataError: the file is missing, damaged, lacks the ``needed`` fields, or has another schema version.
    """
    document = read_json(path)
    if not isinstance(document, dict) or not set(needed) <= set(document):
        raise DataError(f"{path} is no {name}: it lacks {' or '.join(needed)}. Give the {name}.json that was written.")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path}: field schema_version is {document.get('schema_version')!r}; this version reads {SCHEMA_VERSION}. "
            f"Make the {name} again."
        )
    try:
        return build(kind, document)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}. Make the {name} again.") from None


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


def _missing(document: Mapping[str, Any], systems: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for name in ("alpha", "reference_ms") if name not in document)
    for name, system in systems.items():
        parts = {part: system.get(part) for part in ("all", "by_budget", "by_group", "stretches")}
        yield from (f"systems.{name}.{part}" for part, value in parts.items() if value is None)
        numbers = parts["all"] or {}
        yield from (f"systems.{name}.all.{number}" for number in LIVE_NUMBERS if number not in numbers)


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

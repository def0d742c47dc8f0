"""The logs of lmms-eval: one run for each setting, one `*_samples_<task>.jsonl` for each task of a run.

A line is a sample: ``doc_id`` (its index in the split), the metrics by name beside it, and ``token_counts``, where
BudgetVLM as a model of lmms-eval puts what the request cost.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from budgetvlm._io import read_json
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.importing.flat_tables import UNITS
from budgetvlm.importing.measured_rows import Cells

LOG_NAME = re.compile(r"(?:(?P<date>\d{8}_\d{6})_)?samples_(?P<task>.+)\.jsonl")
NO_METRICS = {
    "doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps", "token_counts", "doc_hash",
    "input_media", "submission", "repeats", "idx",
}  # fmt: skip
_RUN = re.compile(r"(?P<setting>[A-Za-z_]\w*=[^=,]+(?:,[A-Za-z_]\w*=[^=,]+)*)=(?P<path>.+)")


@dataclass(frozen=True)
class LoggedRun:
    """A log (a file, or a directory with several) and its setting; None: the log itself says it, line by line."""

    path: Path
    setting: tuple[tuple[str, float], ...] | None

    @classmethod
    def parse(cls, text: str) -> LoggedRun:
        """Read "max_crops=4,top_k=8=PATH", or a path alone.

        Raises:
            ConfigError: a value that is no number.
        """
        match = _RUN.fullmatch(text)
        if not match:
            return cls(Path(text), None)
        words = [word.split("=") for word in match["setting"].split(",")]
        return cls(Path(match["path"]), _setting(dict(words), f"--run {text}"))


def read_manifest(path: Path) -> list[LoggedRun]:
    """Read runs from a JSON file, [{"setting": {"max_crops": 4, ...}, "path": "logs/a"}, ...], with relative paths.

    Raises:
        DataError: another shape.
    """
    document = read_json(path)
    runs = document.get("runs") if isinstance(document, dict) else document
    if not isinstance(runs, list) or not all(
        isinstance(run, dict) and isinstance(run.get("path"), str) for run in runs
    ):
        raise DataError(f'{path} has to be a list of {{"setting": {{"max_crops": 4, ...}}, "path": "..."}}')
    try:
        return [
            LoggedRun(path.parent / run["path"], _setting(run["setting"], str(path)) if run.get("setting") else None)
            for run in runs
        ]
    except (AttributeError, ConfigError) as error:
        raise DataError(f"{path}: {error}") from None


def read_runs(
    runs: Sequence[LoggedRun],
    *,
    metric: str | None = None,
    task: str | None = None,
    score_scale: float = 1.0,
    latency_field: str | None = None,
    latency_unit: str = "ms",
    progress: bool = False,
) -> Cells:
    """Read all samples of all runs.

    Args:
        metric: the score, by its name in the log, "name.key" within one that is an object; None: the only one.
        task: of the tasks in the logs; None: all, and where there are several a sample is named "task:doc_id".
        score_scale: the largest score.
        latency_field: where the log has the latency, for example "token_counts.0.latency_ms", which is the default.
        latency_unit: "ms" or "s".

    Raises:
        ConfigError: no runs, knobs that differ between them.
        DataError: logs that are missing, damaged, of several dates, or without the metric.
    """
    if not runs:
        raise ConfigError("no runs were given; give --run 'max_crops=4,top_k=8,num_active_blocks=16=DIR' or --manifest")
    if latency_unit not in UNITS or not score_scale > 0:
        raise ConfigError(f"latency_unit={latency_unit!r} has to be ms or s, score_scale={score_scale} above 0")
    logs = [(run, name, path) for run in runs for name, path in _logs(run, task)]
    several = len({name for _, name, _ in logs}) > 1
    rows: list[_Row] = []
    for run, name, path in tqdm(logs, desc="logs", unit="log", disable=not progress):
        lines = list(_lines(path))
        wanted = _metric(path, lines, metric)
        rows += [
            _row(path, line, number, run, name, several, wanted, latency_field) for number, line in enumerate(lines, 1)
        ]
    return _cells(rows, runs, score_scale, UNITS[latency_unit], several)


@dataclass(frozen=True)
class _Row:
    sample_id: str
    setting: tuple[tuple[str, float], ...]
    score: float
    latency: float
    stages_ms: Mapping[str, float]
    groups: Mapping[str, str]


def _setting(words: Mapping[str, Any], where: str) -> tuple[tuple[str, float], ...]:
    try:
        return tuple((str(name).strip(), float(value)) for name, value in words.items())
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: the values of a setting have to be numbers; given {dict(words)}") from None


def _logs(run: LoggedRun, task: str | None) -> list[tuple[str, Path]]:
    """Find the logs of a run, one for each task."""
    if run.path.is_file():
        match = LOG_NAME.fullmatch(run.path.name)
        return [(match["task"] if match else run.path.stem, run.path)]
    if not run.path.is_dir():
        raise DataError(
            f"{run.path} does not exist; give the --output_path of a run with --log_samples, or a log of it"
        )
    found = [(match["task"], path) for path in sorted(run.path.rglob("*.jsonl")) if (match := _is_log(path))]
    found = [(name, path) for name, path in found if task in (None, name)]
    if not found:
        names = f" of task {task}" if task else ""
        raise DataError(f"{run.path} holds no *_samples_*.jsonl{names}; lmms-eval writes them with --log_samples")
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        paths = ", ".join(str(path) for name, path in found if name == twice[0])
        raise DataError(f"{run.path} holds several logs of {twice[0]}: {paths}. Give the one file that is meant.")
    return found


def _is_log(path: Path) -> re.Match[str] | None:
    return LOG_NAME.fullmatch(path.name)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, is not JSON ({error}); the run may have been killed. Run it again."
                ) from None
            if not isinstance(line, dict) or "doc_id" not in line:
                raise DataError(f"{path}, line {number}, has no doc_id; it is no log of samples of lmms-eval")
            yield line


def _metric(path: Path, lines: Sequence[Mapping[str, Any]], metric: str | None) -> str:
    """Choose the metric that is meant."""
    if not lines:
        raise DataError(f"{path} is empty; run that setting again")
    found = list(_metrics(lines[0]))
    if metric is None and len(found) == 1:
        return found[0]
    if metric is None or metric not in found:
        what = "several metrics" if metric is None and found else f"no metric {metric!r}" if found else "no metric"
        raise DataError(
            f"{path} has {what}; it has {', '.join(found) or 'nothing that is a number'}. Say which is the score with "
            "--metric NAME."
        )
    return metric


def _metrics(line: Mapping[str, Any]) -> Iterator[str]:
    for name, value in line.items():
        if name in NO_METRICS:
            continue
        if isinstance(value, dict):
            yield from (f"{name}.{key}" for key, part in value.items() if _is_score(part))
        elif _is_score(value):
            yield name


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value))


def _look(line: Any, dotted: str) -> Any:
    """Look a value up by its path of names and list indices; return None where there is none."""
    if isinstance(line, Mapping) and dotted in line:
        return line[dotted]
    for word in dotted.split("."):
        if isinstance(line, Mapping):
            line = line.get(word)
        elif isinstance(line, list) and word.isdigit() and int(word) < len(line):
            line = line[int(word)]
        else:
            return None
    return line


def _row(
    path: Path,
    line: Mapping[str, Any],
    number: int,
    run: LoggedRun,
    task: str,
    several: bool,
    metric: str,
    latency_field: str | None,
) -> _Row:
    score, cost = _look(line, metric), _look(line, "token_counts.0") or {}
    latency = _look(line, latency_field or "token_counts.0.latency_ms")
    where = f"{path}, line {number}"
    if not _is_score(score):
        raise DataError(f"{where}: metric {metric} is {score!r}, no number. Choose another with --metric NAME.")
    if latency is not None and not _is_score(latency):
        raise DataError(f"{where}: the latency {latency!r} is no number; name its field with --latency_field a.b")
    if latency_field is not None and latency is None:
        raise DataError(f"{where} has no field {latency_field}; it has {', '.join(line)}")
    setting = run.setting
    if setting is None:
        if not isinstance(cost.get("setting"), dict):
            raise DataError(
                f"{where} does not say its setting. Say it: --run 'max_crops=4,top_k=8,num_active_blocks=16={run.path}'"
            )
        setting = _setting(cost["setting"], where)
    media = line.get("input_media")
    own = isinstance(cost, dict) and latency_field is None and isinstance(cost.get("stages_ms"), dict)
    return _Row(
        sample_id=f"{task}:{line['doc_id']}" if several else str(line["doc_id"]),
        setting=setting,
        score=float(score),
        latency=math.nan if latency is None else float(latency),
        stages_ms={name: float(ms) for name, ms in cost["stages_ms"].items()} if own else {},
        groups={"task": task}
        | ({"image_id": media[0]} if isinstance(media, list) and len(media) == 1 and _is_path(media[0]) else {}),
    )


def _is_path(media: Any) -> bool:
    return isinstance(media, str) and len(media) < 1000  # else it is the image itself, in base64


def _cells(rows: Sequence[_Row], runs: Sequence[LoggedRun], score_scale: float, unit: float, several: bool) -> Cells:
    names = tuple(name for name, _ in rows[0].setting)
    other = next((row.setting for row in rows if {name for name, _ in row.setting} != set(names)), None)
    if other is not None:
        raise ConfigError(
            f"settings need the same knobs in every run; given {', '.join(names)} and {', '.join(n for n, _ in other)}"
        )
    settings = [dict(row.setting) for row in rows]
    return Cells(
        source=str(runs[0].path) if len(runs) == 1 else f"the {len(runs)} runs",
        sample_ids=np.array([row.sample_id for row in rows], dtype=object),
        knobs={name: np.array([setting[name] for setting in settings]) for name in names},
        score=np.array([row.score for row in rows]) / score_scale,
        latency_ms=np.array([row.latency for row in rows]) * unit,
        stages_ms=_shared((row.stages_ms for row in rows), float),
        groups=_shared((row.groups for row in rows), object),
        by_index=not several,
    )


def _shared(rows: Iterable[Mapping[str, Any]], dtype: type) -> dict[str, np.ndarray]:
    """Return the columns that every row has."""
    rows = list(rows)
    return {name: np.array([r[name] for r in rows], dtype=dtype) for name in rows[0] if all(name in r for r in rows)}

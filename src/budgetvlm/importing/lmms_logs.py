"""The logs of lmms-eval: one run for each setting, one `*_samples_<task>.jsonl` for each task of a run.

A line is a sample: ``doc_id`` (its index in the split), the metrics by name beside it, and ``token_counts``, where
BudgetVLM as a model of lmms-eval puts what the request cost.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from budgetvlm._io import json_lines, read_json, shortened
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.importing.flat_tables import to_cells
from budgetvlm.importing.measured_rows import Cells
from budgetvlm.tasks.options import named_once
from budgetvlm.tasks.values import as_id, is_gap

LOG_NAME = re.compile(r"(?:(?P<date>\d{8}_\d{6})_)?samples_(?P<task>.+)\.jsonl")
NO_METRICS = {
    "doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps", "token_counts", "doc_hash",
    "input_media", "submission", "repeats", "idx", "filter",
}  # fmt: skip
_NO_SCORE = re.compile(  # times, counts, and measures of which less is better
    r"latency|time|second|duration|elapsed|throughput|tokens|loss|perplexity|(?:^|_)(?:[mnu]?s|wer|cer|error)$", re.I
)
Knobs = tuple[tuple[str, float], ...]
_RUN = re.compile(r"(?P<setting>[A-Za-z_]\w*=[^=,]+(?:,[A-Za-z_]\w*=[^=,]+)*)=(?P<path>.+)")


@dataclass(frozen=True)
class LoggedRun:
    """A log (a file, or a directory with several) and its setting; None: the log itself says it, line by line."""

    path: Path
    setting: Knobs | None

    @classmethod
    def parse(cls, text: str) -> LoggedRun:
        """Read "max_crops=4,top_k=8=PATH", or a path alone. Raises ConfigError: a value that is no number."""
        match = _RUN.fullmatch(text)
        if not match:
            return cls(Path(text), None)
        pairs = (word.split("=") for word in match["setting"].split(","))
        words = named_once(f"--run {text}", ((name, value) for name, value in pairs))
        return cls(Path(match["path"]), _setting(words, f"--run {text}"))


def read_manifest(path: Path) -> list[LoggedRun]:
    """Read [{"setting": {"max_crops": 4}, "path": "logs/a"}, ...] from JSON. Raises DataError: another shape."""
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
    latency_unit: str | None = None,
    filter_name: str | None = None,
    inputs: bool = False,
    progress: bool = False,
) -> Cells:
    """Read all samples of all runs.

    Args:
        metric: the score, by its name in the log, "name.key" within one that is an object; None: the only one.
        task: of the tasks in the logs; None: all, and where there are several a sample is named "task:doc_id".
        score_scale: the largest score.
        latency_field: where the log has the latency, for example "token_counts.0.latency_ms", which is the default.
        latency_unit: of `flat_tables.UNITS`; None: ms, unless another field than the default one looks like another.
        filter_name: of the filters that a task extracts an answer with; None: there is one alone.
        inputs: take the prompt ("input") as the sample's question.

    Raises:
        ConfigError: no runs, knobs that differ between them, latencies whose unit nobody knows.
        DataError: logs that are missing, damaged, of several dates, or without the metric.
    """
    if not runs:
        raise ConfigError("no runs were given; give --run 'max_crops=4,top_k=8,num_active_blocks=16=DIR' or --manifest")
    logs = [(run, name, path) for run in runs for name, path in _logs(run, task)]
    several = len({name for _, name, _ in logs}) > 1
    rows: list[dict[str, Any]] = []
    settings: list[Knobs] = []
    metrics: dict[str, str] = {}
    documents: dict[str, tuple[Any, Any]] = {}
    for run, name, path in tqdm(logs, desc="logs", unit="log", disable=not progress):
        lines = _of_filter(path, list(_lines(path)), filter_name)
        wanted = _metric(path, [line for _, line in lines], metric, latency_field)
        scored = f"metric {wanted}" + (f" after filter {lines[0][1]['filter']}" if "filter" in lines[0][1] else "")
        if metrics.setdefault(name, scored) != scored:
            raise DataError(
                f"{path} has the {scored}, and other logs of {name} have the {metrics[name]}. Say which is the score "
                "with --metric NAME, and give logs of one filter (--filter NAME)."
            )
        if latency_field is not None and not any(latency_field in line for _, line in lines):
            raise DataError(f"{path} has no field {latency_field}; it has {', '.join(_names(lines))}")
        for number, line in lines:
            where = f"{path}, line {number}"
            settings.append(run.setting if run.setting is not None else _own_setting(where, line, run.path))
            doc_id = as_id(line["doc_id"])
            _require_same_document(documents, where, f"{name}:{doc_id}", line)
            own = {"sample_id": f"{name}:{doc_id}" if several else doc_id, "group.task": name}
            own |= {"group.question": line.get("input")} if inputs else {}
            rows.append(dict(settings[-1]) | own | _measured(where, line, wanted, latency_field))
    knobs = _common_knobs(settings)
    _require_own_logs(logs)
    return _as_cells(runs, rows, knobs, score_scale, latency_field, latency_unit)


def _as_cells(
    runs: Sequence[LoggedRun], rows: Sequence[Mapping[str, Any]], knobs: Sequence[str], score_scale: float,
    latency_field: str | None, latency_unit: str | None,
) -> Cells:  # fmt: skip
    """Return the rows as cells; a label that some rows lack is left out."""
    roles = dict.fromkeys(role for row in rows for role in row)
    table = pa.table({role: [row.get(role) for row in rows] for role in roles})
    names = {role: role for role in roles if not (role.startswith("group.") and table[role].null_count)}
    if latency_field:  # for its unit
        names["latency_ms"] = latency_field
        table = table.rename_columns([names.get(role, role) for role in roles])
    return to_cells(
        str(runs[0].path) if len(runs) == 1 else f"the {len(runs)} runs", table, names, knobs,
        score_scale=score_scale, latency_unit=latency_unit or (None if latency_field else "ms"),
    )  # fmt: skip


def _require_own_logs(logs: Sequence[tuple[LoggedRun, str, Path]]) -> None:
    """Raise ConfigError where a log is said to be of two settings."""
    settings: dict[Path, Knobs | None] = {}
    for run, _, path in logs:
        if settings.setdefault(path.resolve(), run.setting) != run.setting:
            raise ConfigError(f"{path} is given for two settings. Give each run its own log.")


def _require_same_document(
    documents: dict[str, tuple[Any, Any]], where: str, name: str, line: Mapping[str, Any]
) -> None:
    """Raise DataError where a number stands for another document than in an earlier run; note it where it is new."""
    document = (line.get("doc_hash"), line.get("target"))
    if documents.setdefault(name, document) != document:
        raise DataError(
            f"{where}: {name} is another document than in an earlier run (doc_hash or target differ), so the runs are "
            "not of the same data. Run them again on the same data."
        )


def _common_knobs(settings: Sequence[Knobs]) -> tuple[str, ...]:
    names = [tuple(name for name, _ in setting) for setting in settings]
    other = next((some for some in names if set(some) != set(names[0])), None)
    if other is not None:
        raise ConfigError(
            f"settings need the same knobs in every run; given {', '.join(names[0])} and {', '.join(other)}"
        )
    return names[0]


def _setting(words: Mapping[str, Any], where: str) -> Knobs:
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
    found = [
        (match["task"], path) for path in sorted(run.path.rglob("*.jsonl")) if (match := LOG_NAME.fullmatch(path.name))
    ]
    found = [(name, path) for name, path in found if task in (None, name)]
    if not found:
        names = f" of task {task}" if task else ""
        raise DataError(f"{run.path} holds no *_samples_*.jsonl{names}; lmms-eval writes them with --log_samples")
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        paths = ", ".join(str(path) for name, path in found if name == twice[0])
        raise DataError(f"{run.path} holds several logs of {twice[0]}: {paths}. Give the one file that is meant.")
    return found


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the samples of a log: line, and its values by their paths: "vqa_acc", "token_counts.0.latency_ms"."""
    for number, line in json_lines(path):
        if "doc_id" not in line:
            raise DataError(f"{path}, line {number}, has no doc_id; it is no log of samples of lmms-eval")
        yield number, dict(_leaves("", line))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values within objects and lists by their dotted paths."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(f"{path}.{name}" if path else str(name), part)


def _of_filter(
    path: Path, lines: Sequence[tuple[int, dict[str, Any]]], wanted: str | None
) -> list[tuple[int, dict[str, Any]]]:
    """Keep the lines of one filter: a task that extracts answers in several ways logs each sample once for each."""
    if not lines:
        raise DataError(f"{path} is empty; run that setting again")
    there = dict.fromkeys(str(line["filter"]) for _, line in lines if "filter" in line)
    if (wanted is None and len(there) > 1) or (wanted is not None and wanted not in there):
        which = "several filters" if wanted is None else f"no filter {wanted!r}"
        raise DataError(f"{path} has {which}; it has {', '.join(there) or 'none'}. Say which one with --filter NAME.")
    return [(number, line) for number, line in lines if wanted is None or str(line.get("filter")) == wanted]


def _names(lines: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, None]:
    return dict.fromkeys(name for _, line in lines for name in line)


def _metric(path: Path, lines: Sequence[Mapping[str, Any]], metric: str | None, latency_field: str | None) -> str:
    """Choose the metric that is meant: a number of any line, or of an object in it, that is not known to be another."""
    values = Counter[str]()  # name -> how many lines have a number there
    for line in lines:
        values.update({name: int(_is_score(v)) for name, v in line.items() if v is None or isinstance(v, int | float)})
    named = [
        name
        for name in values
        if re.fullmatch(r"[^.]+(\.(?!\d)[^.]+)?", name)
        and name.split(".")[0] not in NO_METRICS
        and name != latency_field
    ]
    found = [name for name in named if values[name]]
    sure = len(named) == 1 and values[named[0]] == len(lines) and not _NO_SCORE.search(named[0])
    if metric is None and sure:
        return found[0]
    if metric is None or metric not in named:
        what = "several metrics" if metric is None and found else f"no metric {metric!r}" if found else "no metric"
        if metric is None and len(found) == 1:
            what = f"only {found[0]!r}, with a number in {values[found[0]]} of {len(lines)} lines; it may be no score"
        raise DataError(
            f"{path} has {what}; it has {', '.join(found) or 'nothing that is a number'}. Say which is the score with "
            "--metric NAME."
        )
    return metric


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value))


def _within(line: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the values within an object by their names."""
    return {name.removeprefix(path): value for name, value in line.items() if name.startswith(path)}


def _own_setting(where: str, line: Mapping[str, Any], path: Path) -> Knobs:
    """Return the setting that a line says it was answered at."""
    setting = _within(line, "token_counts.0.setting.")
    if not setting:
        raise DataError(
            f"{where} does not say its setting. Say it: --run 'max_crops=4,top_k=8,num_active_blocks=16={path}'"
        )
    return _setting(setting, where)


def _measured(where: str, line: Mapping[str, Any], metric: str, latency_field: str | None) -> dict[str, Any]:
    """Return score, latency, stages and image of a line, named as `to_cells` names them."""
    found: dict[str, Any] = {}
    for role, name, flag in (
        ("score", metric, "--metric NAME"),
        ("latency_ms", latency_field or "token_counts.0.latency_ms", "--latency_field a.b"),
    ):
        value = line.get(name)
        if not (is_gap(value) or _is_score(value)):
            raise DataError(f"{where}: {name} is {shortened(repr(value))}, no number. Name another with {flag}.")
        found[role] = value if _is_score(value) else None
    if latency_field is None:
        stages = _within(line, "token_counts.0.stages_ms.")
        found |= {f"stage.{name}": None if is_gap(ms) else float(ms) for name, ms in stages.items()}
    media = _within(line, "input_media.")
    if len(media) == 1 and isinstance(media.get("0"), str) and len(media["0"]) < 1000:
        return found | {"group.image_id": media["0"]}  # a longer one is the image itself, in base64
    return found

"""Reading result files, our own and those of other tools with the same layout.

Nothing is taken on trust: a knob that is given in several places has to agree, a sample that occurs twice has to be
the same, and a file that holds fewer samples than its summary says is truncated.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, overload

from budgetvlm._io import read_json
from budgetvlm.errors import DataError
from budgetvlm.knobs import KNOBS, Value
from budgetvlm.profiling.results.layout import (
    FORMATS,
    SCHEMA_VERSION,
    Format,
    Kind,
    SettingResult,
    results_directory,
    same_dataset,
)
from budgetvlm.profiling.results.measurements import AccuracyRecord, LatencyRecord
from budgetvlm.profiling.results.numbering import number_by_split, rank_of
from budgetvlm.table import first_few


@overload
def iter_results(
    directory: str | Path, dataset_name: str, kind: Literal["accuracy"]
) -> Iterator[SettingResult[AccuracyRecord]]: ...
@overload
def iter_results(
    directory: str | Path, dataset_name: str, kind: Literal["latency"]
) -> Iterator[SettingResult[LatencyRecord]]: ...
def iter_results(directory: str | Path, dataset_name: str, kind: Kind) -> Iterator[SettingResult[Any]]:
    """Yield the settings that were measured, one at a time, in the order of their knobs.

    Files are looked for in ``<directory>/exp5_accuracy_<dataset>``, in the sibling ``<directory>_<dataset>`` and, if
    neither holds any, in the directory itself. Of one setting either the ranks' files or a merged file is read; with
    both, the merged one, which then has to hold every sample of the ranks.

    Raises:
        DataError: nothing there, or a file that is truncated, foreign or contradicts itself or another.
    """
    for files in _files_by_setting(Path(directory), dataset_name, kind):
        yield _merge(kind, [_parse(path, dataset_name, kind) for path in files])


def read_file(path: Path, dataset_name: str, kind: Kind) -> SettingResult[Any]:
    """Read and check one file.

    Raises:
        DataError: the file cannot be used; it and the field are named.
    """
    return _merge(kind, [_parse(path, dataset_name, kind)], every_rank=False)


def _parse(path: Path, dataset_name: str, kind: Kind) -> SettingResult[Any]:
    """Read one file as it is: samples may still occur twice, and be numbered by rank or batch."""
    form = FORMATS[kind]
    document = read_json(path)
    try:
        config, summary, samples = _sections(document, form, dataset_name)
        knobs = _knobs(path, form, config, summary, samples)
        records = tuple(form.record.from_dict(raw) for raw in samples)
    except DataError as error:
        raise DataError(f"{path}: {error}. Remove the file and measure again, or mend it.") from None
    return SettingResult(knobs, records, dict(config), (path,), all(type(raw["sample_id"]) is int for raw in samples))


def _files_by_setting(directory: Path, dataset_name: str, kind: Kind) -> list[list[Path]]:
    """Return files of each setting, sorted by the knobs in their names; the merged file first."""
    pattern = FORMATS[kind].pattern
    by_setting: dict[tuple[int, ...], list[tuple[int, Path]]] = defaultdict(list)
    for path in result_files(directory, dataset_name, kind):
        match = pattern.fullmatch(path.name)
        if match:
            crops, top_k, blocks, rank = match.groups()
            by_setting[int(crops or 0), int(top_k or 0), int(blocks or 0)].append(
                (-1 if rank is None else int(rank), path)
            )
    return [[path for _, path in sorted(files)] for _, files in sorted(by_setting.items())]


def result_files(directory: Path, dataset_name: str, kind: Kind) -> list[Path]:
    """Return the files that `iter_results` reads, sorted.

    Raises:
        DataError: there are none, or in several places.
    """
    names = dict.fromkeys((dataset_name.replace("_", "-"), dataset_name))
    own = [directory / f"{FORMATS[kind].experiment}_{name}" for name in names]
    siblings = [directory.parent / f"{directory.name}_{name}" for name in names]
    found = {place: _list(place, kind) for place in dict.fromkeys([*own, *siblings])}
    places = [place for place, files in found.items() if files]
    if len(places) > 1:
        raise DataError(
            f"results of {dataset_name} lie in several places: {', '.join(map(str, places))}. Move all but one away."
        )
    files = found[places[0]] if places else _list(directory, kind)
    if not files:
        raise DataError(_nothing_there(directory, dataset_name, kind))
    return files


def _list(place: Path, kind: Kind) -> list[Path]:
    if not place.is_dir():
        return []
    pattern = FORMATS[kind].pattern
    return sorted(path for path in place.iterdir() if pattern.fullmatch(path.name))


def _nothing_there(directory: Path, dataset_name: str, kind: Kind) -> str:
    form = FORMATS[kind]
    state = (
        "holds no" if directory.is_dir() else "is a file and holds no" if directory.exists() else "does not exist: no"
    )
    command = form.command.format(dataset=dataset_name, directory=directory)
    return (
        f"{directory} {state} {kind} results of {dataset_name} (looked there, in "
        f"{results_directory(directory, dataset_name, kind).name}/ in it and in "
        f"{directory.name}_{dataset_name.replace('_', '-')}/ beside it for {form.stem}_crops*_topk*_blocks*.json). "
        f"Make them: {command}"
    )


def _sections(
    document: Any, form: Format, dataset_name: str
) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Mapping[str, Any]]]:
    """Return config, the single summary entry and the samples, each checked for its shape."""
    if not isinstance(document, dict):
        raise DataError(f"not a result file: the document is a {type(document).__name__}, not an object")
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise DataError(f"field schema_version is {version!r}; this version reads {SCHEMA_VERSION}")
    key = next((key for key in form.sample_keys if key in document), None)
    if key is None:
        raise DataError(f"missing field {' or '.join(form.sample_keys)}; it may be a result of another kind")
    samples, config, summaries = document[key], document.get("config", {}), document.get("summary", [{}])
    if not isinstance(samples, list) or not samples:
        raise DataError(f"field {key} has to be a list of samples, one at least")
    if not isinstance(config, dict) or "NaN" in json.dumps(config):
        raise DataError("field config has to be an object without NaN")
    if not isinstance(summaries, list) or len(summaries) != 1 or not isinstance(summaries[0], dict):
        raise DataError("field summary has to be a list of one object")
    stored = config.get("dataset_name", dataset_name)
    if not same_dataset(str(stored), dataset_name):
        raise DataError(f"field config.dataset_name is {stored!r}, but results of {dataset_name!r} are asked for")
    count = summaries[0].get("num_samples", len(samples))
    if count != len(samples):
        raise DataError(f"truncated: field summary.num_samples is {count!r}, but {key} holds {len(samples)} samples")
    return config, summaries[0], samples


def _knobs(
    path: Path,
    form: Format,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    samples: list[Mapping[str, Any]],
) -> dict[str, Value]:
    """Find the setting in samples, config, summary or file name; where several tell it, they have to agree."""
    match = form.pattern.fullmatch(path.name)
    groups = match.groups()[: len(KNOBS)] if match else ()
    from_name = {knob: int(value) for knob, value in zip(KNOBS, groups, strict=False) if value}
    sources: Iterator[tuple[str, Mapping[str, Any]]] = chain(
        ((f"sample {number}", sample) for number, sample in enumerate(samples) if isinstance(sample, dict)),
        [("config", config), ("summary", summary), ("the file's name", from_name)],
    )
    found: dict[str, tuple[str, Value]] = {}
    for source, fields in sources:
        for knob in KNOBS:
            if knob in fields:
                where, value = found.setdefault(knob, (source, fields[knob]))
                if value != fields[knob]:
                    raise DataError(f"field {knob} is {value!r} in {where} but {fields[knob]!r} in {source}")
    if not found:
        raise DataError(f"missing field {' or '.join(KNOBS)}: neither samples, config, summary nor the name has one")
    knobs = {knob: found[knob][1] for knob in KNOBS if knob in found}
    for knob, value in knobs.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"field {knob} is {value!r}; it has to be a whole number above 0")
    return knobs


def _merge(kind: Kind, parts: list[SettingResult[Any]], every_rank: bool = True) -> SettingResult[Any]:
    """Merge the files of one setting, the merged file first where there is one."""
    parts = number_by_split(kind, parts)
    ranks = {rank_of(part, kind) for part in parts}
    paths = tuple(chain.from_iterable(part.paths for part in parts))
    if every_rank and None not in ranks:
        _require_all_ranks(parts[0], ranks)
    try:
        first = replace(parts[0], records=_unique(iter(parts[0].records)))
        records = _unique(chain.from_iterable(part.records for part in parts)) if parts[1:] else first.records
    except DataError as error:
        raise DataError(
            f"{', '.join(map(str, paths))}: {error}. Ranks have to number samples together, or tell how many they "
            "are (field config.world_size)."
        ) from None
    if None in ranks and len(records) > len(first.records):
        lacking = {record.sample_id for record in records} - {record.sample_id for record in first.records}
        raise DataError(
            f"{first.paths[0]} lacks {len(lacking)} samples that the ranks' files beside it have: "
            f"{first_few(lacking)}. Remove whichever is out of date."
        )
    skipped = {name: why for part in parts for name, why in part.config.get("skipped", {}).items()}
    config = first.config | ({"skipped": skipped} if skipped else {})
    return SettingResult(first.knobs, records, config, paths, all(part.indexed for part in parts))


def _require_all_ranks(first: SettingResult[Any], ranks: set[int | None]) -> None:
    world_size = first.config.get("world_size", len(ranks))
    missing = [str(rank) for rank in range(world_size) if rank not in ranks] if isinstance(world_size, int) else []
    if missing:
        raise DataError(
            f"{first.paths[0]}: field config.world_size is {world_size}, but the files of ranks {', '.join(missing)} "
            "are missing and there is no merged file. Run the sweep to its end."
        )


def _unique(records: Iterator[Any]) -> tuple[Any, ...]:
    """Keep each sample once, in first order. Raises DataError where two records of one sample differ."""
    kept: dict[str, Any] = {}
    for record in records:
        first = kept.setdefault(record.sample_id, record)
        if first is not record and first != record:
            raise DataError(f"sample {record.sample_id} occurs twice with different values")
    return tuple(kept.values())

"""Reading result files, our own and those of other tools with the same layout.

Nothing is taken on trust: a knob that is given in several places has to agree, a sample that occurs twice has to be
the same, and a file that holds fewer samples than its summary says is truncated.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from budgetvlm._io import first_few, read_json
from budgetvlm.errors import DataError
from budgetvlm.knobs import KNOBS, Value
from budgetvlm.profiling.results.numbering import number_by_split
from budgetvlm.profiling.results.result_files import (
    FILE_KNOBS,
    FORMATS,
    SCHEMA_VERSION,
    Kind,
    SettingResult,
    results_directory,
)


def iter_results(directory: str | Path, dataset_name: str, kind: Kind) -> Iterator[SettingResult]:
    """Yield the settings that were measured, one at a time, in the order of their knobs.

    Files are looked for in ``<directory>/exp5_accuracy_<dataset>``, in the sibling ``<directory>_<dataset>`` and, if
    neither holds any, in the directory itself. Of one setting either the ranks' files or a merged file is read; with
    both, the merged one, which then has to hold every sample of the ranks.

    Raises:
        DataError: nothing there, or a file that is truncated, foreign or contradicts itself or another.
    """
    by_setting: dict[tuple[int, ...], list[tuple[int, Path]]] = defaultdict(list)
    for path in result_files(Path(directory), dataset_name, kind):
        match = FORMATS[kind].pattern.fullmatch(path.name)
        *setting, rank = (-1 if word is None else int(word) for word in (match.groups() if match else ()))
        by_setting[tuple(setting)].append((rank, path))
    for _, files in sorted(by_setting.items()):
        parts = [read_file(path, dataset_name, kind) for _, path in sorted(files)]  # a merged file comes first
        yield _merge(number_by_split(kind, parts))


def read_file(path: Path, dataset_name: str, kind: Kind) -> SettingResult:
    """Read a file as it is: samples may occur twice, or be numbered by rank or batch. Raises DataError."""
    document = read_json(path)
    match = FORMATS[kind].pattern.fullmatch(path.name)
    *setting, rank = match.groups() if match else (None,) * (len(FILE_KNOBS) + 1)
    try:
        config, summary, samples = _sections(document, FORMATS[kind].sample_keys, dataset_name)
        named = {knob: int(value) for knob, value in zip(FILE_KNOBS, setting, strict=True) if value}
        knobs = _knobs(samples, {"config": config, "summary": summary, "the file's name": named})
        records = tuple(FORMATS[kind].record.from_dict(raw) for raw in samples)
    except DataError as error:
        raise DataError(f"{path}: {error}. Remove the file and measure again, or mend it.") from None
    indexed = all(type(raw["sample_id"]) is int for raw in samples)
    return SettingResult(knobs, records, dict(config), (path,), indexed, None if rank is None else int(rank))


def result_files(directory: Path, dataset_name: str, kind: Kind) -> list[Path]:
    """Return the files that `iter_results` reads, sorted. Raises DataError: there are none, or in several places."""
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


def split_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the splits that a sweep ran on: "train+test" or "train,test" are two."""
    text = str(config.get("split") or "")
    return tuple(name.strip() for name in text.replace(",", "+").split("+") if name.strip())


def _list(place: Path, kind: Kind) -> list[Path]:
    pattern = FORMATS[kind].pattern
    return sorted(p for p in place.iterdir() if pattern.fullmatch(p.name)) if place.is_dir() else []


def _nothing_there(directory: Path, dataset_name: str, kind: Kind) -> str:
    form = FORMATS[kind]
    state = "holds no" if directory.exists() else "does not exist: no"
    return (
        f"{directory} {state} {kind} results of {dataset_name} (looked there, in "
        f"{results_directory(directory, dataset_name, kind).name}/ in it and in "
        f"{directory.name}_{dataset_name.replace('_', '-')}/ beside it for {form.stem}_crops*_topk*_blocks*.json). "
        f"Make them: budgetvlm profile {kind} --dataset_name {dataset_name} --output_dir {directory}, or python "
        f"experiments/profiling/{form.experiment}.py with the same flags"
    )


def _sections(
    document: Any, sample_keys: Sequence[str], dataset_name: str
) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Mapping[str, Any]]]:
    """Return config, the single summary entry and the samples, each checked for its shape."""
    if not isinstance(document, dict):
        raise DataError(f"not a result file: the document is a {type(document).__name__}, not an object")
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise DataError(f"field schema_version is {version!r}; this version reads {SCHEMA_VERSION}")
    key = next((key for key in sample_keys if key in document), None)
    if key is None:
        raise DataError(f"missing field {' or '.join(sample_keys)}; it may be a result of another kind")
    samples, config, summaries = document[key], document.get("config", {}), document.get("summary", [{}])
    if not isinstance(samples, list) or not samples:
        raise DataError(f"field {key} has to be a list of samples, one at least")
    if not isinstance(config, dict) or "NaN" in json.dumps(config):
        raise DataError("field config has to be an object without NaN")
    if not isinstance(summaries, list) or len(summaries) != 1 or not isinstance(summaries[0], dict):
        raise DataError("field summary has to be a list of one object")
    stored = config.get("dataset_name", dataset_name)
    if str(stored).replace("_", "-") != dataset_name.replace("_", "-"):
        raise DataError(f"field config.dataset_name is {stored!r}, but results of {dataset_name!r} are asked for")
    count = summaries[0].get("num_samples", len(samples))
    if count != len(samples):
        raise DataError(f"truncated: field summary.num_samples is {count!r}, but {key} holds {len(samples)} samples")
    return config, summaries[0], samples


def _knobs(samples: Sequence[Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    """Find the setting in samples, config, summary or file name; where several tell it, they have to agree."""
    named = ((f"sample {number}", sample) for number, sample in enumerate(samples) if isinstance(sample, dict))
    found: dict[str, tuple[str, Value]] = {}
    # a field "model" is a knob only where the file's name says so: other tools name their model by it
    possible = [knob for knob in FILE_KNOBS if knob in KNOBS or knob in others["the file's name"]]
    for source, fields in chain(named, others.items()):
        for knob in possible:
            if knob in fields:
                where, value = found.setdefault(knob, (source, fields[knob]))
                if value != fields[knob]:
                    raise DataError(f"field {knob} is {value!r} in {where} but {fields[knob]!r} in {source}")
    if not found:
        raise DataError(f"missing field {' or '.join(KNOBS)}: neither samples, config, summary nor the name has one")
    knobs = {knob: found[knob][1] for knob in FILE_KNOBS if knob in found}
    for knob, value in knobs.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"field {knob} is {value!r}; it has to be a whole number above 0")
    return knobs


def _merge(parts: Sequence[SettingResult]) -> SettingResult:
    """Merge the files of one setting, the merged file first where there is one."""
    first, is_merged = parts[0], parts[0].rank is None
    world_size = first.config.get("world_size", len(parts))
    if not is_merged and isinstance(world_size, int):
        missing = sorted(set(range(world_size)) - {part.rank for part in parts if part.rank is not None})
        if missing:
            raise DataError(
                f"{first.paths[0]}: field config.world_size is {world_size}, but the files of ranks "
                f"{', '.join(map(str, missing))} are missing and there is no merged file. Run the sweep to its end."
            )
    paths = tuple(chain.from_iterable(part.paths for part in parts))
    try:
        records = _unique(chain.from_iterable(part.records for part in parts))
    except DataError as error:
        raise DataError(
            f"{', '.join(map(str, paths))}: {error}. Ranks have to number samples together, or tell how many they "
            "are (field config.world_size)."
        ) from None
    lacking = records.keys() - {record.sample_id for record in first.records}
    if is_merged and lacking:
        raise DataError(
            f"{first.paths[0]} lacks {len(lacking)} samples that the ranks' files beside it have: "
            f"{first_few(lacking)}. Remove whichever is out of date."
        )
    skipped = {name: why for part in parts for name, why in part.config.get("skipped", {}).items()}
    config = first.config | ({"skipped": skipped} if skipped else {})
    indexed = all(part.indexed for part in parts)
    return replace(first, records=tuple(records.values()), config=config, paths=paths, indexed=indexed, rank=None)


def _unique(records: Iterable[Any]) -> dict[str, Any]:
    """Keep each sample once, in first order. Raises DataError where two records of one sample differ."""
    kept: dict[str, Any] = {}
    for record in records:
        first = kept.setdefault(record.sample_id, record)
        if first is not record and first != record:
            raise DataError(f"sample {record.sample_id} occurs twice with different values")
    return kept

"""From profiles to training data: join exp5 and exp6, split the samples, extract the features, write it all.

Beside ``controller_training_data.json`` lie ``controller_training_data.features.safetensors`` and
``controller_training_data.table.parquet`` (the same table, for `budgetvlm train --table`). The JSON is written last:
where it is, all is there. What is there is reused; what does not fit is an error that says how to choose.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from budgetvlm._io import write_json
from budgetvlm._version import __version__
from budgetvlm.errors import DataError, OutputError
from budgetvlm.features import Features
from budgetvlm.profiling.prepare.backend import Backend
from budgetvlm.profiling.prepare.document import REMEDY, read_document, to_document, to_table
from budgetvlm.profiling.prepare.feature_extraction import (
    Located,
    extract_features,
    locate,
    require_known_values,
    with_the_tasks_ids,
)
from budgetvlm.profiling.prepare.join import BY_INDEX, SAMPLE_IDS, join, split_names
from budgetvlm.profiling.prepare.prepare_options import LatencyFill, PrepareOptions
from budgetvlm.profiling.prepare.splits import TASK_SPLIT, assign_splits
from budgetvlm.profiling.results.result_files import result_files
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import SPLITS, TaskOptions

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """Training data and where it lies.

    Attributes:
        table: the profile table, with splits.
        features: a row for each of the table's samples, in its order.
        path: the JSON document.
        reused: whether it was there already.
    """

    table: ProfileTable
    features: Features
    path: Path
    reused: bool = False

    @property
    def table_path(self) -> Path:
        return table_path(self.path)

    @property
    def features_path(self) -> Path:
        return features_path(self.path)


def prepare(
    exp5_dir: str | Path,
    exp6_dir: str | Path,
    dataset_name: str,
    model_path: str,
    output_data_path: str | Path,
    *,
    train_split: float = 0.8,
    test_split: float = 0.0,
    force_recompute: bool = False,
    latency_fill: LatencyFill = "model",
    feature_batch_size: int = 32,
    seed: int = 0,
    device: str = "cpu",
    task: TaskOptions | None = None,
    backend: Backend | None = None,
    say: Say = print,
) -> PreparedData:
    """Make the controller's training data, or take what is there.

    Args:
        exp5_dir, exp6_dir: where the sweeps put their results; see `budgetvlm.profiling.results.reading.iter_results`.
        output_data_path: the JSON document; features and table go beside it.
        train_split: share of train in train and validation, by image; ignored where the task's splits are kept.
        test_split: share of the images to hold out.
        force_recompute: make everything anew, the features included, and replace what is there.
        latency_fill: see `budgetvlm.profiling.prepare.join.join`.
        feature_batch_size: images encoded at once.
        task: where the data set's files lie, if not where they lay when it was profiled.
        say: takes the lines for the user.

    Raises:
        ConfigError, DataError, KnobSpaceError: options, results or a model that cannot be used.
        OutputError: data of another origin is there, or nothing can be written.
    """
    options = PrepareOptions(
        Path(exp5_dir), Path(exp6_dir), task or TaskOptions(dataset_name), str(model_path), Path(output_data_path),
        train_split, test_split, latency_fill, feature_batch_size, seed, device,
    )  # fmt: skip
    backend = backend or Backend()
    source = _source(options, backend)
    if options.output_data_path.exists() and not force_recompute:
        return _reuse(options, source, say)
    _require_writable(options.output_data_path)
    return _make(options, backend, source, force_recompute, say)


def load_prepared(path: str | Path) -> PreparedData:
    """Read what `prepare` wrote.

    Raises:
        DataError: a file is missing, damaged, or does not belong to the others.
    """
    path = Path(path)
    document = read_document(path)
    table = to_table(document, path)
    features = Features.load(features_path(path))
    if features.metadata.get("key") != document.get("features_key"):
        raise DataError(f"{features_path(path)} was made for other data than {path}. {REMEDY}")
    return PreparedData(table, features.aligned(table.sample_ids), path, reused=True)


def _make(
    options: PrepareOptions, backend: Backend, source: dict[str, str], force_recompute: bool, say: Say
) -> PreparedData:
    table, notes = join(options.exp5_dir, options.exp6_dir, options.dataset_name, latency_fill=options.latency_fill)
    for note in notes:
        say(note)
    _check_model(options, source, table)
    table, located = _with_the_tasks_ids(options, backend, table, say)
    features = None if force_recompute else _cached_features(options, source, table, say)
    if features is None or not {"image_id", TASK_SPLIT} <= table.groups.keys():
        located = located or _locate(options, backend, table)
        table = _with_task_labels(table, located)
    table = assign_splits(table, options.train_split, options.test_split, options.seed)
    if features is None:  # the splits come first: what is wrong with them shows before hours of extraction
        features = _extract(options, backend, source, table, located, say)
        features.save(features_path(options.output_data_path))
    return _write(options, source, table, features, say)


def features_path(path: str | Path) -> Path:
    """The features beside a JSON document."""
    return Path(path).with_suffix(".features.safetensors")


def table_path(path: str | Path) -> Path:
    """The Parquet table beside a JSON document."""
    return Path(path).with_suffix(".table.parquet")


def _source(options: PrepareOptions, backend: Backend) -> dict[str, str]:
    """What the data is made of: if any of it differs, it is other data."""
    return {
        "dataset_name": options.dataset_name,
        "model_path": options.model_path,
        "model": backend.fingerprint(options.model_path),
        "exp5": _digest(result_files(options.exp5_dir, options.dataset_name, "accuracy")),
        "exp6": _digest(result_files(options.exp6_dir, options.dataset_name, "latency")),
        "latency_fill": options.latency_fill,
    }


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def _features_key(source: dict[str, str], table: ProfileTable) -> str:
    """Features depend on the model, its processor and the data set (and its prompts), not on what was measured."""
    named = {name: source[name] for name in ("dataset_name", "model_path", "model")}
    task = {name: value for name, value in _task_of(table).items() if name != "metric"}
    return json.dumps(named | ({"task": task} if task else {}))


def _split_options(options: PrepareOptions) -> dict[str, Any]:
    return {"train_split": options.train_split, "test_split": options.test_split, "seed": options.seed}


def _reuse(options: PrepareOptions, source: dict[str, str], say: Say) -> PreparedData:
    """The data that is there, if it is of the same origin; split anew if only the splits are to differ."""
    path = options.output_data_path
    document = read_document(path)
    stored = document.get("source", {})
    differing = [name for name, value in source.items() if stored.get(name) != value]
    if differing:
        raise OutputError(
            f"{path} exists, but was made with other {', '.join(differing)}. To make it anew, add --force_recompute; "
            "to keep it, give another --output_data_path."
        )
    prepared = load_prepared(path)
    table = assign_splits(prepared.table, options.train_split, options.test_split, options.seed)
    if table.split == prepared.table.split:
        say(f"using the data in {path} ({prepared.table.num_samples} samples); --force_recompute makes it anew")
        return prepared
    say(f"using the data in {path} with new splits")
    return replace(_write(options, source, table, prepared.features, say), reused=True)


def _check_model(options: PrepareOptions, source: dict[str, str], table: ProfileTable) -> None:
    """Where the results say which weights they are of, these have to be the model's."""
    profiled = table.metadata["exp5_config"].get("model_fingerprint")
    if profiled not in (None, source["model"]):
        raise DataError(
            f"the results in {options.exp5_dir} are of other weights (field config.model_fingerprint is {profiled}) "
            f"than model_path={options.model_path} ({source['model']}). Give the model that was profiled, or profile "
            "this one."
        )


def _cached_features(options: PrepareOptions, source: dict[str, str], table: ProfileTable, say: Say) -> Features | None:
    """Features of an earlier run that did not come to its end, or None where there are none for these samples."""
    path = features_path(options.output_data_path)
    if not path.exists():
        return None
    features = Features.load(path)
    if features.metadata.get("key") != _features_key(source, table):
        raise OutputError(
            f"{path} exists, but holds features of another model, processor or data set. To replace them, add "
            "--force_recompute; to keep them, give another --output_data_path."
        )
    if set(table.sample_ids) - set(features.sample_ids):
        say(f"{path} lacks some of the samples; extracting all")
        return None
    say(f"using the features in {path}")
    return features.aligned(table.sample_ids)


def _with_the_tasks_ids(
    options: PrepareOptions, backend: Backend, table: ProfileTable, say: Say
) -> tuple[ProfileTable, list[Located]]:
    """Where samples are numbered by their index in the split: the table with the task's own ids, and its samples."""
    if table.metadata.get(SAMPLE_IDS) != BY_INDEX:
        return table, []
    config = table.metadata["exp5_config"]
    splits = split_names(config)
    if len(splits) != 1:
        raise DataError(
            f"the samples in {options.exp5_dir} are numbered, and a number is an index in the split, but field "
            f"config.split is {config.get('split')!r}. Name the one split that was profiled, or give ids that are text."
        )
    task = backend.open_task(options.task.remembered(_task_of(table)))
    return with_the_tasks_ids(task, table, splits[0], config.get("world_size"), say)


def _locate(options: PrepareOptions, backend: Backend, table: ProfileTable) -> list[Located]:
    labels = dict.fromkeys(table.groups.get(TASK_SPLIT, ()))
    splits = tuple(labels) or split_names(table.metadata["exp5_config"]) or SPLITS
    task = options.task.remembered(_task_of(table))
    return locate(backend.open_task(task), table.sample_ids, splits)


def _task_of(table: ProfileTable) -> dict[str, str]:
    """How the task was opened that was profiled; empty where it takes no options."""
    return dict(table.metadata["exp5_config"].get("task", {}))


def _with_task_labels(table: ProfileTable, located: Sequence[Located]) -> ProfileTable:
    """Add the image ids and splits that the result files lack."""
    known = {
        "image_id": tuple(place.sample.image_id for place in located),
        TASK_SPLIT: tuple(place.split for place in located),
    }
    wrong = [name for name in known if name in table.groups and table.groups[name] != known[name]]
    if wrong:
        raise DataError(
            f"field groups.{wrong[0]} of the accuracy results differs from the data set's own. The results are of "
            "another version of the data set; profile this one."
        )
    return replace(table, groups=known | table.groups)


def _extract(
    options: PrepareOptions,
    backend: Backend,
    source: dict[str, str],
    table: ProfileTable,
    located: Sequence[Located],
    say: Say,
) -> Features:
    vlm = backend.open_vlm(options.model_path, options.device)
    require_known_values(table.knob_space, vlm, options.model_path)
    return extract_features(
        vlm,
        [place.sample for place in located],
        batch_size=options.feature_batch_size,
        metadata={"key": _features_key(source, table), "budgetvlm": __version__},
        say=say,
    )


def _write(
    options: PrepareOptions, source: dict[str, str], table: ProfileTable, features: Features, say: Say
) -> PreparedData:
    """Write table and document, the document last."""
    path = options.output_data_path
    how = {
        "dataset_name": options.dataset_name,
        "model_path": options.model_path,
        "source": source,
        "split_options": _split_options(options),
        "features_key": _features_key(source, table),
        "files": {"features": features_path(path).name, "table": table_path(path).name},
        "made_by": f"budgetvlm {__version__}: prepare --exp5_dir {options.exp5_dir} --exp6_dir {options.exp6_dir}",
    }
    document = to_document(table, how)
    table.save(table_path(path))
    write_json(path, document)
    sides = ", ".join(f"{name} {count}" for name, count in document["splits"]["samples"].items())
    sizes = f"{features.image.shape[1]} image and {features.language.shape[1]} language features"
    say(
        f"wrote {path}: {table.num_samples} samples ({sides}; split by {document['splits']['by']}), "
        f"{table.metadata['measured_settings']} settings, {sizes}"
    )
    return PreparedData(table, features, path)


def _require_writable(path: Path) -> None:
    """Fail before hours of work, not after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Choose a writable directory with --output_data_path."
        ) from error

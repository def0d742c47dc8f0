"""From profiles to training data: join exp5 and exp6, split the samples, extract the features, write it all.

Beside ``controller_training_data.json`` lie ``controller_training_data.features.safetensors`` and
``controller_training_data.table.parquet`` (the same table, for `budgetvlm train --table`). The JSON is written last:
where it is, all is there. What is there is reused; what does not fit is an error that says how to choose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from budgetvlm._io import require_writable
from budgetvlm.engines.opening import is_engine
from budgetvlm.errors import DataError, OutputError
from budgetvlm.features import Features
from budgetvlm.profiling.prepare.document import read_document
from budgetvlm.profiling.prepare.feature_extraction import Backend, features_of_table
from budgetvlm.profiling.prepare.holding_back import hold_back
from budgetvlm.profiling.prepare.join import BY_INDEX, SAMPLE_IDS, join
from budgetvlm.profiling.prepare.joined_tables import join_features, join_tables
from budgetvlm.profiling.prepare.made_features import MakeOptions, inputs_of_samples, made_features
from budgetvlm.profiling.prepare.prepare_options import PrepareOptions
from budgetvlm.profiling.prepare.prepared_data import PreparedData, Say, features_path, load_prepared, write_prepared
from budgetvlm.profiling.prepare.splits import TASK_SPLIT, assign_splits
from budgetvlm.profiling.prepare.task_samples import find_samples, sample_labels, with_task_ids
from budgetvlm.profiling.results.places import find_results
from budgetvlm.profiling.results.reading import read_file, result_files, split_names
from budgetvlm.profiling.results.result_files import results_directory
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import SPLITS, SplitSample, Task
from budgetvlm.tasks.options import PLACES

BUNDLED = "reference"
DATA_SETS = "data_sets"  # in the source of a document that joins those of several data sets


def prepare(
    options: PrepareOptions, *, force_recompute: bool = False, backend: Backend | None = None, say: Say = print
) -> PreparedData:
    """Make the controller's training data, or take what is there.

    Args:
        force_recompute: make everything anew, the features included, and replace what is there.
        backend: where tasks and models come from.
        say: takes the lines for the user.

    Raises:
        ConfigError, DataError, KnobSpaceError: results or a model that cannot be used.
        OutputError: data of another origin is there, or nothing can be written.
    """
    backend = backend or Backend()
    if len(options.task.names) > 1 and not _measured_as_one(options):
        return _prepare_each(options, force_recompute, backend, say)
    run = _Preparation(options, backend, say)
    if options.output_data_path.exists() and not force_recompute:
        return run.reuse()
    require_writable(options.output_data_path.parent, "--output_data_path")
    return run.make(force_recompute)


def _measured_as_one(options: PrepareOptions) -> bool:
    """Whether one sweep measured all of the data sets, which earlier versions did."""
    place = find_results(options.exp5_dir, options.dataset_name, "accuracy", options.model_path)
    return results_directory(place, options.dataset_name, "accuracy").is_dir()


def _prepare_each(options: PrepareOptions, force_recompute: bool, backend: Backend, say: Say) -> PreparedData:
    """Make the data of each data set, in files of its own, and join it; a joined document may be replaced at any time.

    Raises OutputError: other data is there.
    """
    path = options.output_data_path
    if path.exists() and not force_recompute and DATA_SETS not in read_document(path).get("source", {}):
        raise OutputError(
            f"{path} exists, and is of one data set. To replace it, add --force_recompute; to keep it, give another "
            "--output_data_path."
        )
    parts: dict[str, PreparedData] = {}
    for name in options.task.names:
        say(f"{name}:")
        own = path.with_name(f"{path.stem}.{name}.json")
        asked = replace(options, task=options.task.only(name), output_data_path=own)
        parts[name] = prepare(asked, force_recompute=force_recompute, backend=backend, say=say)
    table = join_tables({name: part.table for name, part in parts.items()}, say)
    if any("extractor" in part.features.metadata for part in parts.values()):
        features = _made_together(options, table, backend, say)
    else:
        features = join_features({name: part.features for name, part in parts.items()})
    documents = {name: read_document(part.path) for name, part in parts.items()}
    key = json.dumps([document["features_key"] for document in documents.values()])
    features = replace(features, metadata={**features.metadata, "key": key})
    features.save(features_path(path))
    how = {
        "dataset_name": options.dataset_name,
        "model_path": next(iter(documents.values()))["model_path"],
        "source": {DATA_SETS: {name: document["source"] for name, document in documents.items()}},
        "features_key": key,
    }
    return replace(
        write_prepared(options, table, features, how, say), reused=all(part.reused for part in parts.values())
    )


def _made_together(options: PrepareOptions, table: ProfileTable, backend: Backend, say: Say) -> Features:
    """Make features without the model for the samples of several data sets, fitted to all of them."""
    task = backend.open_task(options.task.remembered(_task_of(table)))
    samples = find_samples(task, table.sample_ids, split_names(table.metadata["exp5_config"]) or SPLITS)
    how = MakeOptions(options.encoder, batch_size=options.feature_batch_size, device=options.device)
    return made_features(table, inputs_of_samples(task.name, samples), how, options.output_data_path, say)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def _task_of(table: ProfileTable) -> dict[str, str]:
    """Return how the task was opened that was profiled; empty where it takes no options."""
    return dict(table.metadata["exp5_config"].get("task", {}))


class _Preparation:
    """One run of `prepare`.

    Attributes:
        source: what the data is made of: if any of it differs, it is other data.
    """

    def __init__(self, options: PrepareOptions, backend: Backend, say: Say) -> None:
        name, model = options.dataset_name, options.model_path
        options = replace(
            options,
            exp5_dir=find_results(options.exp5_dir, name, "accuracy", model),
            exp6_dir=find_results(options.exp6_dir, name, "latency", model),
        )
        files = result_files(options.exp5_dir, name, "accuracy")
        self.model_path = model or str(read_file(files[0], name, "accuracy").config.get("model_path", BUNDLED))
        self.options, self.backend, self.say = options, backend, say
        self.source = {
            "dataset_name": name,
            "model": backend.fingerprint(self.model_path),
            "exp5": _digest(files),
            "exp6": _digest(result_files(options.exp6_dir, name, "latency")),
            "latency_fill": options.latency_fill,
            "calibration_samples": options.calibration_samples,
            "encoder": options.encoder,
        }
        self.makes_features = options.encoder is not None or is_engine(self.model_path)

    def make(self, force_recompute: bool) -> PreparedData:
        """Join the results, split the samples, extract the features and write it all."""
        options = self.options
        table, notes = join(options.exp5_dir, options.exp6_dir, options.dataset_name, latency_fill=options.latency_fill)
        for note in notes:
            self.say(note)
        self._check_model(table)
        table, samples = self._with_task_ids(table)
        features = None if force_recompute or self.makes_features else self._cached_features(table)
        if features is None or not {"image_id", TASK_SPLIT} <= table.groups.keys():
            samples = samples or self._find_samples(table)
            table = _with_task_labels(table, samples)
        # the splits come first: what is wrong with them shows before hours of extraction
        table = self._split(table)
        samples = [place for place in samples if place.sample.sample_id in set(table.sample_ids)]
        if features is None:
            features = self._features(table, samples)
            features.save(features_path(options.output_data_path))
        return self._write(table, features)

    def reuse(self) -> PreparedData:
        """Take the data that is there, if it is of the same origin; split it anew if only the splits differ."""
        options, path = self.options, self.options.output_data_path
        stored = read_document(path).get("source", {})
        differing = [name for name, value in self.source.items() if stored.get(name) != value]
        if differing:
            raise OutputError(
                f"{path} exists, but was made with other {', '.join(differing)}. To make it anew, add "
                "--force_recompute; to keep it, give another --output_data_path."
            )
        prepared = load_prepared(path)
        test_split = options.test_split
        if test_split is None:
            test_split = read_document(path).get("split_options", {}).get("test_split")
        table = assign_splits(self._grouped(prepared.table), options.train_split, test_split, options.seed)
        if (table.split, table.unit) == (prepared.table.split, prepared.table.unit):
            self.say(f"using the data in {path} ({table.num_samples} samples); --force_recompute makes it anew")
            return prepared
        self.say(f"using the data in {path} with new splits")
        if self.makes_features:  # they are fitted on the training samples
            return self.make(force_recompute=True)
        return replace(self._write(table, prepared.features), reused=True)

    def _split(self, table: ProfileTable) -> ProfileTable:
        """Hold back what calibration needs, draw the splits, and say which of them the data set did not bring."""
        options = self.options
        table, note = hold_back(table, self._open_task(table), options.calibration_samples)
        table = assign_splits(self._grouped(table), options.train_split, options.test_split, options.seed)
        table = replace(table, metadata={**table.metadata, "model_fingerprint": self.source["model"]})
        if note:
            self.say(note)
        sides = set(table.split or ())
        if "test" in sides - set(table.groups[TASK_SPLIT]) and options.test_split is None:
            self.say("the data set has no test split: a part is held out for `budgetvlm evaluate` (--test_split)")
        elif "test" not in sides:
            self.say(
                "no test split: `budgetvlm evaluate` can report on --split validation alone. Profile more images, or "
                "hold some out with --test_split"
            )
        return table

    def _grouped(self, table: ProfileTable) -> ProfileTable:
        """The table without its splits, with the groups that the options name, or else the accuracy sweep."""
        table = replace(table, split=None)
        groups = self.options.groups or table.metadata["exp5_config"].get("groups")
        return table.grouped_by(groups) if groups else table

    def _check_model(self, table: ProfileTable) -> None:
        """Check the weights against those of the results, where these say which they are of."""
        profiled = table.metadata["exp5_config"].get("model_fingerprint")
        if profiled not in (None, self.source["model"]):
            raise DataError(
                f"the results in {self.options.exp5_dir} are of other weights (field config.model_fingerprint is "
                f"{profiled}) than model_path={self.model_path} ({self.source['model']}). Give the model that "
                "was profiled, or profile this one."
            )

    def _cached_features(self, table: ProfileTable) -> Features | None:
        """Read the features of a run that did not come to its end; None where there are none for these samples."""
        path = features_path(self.options.output_data_path)
        if not path.exists():
            return None
        features = Features.load(path)
        if features.metadata.get("key") != self._features_key(table):
            raise OutputError(
                f"{path} exists, but holds features of another model, processor or data set. To replace them, add "
                "--force_recompute; to keep them, give another --output_data_path."
            )
        if set(table.sample_ids) - set(features.sample_ids):
            self.say(f"{path} lacks some of the samples; extracting all")
            return None
        self.say(f"using the features in {path}")
        return features.aligned(table.sample_ids)

    def _features(self, table: ProfileTable, samples: Sequence[SplitSample]) -> Features:
        """Extract features from the model, or make them without it."""
        options, key = self.options, {"key": self._features_key(table)}
        if not self.makes_features:
            return features_of_table(
                table, samples, self.model_path, self.backend, device=options.device,
                batch_size=options.feature_batch_size, metadata=key, say=self.say,
            )  # fmt: skip
        how = MakeOptions(options.encoder, batch_size=options.feature_batch_size, device=options.device)
        inputs = inputs_of_samples(options.dataset_name, samples)
        features = made_features(table, inputs, how, options.output_data_path, self.say)
        return replace(features, metadata=features.metadata | key)

    def _features_key(self, table: ProfileTable) -> str:
        """Return what features depend on: model, processor, data set (and its prompts), not what was measured."""
        named = {name: self.source[name] for name in ("dataset_name", "model")}
        task = {name: value for name, value in _task_of(table).items() if name not in ("metric", *PLACES)}
        return json.dumps(named | ({"task": task} if task else {}))

    def _with_task_ids(self, table: ProfileTable) -> tuple[ProfileTable, list[SplitSample]]:
        """Give the table the task's own ids where samples are numbered by their index in the split."""
        if table.metadata.get(SAMPLE_IDS) != BY_INDEX:
            return table, []
        config = table.metadata["exp5_config"]
        splits = split_names(config)
        if len(splits) != 1:
            raise DataError(
                f"the samples in {self.options.exp5_dir} are numbered, and a number is an index in the split, but "
                f"field config.split is {config.get('split')!r}. Name the one split that was profiled, or give ids "
                "that are text."
            )
        return with_task_ids(self._open_task(table), table, splits[0], config.get("world_size"), self.say)

    def _find_samples(self, table: ProfileTable) -> list[SplitSample]:
        labels = dict.fromkeys(table.groups.get(TASK_SPLIT, ()))
        splits = tuple(labels) or split_names(table.metadata["exp5_config"]) or SPLITS
        return find_samples(self._open_task(table), table.sample_ids, splits)

    def _open_task(self, table: ProfileTable) -> Task:
        return self.backend.open_task(self.options.task.remembered(_task_of(table)))

    def _write(self, table: ProfileTable, features: Features) -> PreparedData:
        how = {
            "dataset_name": self.options.dataset_name,
            "model_path": self.model_path,
            "source": self.source,
            "features_key": self._features_key(table),
        }
        return write_prepared(self.options, table, features, how, self.say)


def _with_task_labels(table: ProfileTable, samples: Sequence[SplitSample]) -> ProfileTable:
    """Add the image ids and splits that the result files lack."""
    known = sample_labels(samples)
    wrong = [name for name in known if name in table.groups and table.groups[name] != known[name]]
    if wrong:
        raise DataError(
            f"field groups.{wrong[0]} of the accuracy results differs from the data set's own. The results are of "
            "another version of the data set; profile this one."
        )
    return replace(table, groups=known | table.groups)

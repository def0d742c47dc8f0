"""From an imported table to files that train a controller: features, splits, table, all whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from budgetvlm.errors import ConfigError, DataError, OutputError
from budgetvlm.features import Features
from budgetvlm.importing.table_inputs import inputs_of
from budgetvlm.profiling.prepare.feature_extraction import Backend, features_of_table
from budgetvlm.profiling.prepare.made_features import MakeOptions, made_features
from budgetvlm.profiling.prepare.splits import assign_splits
from budgetvlm.profiling.prepare.task_samples import find_samples, sample_labels, with_task_ids
from budgetvlm.profiling.results.reading import split_names
from budgetvlm.table import SPLITS, ProfileTable
from budgetvlm.tasks import SplitSample, TaskOptions

Say = Callable[[str], None]


@dataclass(frozen=True)
class FinishOptions:
    """What becomes of an imported table; a ConfigError names all that cannot work.

    Attributes:
        output: the table, a .parquet file; features go beside it, as .features.safetensors.
        features: a file of features (.safetensors or .npz), or None.
        make: instead of a file: how to make them from questions and images.
        model_path: or the model under control to extract them with, from the data set.
        task: data set that the sample ids are of; the table then has its ids and its images'. None: not asked.
        split: of the data set, where samples are numbered by their index in it.
        groups: the label whose samples belong together, see `ProfileTable.unit`; None: images where they are known.
        train_split, test_split, seed: of the splits; see `budgetvlm.profiling.prepare.splits.assign_splits`.
        overwrite: replace what is there.
    """

    output: Path
    features: Path | None = None
    make: MakeOptions | None = None
    model_path: str | None = None
    task: TaskOptions | None = None
    split: str | None = None
    groups: str | None = None
    train_split: float = 0.8
    test_split: float | None = None
    seed: int = 0
    overwrite: bool = False
    feature_batch_size: int = 32
    device: str = "cpu"

    def __post_init__(self) -> None:
        problems = []
        if self.output.suffix != ".parquet" or self.output.is_dir():
            problems.append(f"output={str(self.output)!r} has to be the name of a .parquet file")
        if sum(given is not None for given in (self.features, self.make, self.model_path)) > 1:
            problems.append("features come from --features or from --model_path, not from both")
        if self.model_path is not None and self.task is None:
            problems.append("--model_path needs --dataset_name")
        if not 0 < self.train_split < 1 or not 0 <= (self.test_split or 0.0) < 1:
            problems.append(f"train_split={self.train_split} and test_split={self.test_split} have to be shares")
        if problems:
            raise ConfigError("cannot import: " + "; ".join(problems))

    @property
    def features_path(self) -> Path:
        return self.output.with_suffix(".features.safetensors")

    def require_free(self) -> None:
        """Raise OutputError where something is there already and is not to be replaced."""
        there = [path for path in (self.output, self.features_path) if path.exists()]
        if there and not self.overwrite:
            raise OutputError(f"{there[0]} exists. To replace it, add --overwrite; to keep it, give another --output.")


def finish(
    table: ProfileTable, options: FinishOptions, *, by_index: bool, backend: Backend | None = None, say: Say = print
) -> tuple[ProfileTable, Features | None]:
    """Draw the splits, find or make the features, write features and table, the table last.

    ``by_index``: whether the table's sample ids are indices in the split. Raises BudgetVLMError: features that are
    missing or cannot be made, splits that cannot be drawn, an output that is there already or cannot be written.
    """
    options.require_free()
    features, samples = None, list[SplitSample]()
    backend = backend or Backend()
    if options.task is not None:
        table, samples = _of_data_set(table, options, options.task, by_index, backend, say)
    table = table.grouped_by(options.groups) if options.groups else table
    table, inputs = (table, None) if options.make is None else inputs_of(table, samples, options.make)
    table = assign_splits(table, options.train_split, options.test_split, options.seed)
    if options.model_path is not None:
        features = features_of_table(
            table, samples, options.model_path, backend, device=options.device, batch_size=options.feature_batch_size,
            metadata={"model_path": options.model_path, "dataset_name": options.task and options.task.dataset_name},
            say=say,
        )  # fmt: skip
    elif options.features is not None:
        features = read_features(options.features).aligned(table.sample_ids)
    elif options.make is not None and inputs is not None:
        features = made_features(table, inputs, options.make, options.output, say)
    if features is not None:
        features.save(options.features_path)
    else:
        options.features_path.unlink(missing_ok=True)  # those of a table that is replaced
    table.save(options.output)
    return table, features


def read_features(path: Path) -> Features:
    """Read a file of ours, or .npz with the arrays sample_ids, image and language. Raises DataError: any other file."""
    if path.suffix != ".npz":
        return Features.load(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("sample_ids", "image", "language")}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path} holds no features ({error}): it needs the arrays sample_ids [S] (text or whole numbers), "
            "image [S, Di] and language [S, Dl]"
        ) from None
    return Features(tuple(map(str, found["sample_ids"].tolist())), found["image"], found["language"])


def _of_data_set(
    table: ProfileTable, options: FinishOptions, asked: TaskOptions, by_index: bool, backend: Backend, say: Say
) -> tuple[ProfileTable, list[SplitSample]]:
    """Give the table the data set's own ids and labels; return its samples as well."""
    config = table.metadata.get("exp5_config", {})
    task = backend.open_task(asked.remembered(config["task"]) if "task" in config else asked)
    splits = (options.split,) if options.split else tuple(getattr(task, "splits", SPLITS))
    if by_index:
        said = splits if len(splits) == 1 else split_names(config)
        if len(said) != 1:
            raise ConfigError(
                f"samples are numbered, and a number is an index in the split; say of which split of {asked.name} with "
                "--split"
            )
        table, samples = with_task_ids(task, table, said[0], config.get("world_size"), say)
    else:
        samples = find_samples(task, _whole_ids(table.sample_ids, options.split), splits)
    ids = tuple(one.sample.sample_id for one in samples)
    return replace(table, sample_ids=ids, groups={**table.groups, **sample_labels(samples)}), samples


def _whole_ids(sample_ids: Sequence[str], split: str | None) -> list[str]:
    """Name samples as data sets here do: the split before the data set's own id, which others give alone."""
    if split is None:
        return list(sample_ids)
    start = f"{split}-"
    return [name if name.startswith(start) or f"/{start}" in name else start + name for name in sample_ids]

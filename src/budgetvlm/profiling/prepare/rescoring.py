"""Stored answers scored by another metric: nothing is measured again.

The answers have to be those that the other metric would have asked for: one that asks in other words (options listed,
a caption wanted) needs answers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from budgetvlm.errors import ConfigError, DataError, OutputError
from budgetvlm.profiling.prepare.task_samples import find_samples
from budgetvlm.profiling.results.reading import iter_results, split_names
from budgetvlm.profiling.results.result_files import RESCORED, SettingResult, result_path, write_result
from budgetvlm.tasks import SPLITS, SplitSample, Task, TaskOptions, load_task

BLOCKS = ("num_total_blocks", "active_block_indices")


def rescore(
    exp5_dir: Path,
    asked: TaskOptions,
    output_dir: Path,
    *,
    overwrite: bool = False,
    open_task: Callable[[TaskOptions], Task] = load_task,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write the results of an accuracy sweep anew, with scores by another metric.

    ``asked``: data set and new metric; where the data lies now, if it has moved. Returns the paths of the new files.
    Raises ConfigError: no metric; DataError: results that cannot be used, or samples that the new metric would have
    asked otherwise; OutputError: results are there already and are not to be replaced.
    """
    if asked.metric is None:
        raise ConfigError("no metric was given; say by which one the answers are to be scored, with --metric NAME")
    results = list(iter_results(exp5_dir, asked.dataset_name, "accuracy"))
    paths = [result_path(output_dir, asked.dataset_name, "accuracy", result.knobs) for result in results]
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise OutputError(f"{there[0]} exists. To replace it, add --overwrite; to keep it, give another --output_dir.")
    stored = results[0].config.get("task", {})
    before = replace(asked, metric=None).remembered(stored)
    after = replace(before, metric=asked.metric)
    task = open_task(after)
    samples = _samples(open_task(before), task, results)
    for result in results:
        records = [
            replace(r, score=float(task.score(r.pred, samples[r.sample_id].sample)),
                    answers=samples[r.sample_id].sample.answers)
            for r in result.records
        ]  # fmt: skip
        write_result(
            "accuracy", output_dir, asked.dataset_name, result.knobs, records,
            blocks={name: result.config[name] for name in BLOCKS if name in result.config},
            config=result.config | {"task": after.to_dict(), RESCORED: result.config.get(RESCORED, stored)},
        )  # fmt: skip
        old, new = (float(np.mean([record.score for record in some])) for some in (result.records, records))
        setting = ", ".join(f"{name}={value}" for name, value in result.knobs.items())
        say(f"{setting}: accuracy {old:.1%} before, {new:.1%} by {asked.metric}")
    return paths


def _samples(before: Task, after: Task, results: Sequence[SettingResult]) -> dict[str, SplitSample]:
    """Return the samples by id, as the new metric sees them."""
    names = list(dict.fromkeys(record.sample_id for result in results for record in result.records))
    splits = split_names(results[0].config) or SPLITS
    found = [find_samples(task, names, splits) for task in (before, after)]
    other = [b for a, b in zip(*found, strict=True) if a.sample.question != b.sample.question]
    if other:
        raise DataError(
            f"{len(other)} of {len(names)} samples would have been asked otherwise for this metric, the first one as "
            f"{other[0].sample.question!r}. Their answers are to another question: profile again with --metric."
        )
    return {one.sample.sample_id: one for one in found[1]}

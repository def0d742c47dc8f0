"""Samples that are kept out of the training data, so that the guard can be calibrated on some that nothing has seen."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np

from budgetvlm.profiling.prepare.splits import TASK_SPLIT
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import Task

USUAL, LEAST = 50, 28  # calibration requests: the default, and what at most 5% of late ones takes
CALIBRATION_SPLIT = "calibration_split"  # in the metadata of a table: the task's split that has samples left


def hold_back(table: ProfileTable, task: Task, wanted: int | None) -> tuple[ProfileTable, str | None]:
    """Return the table without the samples that calibration needs, and a note for the user.

    Where the task has enough samples that were not profiled, nothing is held back. Whole images are, chosen by a digest
    of their ids, so that data that is prepared anew with other splits holds back the same ones.

    Args:
        table: with the labels of `sample_labels`.
        wanted: number of samples; None: `USUAL`, or down to `LEAST` of a small data set.
    """
    profiled = Counter(table.groups[TASK_SPLIT])
    skipped = len(table.metadata.get("exp5_config", {}).get("skipped", ()))
    fresh = {split: max(0, task.num_samples(split) - count - skipped) for split, count in profiled.items()}
    most = max(fresh, key=lambda split: (fresh[split], split == "validation"))
    if wanted == 0 or (wanted is None and fresh[most] >= USUAL):
        return _noted(table, most), None
    split = max(profiled, key=lambda name: (name != "test", profiled[name]))
    size = profiled[split]
    number = min(USUAL, max(LEAST, size // 5)) if wanted is None else wanted
    held = _images(table, split, number - fresh[split], size // 2 if wanted is None else size - 1)
    if held is None:
        return _noted(table, most), (
            f"too few samples ({size} of split {split}) to hold {number} back for `budgetvlm calibrate`: profile more, "
            "or calibrate on another data set or with a larger --alpha"
        )
    if not len(held):
        return _noted(table, split), None
    rows = np.setdiff1d(np.arange(table.num_samples), held)
    return _noted(table.subset(rows), split), (
        f"{len(held)} samples are held back for `budgetvlm calibrate`, because the data set has no others "
        "(--calibration_samples)"
    )


def _images(table: ProfileTable, split: str, number: int, most: int) -> np.ndarray | None:
    """Return the rows of some images of a split, ``number`` or a few more; None where that takes over ``most``."""
    rows: dict[str, list[int]] = {}
    for row, (side, image) in enumerate(zip(table.groups[TASK_SPLIT], table.groups["image_id"], strict=True)):
        if side == split:
            rows.setdefault(image, []).append(row)
    held: list[int] = []
    for image in sorted(rows, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(held) >= number:
            break
        held += rows[image] if len(held) + len(rows[image]) <= most else []
    return np.array(held, dtype=np.int64) if len(held) >= number else None


def _noted(table: ProfileTable, split: str) -> ProfileTable:
    return replace(table, metadata={**table.metadata, CALIBRATION_SPLIT: split})

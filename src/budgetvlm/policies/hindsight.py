"""What policies are measured by: it reads labels or outcomes of the evaluated table itself and never competes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.states import States
from budgetvlm.table import ProfileTable


@dataclass(frozen=True, eq=False)
class GroupLookup:
    """Has a lookup table for each group of training samples; it knows the true group, which no request tells.

    Attributes:
        labels: names of the labels that define a group, for example ("kind", "difficulty").
        accuracy: mean training accuracy of each group, ``[number of groups, K]``, drawn towards the overall means by a
            few pseudo-samples; the last row, for groups not seen in training, is the overall means.
    """

    means: SettingMeans
    labels: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]
    accuracy: np.ndarray
    name: str = "group lookup"

    @classmethod
    def fit(
        cls,
        table: ProfileTable,
        labels: tuple[str, ...] = ("kind", "difficulty"),
        means: SettingMeans | None = None,
        pseudo_samples: float = 4.0,
    ) -> GroupLookup:
        """Group means of a training table.

        Raises:
            DataError: the table lacks one of the labels.
        """
        means = means or SettingMeans.fit(table)
        rows = group_keys(table, labels)
        keys = tuple(sorted(set(rows)))
        number = _numbers(rows, keys)
        groups = [_shrunk(table.accuracy[number == g], means.accuracy, pseudo_samples) for g in range(len(keys))]
        return cls(means, tuple(labels), keys, np.stack([*groups, means.accuracy]))

    def choose(self, states: States) -> np.ndarray:
        number = _numbers(group_keys(states.table, self.labels), self.keys)[states.sample_index]
        return self.means.choose(self.accuracy[number], states.feasible, states.price)


def group_keys(table: ProfileTable, labels: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The group of each sample, S tuples of labels.

    Raises:
        DataError: the table lacks one of the labels.
    """
    missing = [label for label in labels if label not in table.groups]
    if missing:
        raise DataError(
            f"the table has no label {', '.join(missing)}; it has {', '.join(table.groups) or 'none'}. Give labels "
            "that it has, or leave the group lookup out."
        )
    return list(zip(*(table.groups[label] for label in labels), strict=True))


def _numbers(rows: list[tuple[str, ...]], keys: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """The number of each row's key, int64 ``[S]``; an unknown key gets ``len(keys)``."""
    number = {key: index for index, key in enumerate(keys)}
    return np.array([number.get(row, len(keys)) for row in rows], dtype=np.int64)


def _shrunk(accuracy: np.ndarray, prior: np.ndarray, pseudo_samples: float) -> np.ndarray:
    """The mean over the measured cells of ``[n, K]``, drawn towards ``prior [K]`` by a number of pseudo-samples."""
    count = (~np.isnan(accuracy)).sum(axis=0)
    total = np.nansum(accuracy, axis=0, dtype=np.float64) + pseudo_samples * prior
    return np.where(count > 0, total / np.maximum(count + pseudo_samples, 1e-9), prior)


@dataclass(frozen=True, eq=False)
class Oracle:
    """Chooses the best setting for each sample with hindsight, at mean latencies instead of measured ones: a bound."""

    means: SettingMeans
    name: str = "oracle"

    def choose(self, states: States) -> np.ndarray:
        return self.means.choose(states.table.accuracy[states.sample_index], states.feasible, states.price)

"""What a policy is fitted on: training and validation samples, in full or with something left out.

Shapes: S samples, K settings, P budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies import free_settings, group_keys
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

VIEWS = ("image", "question", "neither", "labels")  # what is read in place of all features


@dataclass(frozen=True, eq=False)
class FittingData:
    """What the entries of a comparison are fitted on.

    Attributes:
        table: training and validation samples, told apart by their split.
        features: of all samples, or None.
        means, guard: of the training samples.
        budgets_ms: the budgets of the evaluation, ``[P]``.
        labels: the labels that define a group; empty where the table has none of them.
        members, num_epochs: see `CompareOptions`.
    """

    table: ProfileTable
    features: Features | None
    means: SettingMeans
    guard: StaticGuard
    budgets_ms: np.ndarray
    labels: tuple[str, ...]
    members: int
    num_epochs: int

    @property
    def train(self) -> ProfileTable:
        return self.table.subset("train")

    @property
    def validation(self) -> ProfileTable:
        return self.table.subset("validation")

    @property
    def given(self) -> Features:
        """The features. Raises DataError without them."""
        if self.features is None:
            raise DataError("this policy reads features and none were given")
        return self.features

    @property
    def sides(self) -> tuple[ProfileTable, Features, ProfileTable, Features]:
        """Training samples with their features, then validation samples with theirs."""
        train, validation = self.train, self.validation
        return train, self.given.aligned(train.sample_ids), validation, self.given.aligned(validation.sample_ids)

    def only_knobs(self, knobs: tuple[str, ...]) -> FittingData:
        """The data as if only the settings had been profiled in which all other knobs have their largest value."""
        held = ~free_settings(self.table.knob_space, knobs)
        accuracy, latency = self.table.accuracy.copy(), self.table.latency_ms.copy()
        accuracy[:, held], latency[:, held] = np.nan, np.nan
        return self._of(replace(self.table, accuracy=accuracy, latency_ms=latency, stages_ms={}, tokens={}))

    def only_samples(self, count: int, seed: int) -> FittingData:
        """The data as if ``count`` samples had been profiled, four fifths of them for training."""
        rows = np.sort(np.random.default_rng(seed).permutation(self.table.num_samples)[:count])
        return self._of(self.table.subset(rows).with_splits({"train": 0.8, "validation": 0.2}, seed))

    def _of(self, table: ProfileTable) -> FittingData:
        return replace(self, table=table, means=SettingMeans.fit(table.subset("train")))


def viewed(features: Features, view: str, table: ProfileTable, labels: tuple[str, ...]) -> Features:
    """Features with a part left out, or replaced by the true labels, which a perfect reader of the input would know.

    Args:
        view: one of `VIEWS`.
        table: all samples, for their labels.

    Raises:
        DataError: the view is "labels" and the table lacks one of them.
    """
    nothing = np.zeros((features.num_samples, 1), dtype=np.float32)
    if view == "labels":
        keys = group_keys(table, labels)
        number = {key: column for column, key in enumerate(sorted(set(keys)))}
        known = np.eye(len(number), dtype=np.float32)[[number[key] for key in keys]]
        return Features(table.sample_ids, nothing[: len(keys)], known)
    image = features.image if view == "image" else nothing
    language = features.language if view == "question" else nothing
    return replace(features, image=image, language=language)

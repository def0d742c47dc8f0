"""The training samples that look most alike to the controller. Shapes: S samples, Di and Dl features."""

from __future__ import annotations

from typing import Any

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.explanation.explanation_records import NearestCase
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable


def nearest_cases(
    table: ProfileTable,
    features: Features,
    image: np.ndarray,
    language: np.ndarray,
    chosen: int,
    count: int = 5,
) -> list[NearestCase]:
    """The training samples most similar to a request with features ``[Di]`` and ``[Dl]``.

    Args:
        chosen: the setting whose accuracy on them is given.

    Raises:
        DataError: the data has features of another width than the request.
    """
    train = table.subset("train")
    rows = features.aligned(train.sample_ids)
    if rows.image.shape[1] != len(image) or rows.language.shape[1] != len(language):
        raise DataError(
            f"the data has {rows.image.shape[1]} image and {rows.language.shape[1]} language features a sample, "
            f"this request {len(image)} and {len(language)}; give the data of this model"
        )
    similarity = (_cosine(rows.image, image) + _cosine(rows.language, language)) / 2
    order = np.argsort(-similarity, kind="stable")[:count]
    return [_case(train, int(row), float(similarity[row]), chosen) for row in order]


def _cosine(rows: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Cosine of each standardised row with one standardised feature, ``[S]``."""
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    z, w = (rows - mean) / scale, (one - mean) / scale
    cosine: np.ndarray = z @ w / np.maximum(np.linalg.norm(z, axis=1) * np.linalg.norm(w), 1e-12)
    return cosine


def _case(train: ProfileTable, row: int, similarity: float, chosen: int) -> NearestCase:
    right = np.flatnonzero(train.accuracy[row] >= 0.5)
    cost = np.nan_to_num(train.latency_ms[row], nan=np.inf)
    accuracy = float(train.accuracy[row, chosen])
    cheapest: Any = train.knob_space.settings[right[cost[right].argmin()]] if len(right) else None
    return NearestCase(
        sample_id=train.sample_ids[row],
        similarity=similarity,
        labels={label: train.groups[label][row] for label in readable_labels(train)},
        accuracy=None if np.isnan(accuracy) else accuracy,
        cheapest_right=None if cheapest is None else dict(cheapest),
    )

"""Measures on validation samples what a controller takes on average at each price. Shapes: S samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.price_curve import AtPrice, PriceCurve
from budgetvlm.controller.training_states import NO_LIMIT_MS
from budgetvlm.controller.validation import choose
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

FIRST_PRICES = (1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)  # below the first all is as at no price
MOST_PRICES = 40
SMALLEST_RATIO = 1.02  # of two prices between which a third is measured


def price_curve_of(controller: GRPOController, table: ProfileTable, features: Features) -> PriceCurve:
    """Measure a controller on a table's "validation" split, at prices that lie close together where the mean moves.

    ``features``: of the table's samples, in any order.
    """
    held_out = table.subset("validation")
    own = features.aligned(held_out.sample_ids)
    encoded = controller.encode(torch.from_numpy(own.image), torch.from_numpy(own.language))
    _, group = np.unique(held_out.units, return_inverse=True)

    def at(price: float) -> AtPrice:
        chosen = choose(controller, encoded, NO_LIMIT_MS, price)
        rows = np.arange(len(chosen))
        means = (_mean(cells[rows, chosen], group) for cells in (held_out.latency_ms, held_out.accuracy))
        return AtPrice(price, *next(means), *next(means))

    points = [at(price) for price in FIRST_PRICES]
    while len(points) < MOST_PRICES and (price := _between(points)):
        points = sorted([*points, at(price)], key=lambda point: point.price)
    return PriceCurve(tuple(points), held_out.num_samples)


def _mean(cells: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """The mean of measured cells ``[S]`` and its standard error, where samples of one group are drawn together."""
    known = np.isfinite(cells)
    values, group = cells[known].astype(np.float64), group[known]
    sums = np.bincount(group, values - values.mean())
    count = len(np.unique(group))
    return float(values.mean()), float(np.sqrt((sums**2).sum() * count / max(count - 1, 1)) / len(values))


def _between(points: list[AtPrice]) -> float | None:
    """The price in the middle of the widest gap between neighbouring means that is not a step; None: there is none."""
    gaps = [
        (abs(high.latency_ms - low.latency_ms), math.sqrt(low.price * high.price))
        for low, high in itertools.pairwise(points)
        if high.price > low.price * SMALLEST_RATIO and high.latency_ms != low.latency_ms
    ]
    return max(gaps)[1] if gaps else None

"""What is expected of cells (sample, setting) that were not measured, for learning; no evaluation ever sees it.

Outcomes of the K settings and a few directions of the features are taken for jointly normal. Mean and covariance come
from all measured cells by expectation maximisation (Little and Rubin, Statistical Analysis with Missing Data, section
11.2), which allows for cells that were chosen by what was measured before. So that few samples do, the covariance is
drawn towards one that falls with the distance of settings, and the means towards a surface of second order over the
knobs (Box and Wilson 1951), as far as they are uncertain. The expectation of a cell then follows from the sample's own
measured cells, nearby settings weighing most, and from its features.

Shapes: S samples, K settings, d directions, D = d + K coordinates, n samples of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

DIRECTIONS = 8  # of the features
ROUNDS = 12  # of expectation maximisation
REACH = 1.0  # distance of two settings, in ranges of a knob, at which they are expected to have a correlation of 1/e
OWN_NOISE = 0.005  # share of the variance by which two measurements of one cell would differ
BLOCK = 1024  # samples at once, for the memory
CHECKED = 0.1  # share of the measured cells that predictions are checked on


@dataclass(frozen=True)
class Predicted:
    """How many cells were predicted, and how well.

    Attributes:
        measured, cells: how many were measured, and how many there are.
        held_out: how many measured ones, drawn at random, the check is on.
        error: mean |predicted - measured| accuracy on these, predicted without them; each setting weighs what it lacks.
            blind_error: the same of the setting's mean.
    """

    measured: int
    cells: int
    held_out: int
    error: float
    blind_error: float

    def __str__(self) -> str:
        text = f"{self.measured:,} of {self.cells:,} cells (sample, setting) measured, the others predicted"
        if not self.held_out:
            return f"{text}; none was held out for a check"
        return (
            f"{text}: mean error {self.error:.3f} on {self.held_out:,} held-out cells "
            f"({self.blind_error:.3f} by each setting's mean)"
        )


def with_predictions(
    table: ProfileTable,
    features: Features | None,
    say: Callable[[str], None] = lambda text: None,
    evaluated: str = "test",
) -> ProfileTable:
    """Return the table with expected accuracies and latencies where samples of training and validation lack them.

    Settings that no such sample was measured at stay as they are, and so do all other samples: what an evaluation is
    about is never predicted. A table that lacks nothing comes back as it is.

    Args:
        table: with splits.
        features: of the table's samples, in any order; None: the measured cells have to do.
        say: told how much was predicted, and how well.
        evaluated: the split that is left as it is.
    """
    rows = np.flatnonzero([side != evaluated for side in table.split or ()])
    if not len(rows):
        return table
    used = np.isfinite(table.accuracy[rows]).any(axis=0) & np.isfinite(table.latency_ms[rows]).any(axis=0)
    known = np.isfinite(table.accuracy[rows]) & np.isfinite(table.latency_ms[rows])
    if known[:, used].all():
        return table
    directions = _directions(features, [table.sample_ids[row] for row in rows])
    accuracy, latency = table.accuracy.copy(), table.latency_ms.copy()
    measured, times = accuracy[rows].astype(np.float64), np.log(latency[rows].astype(np.float64))
    space = table.knob_space
    say(str(_check(table, rows, measured, used, directions)))
    for values, found, back in ((accuracy, measured, np.asarray), (latency, times, np.exp)):
        filled = expected_cells(found, used, directions, space)
        values[rows] = np.where(np.isfinite(values[rows]), values[rows], back(filled)).astype(np.float32)
    return replace(table, accuracy=accuracy, latency_ms=latency)


def _check(
    table: ProfileTable, rows: np.ndarray, measured: np.ndarray, used: np.ndarray, directions: np.ndarray
) -> Predicted:
    """Predict some measured cells without them."""
    known = np.isfinite(measured)
    drawn = _drawn_for_check(known, table.knob_space)
    held_out = known & drawn & (known & ~drawn).any(axis=0)
    count = (int(known[:, used].sum()), known[:, used].size, int(held_out.sum()))
    if not held_out.any():
        return Predicted(*count, np.nan, np.nan)
    rest = np.where(held_out, np.nan, measured)
    found = expected_cells(rest, used, directions, table.knob_space)
    blind = np.broadcast_to(np.nanmean(np.where(used, rest, 0.0), axis=0), rest.shape)
    # expensive settings are measured less often, and their outcomes are more certain
    weights = ((~known).sum(axis=0) / np.maximum(held_out.sum(axis=0), 1) * held_out)[held_out]
    errors = (float(np.average(np.abs(values - measured)[held_out], weights=weights)) for values in (found, blind))
    return Predicted(*count, *errors)


def _drawn_for_check(known: np.ndarray, space: KnobSpace) -> np.ndarray:
    """Draw cells ``[S, K]`` that know as little of their samples as those do that were not measured.

    Where a sample was measured at some settings of a tiling, single ones are drawn; where not at all, all of a tiling.
    """
    crops = [setting.get("max_crops", place) for place, setting in enumerate(space.settings)]
    tilings = np.unique(crops, return_inverse=True)[1]
    drawn, rng = np.zeros_like(known), np.random.default_rng(0)
    for tiling in range(tilings.max() + 1):
        own = known[:, tilings == tiling]
        alone = own[~own.any(axis=1)].size / max((~own).sum(), 1)  # share of what lacks that has no neighbour
        together, single = rng.random((len(own), 1)), rng.random(own.shape)
        drawn[:, tilings == tiling] = (together < CHECKED * alone) | (single < CHECKED * (1 - alone))
    return drawn


def expected_cells(measured: np.ndarray, used: np.ndarray, directions: np.ndarray, space: KnobSpace) -> np.ndarray:
    """Return measured values ``[S, K]`` with expected ones where they are NaN, within the range of what was measured.

    Args:
        used: settings that some sample was measured at, bool ``[K]``; the others stay NaN.
        directions: standardised features ``[S, d]``.
    """
    values = measured[:, used]
    mean, d = float(np.nanmean(values)), directions.shape[1]
    spread = max(float(np.sqrt(np.nanmean((values - np.nanmean(values, axis=0)) ** 2))), 1e-9)
    ranks = (space.value_indices / np.maximum(np.array(space.sizes) - 1, 1))[used]
    prior = np.eye(d + len(ranks))
    prior[d:, d:] = np.exp(-np.abs(ranks[:, None] - ranks[None]).sum(axis=-1) / REACH)
    filled, variance = _maximised(np.concatenate([directions, (values - mean) / spread], axis=1), prior)
    lacking = np.isnan(values)
    means = filled[:, d:].mean(axis=0)
    shift = (_drawn(means, *second_order(ranks), variance / (~lacking).sum(axis=0).mean()) - means) / np.maximum(
        lacking.mean(axis=0), 1e-9
    )
    out = measured.copy()
    out[:, used] = np.where(
        lacking, np.clip((filled[:, d:] + shift) * spread + mean, np.nanmin(values), np.nanmax(values)), values
    )
    return out


def second_order(ranks: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the projection ``[K, K]`` of settings' means onto a surface of second order over knobs, and its rank.

    ``ranks``: the knobs' values by their order, 0 to 1, ``[K, knobs]``.
    """
    first, second = np.triu_indices(ranks.shape[1])
    terms = np.concatenate([np.ones((len(ranks), 1)), ranks, ranks[:, first] * ranks[:, second]], axis=1)
    return terms @ np.linalg.pinv(terms), int(np.linalg.matrix_rank(terms))


def _maximised(values: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, float]:
    """Return values ``[S, D]`` with the expectations of what is NaN, and the mean variance of these, by EM.

    ``prior``: covariance that counts as much as D samples would.
    """
    known, weight = np.isfinite(values), float(len(prior))
    mean, covariance = np.nanmean(values, axis=0), prior
    for _ in range(ROUNDS):
        filled, uncertain = values.copy(), np.zeros_like(prior)
        for block, expected, own in _expectations(values, known, mean, covariance):
            filled[block] = np.where(known[block], values[block], expected)
            uncertain += own
        mean = filled.mean(axis=0)
        centred = filled - mean
        covariance = (centred.T @ centred + uncertain + weight * prior) / (len(values) + weight)
    return filled, float(uncertain.trace() / max((~known).sum(), 1))


def _drawn(means: np.ndarray, surface: np.ndarray, rank: int, variance: float) -> np.ndarray:
    """Return settings' means ``[K]`` drawn towards a surface, as far as their distance from it is chance.

    ``variance``: of a mean, by chance. Empirical Bayes: what the distances vary beyond it is taken for real.
    """
    smooth = surface @ means
    free = len(means) - rank
    if not free:
        return means
    real = max(float(((means - smooth) ** 2).sum()) / free - variance, 0.0)
    return np.asarray(smooth + (means - smooth) * real / (real + variance))


def _expectations(
    values: np.ndarray, known: np.ndarray, mean: np.ndarray, covariance: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of samples ``[n]``, their values expected from the known ones ``[n, D]``, and how uncertain these
    are: the sum of their conditional covariances ``[D, D]``.

    Samples with equally many known values go together, so that the systems of equations are small.
    """
    order = np.argsort(known.sum(axis=1), kind="stable")
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        most = int(known[block].sum(axis=1).max())
        at = np.argsort(~known[block], axis=1, kind="stable")[:, :most]  # the known coordinates, padded by others
        is_known = np.take_along_axis(known[block], at, axis=1)
        pairs = is_known[:, :, None] & is_known[:, None]
        own = np.where(is_known, OWN_NOISE, 1.0)
        system = np.where(pairs, covariance[at[:, :, None], at[:, None]], 0.0) + own[:, :, None] * np.eye(most)
        shared = np.where(is_known[:, :, None], covariance[at], 0.0)
        residual = np.where(is_known, np.take_along_axis(values[block], at, axis=1) - mean[at], 0.0)
        solved = np.linalg.solve(system, shared)
        expected = mean + np.einsum("nm,nmd->nd", residual, solved)
        yield block, expected, len(block) * covariance - np.einsum("nmc,nmd->cd", shared, solved)


def _directions(features: Features | None, sample_ids: list[str]) -> np.ndarray:
    """Return the first principal directions of the samples' features, each with variance 1, ``[S, d]``."""
    if features is None:
        return np.zeros((len(sample_ids), 0))
    aligned = features.aligned(sample_ids)
    raw = np.concatenate([aligned.image, aligned.language], axis=1, dtype=np.float64)
    raw = (raw - raw.mean(axis=0)) / np.maximum(raw.std(axis=0), 1e-6)
    _, vectors = np.linalg.eigh(raw.T @ raw)
    projected = raw @ vectors[:, : -DIRECTIONS - 1 : -1]
    spread = projected.std(axis=0)
    return np.asarray(projected[:, spread > 1e-6] / spread[spread > 1e-6])

"""How sure an estimate is: an interval for one look, and bounds that stay right however often somebody looks.

The bounds bet against each mean m: who stakes the share s of a capital on an outcome x beyond m has 1 + s (x - m) times
as much afterwards. If m is the true mean, or more than that, such a capital does not grow on average, and so reaches
1 / alpha at any time at all with a probability of at most alpha (Ville's inequality). The bound is the largest m
whose capital came that far. The capital is spread evenly over fixed stakes, so that the order of outcomes does not
matter. Sources: Waudby-Smith and Ramdas 2024; mixtures as in Robbins 1970.
"""

from __future__ import annotations

import math

import numpy as np

from budgetvlm.feedback.off_policy import ScoredLog, floored

NUM_STAKES = 24
STAKES = 1e-3, 0.75  # the smallest and the largest, as shares of the stake that could lose everything
PRECISION = 1e-7


def normal_interval(outcomes: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval of a mean by the central limit theorem: for one look at many outcomes ``[N]``."""
    from scipy.stats import norm

    half = float(norm.ppf((1 + level) / 2) * outcomes.std(ddof=1) / math.sqrt(len(outcomes)))
    return float(outcomes.mean()) - half, float(outcomes.mean()) + half


def value_interval(
    log: ScoredLog, target: np.ndarray, predicted: np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """An interval of what a policy is worth that stays right however often it is looked at.

    Its upper end is the lower one of what the policy gets wrong. Arguments: see `budgetvlm.feedback.off_policy`.
    """
    alpha = (1 - level) / 2
    wrong = log._replace(scores=1.0 - log.scores)
    low, missed = (
        lower_bound(*floored(scored, target, baseline), alpha)
        for scored, baseline in ((log, predicted), (wrong, 1 - predicted))
    )
    return max(low, 0.0), min(1.0 - missed, 1.0)


def lower_bound(
    outcomes: np.ndarray, least: float, alpha: float = 0.05, most: float = 1.0, stakes: tuple[float, float] = STAKES
) -> float:
    """A bound below the mean of outcomes ``[N]``, wrong with probability alpha, whenever and however often taken.

    Args:
        least: no outcome is smaller.
        most: the mean is not larger; outcomes may be.
        stakes: the range of stakes; where few outcomes have to decide, small ones are wasted.
    """
    fixed = np.geomspace(*stakes, NUM_STAKES) / (most - least)
    low, high = least, most
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if _log_capital(outcomes, middle, fixed) >= -math.log(alpha) else (low, middle)
    return low


def _log_capital(outcomes: np.ndarray, mean: float, stakes: np.ndarray) -> float:
    """The logarithm of the capital after bets against a mean; it falls as the mean grows."""
    logs = np.log1p(stakes[:, None] * (outcomes - mean)).sum(axis=1)
    largest = float(logs.max())
    return largest + math.log(float(np.exp(logs - largest).mean()))

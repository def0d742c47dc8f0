"""How much to add to predicted times so that at most a share alpha of the requests breaks its budget.

A predicted time u of a setting becomes a bound by a factor f: the setting is allowed where f u <= budget. A policy then
chooses one of the allowed settings, and choosing spoils the usual argument: a policy that likes settings whose time was
predicted too low breaks more budgets than any fixed setting does. So what is calibrated is the whole procedure, the
choice included (`choose_factor`).

For request i let c_i(f) be the setting that the policy chooses among those allowed at factor f, and

    loss_i(f) = max over f' >= f of [something is allowed at f', and the time of c_i(f') exceeds the budget].

It never grows with f, and it is at least the violation at f. With f the smallest factor at which
(sum of n calibration losses + 1) / (n + 1) <= alpha, the expected loss of a new request is at most alpha if it is
exchangeable with the calibration requests: conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814,
theorem 1). Several budgets a request are averaged into one loss in [0, 1].

Where an answer that would be late is cut short instead, loss_i counts it by less: the cost of c_i(f') takes the place
of the brackets, 1 for a late answer and cut_cost for a cut one.

Where the choice is revised once the image is encoded (`guard.recourse`), the procedure is both choices: a second
factor belongs to each f, c_i(f) is the setting that is left in the end, and nothing else changes.

Shapes: n calibration requests, P budgets each, K settings, F factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.guard.recourse import SameImage
from budgetvlm.guard.specification import best_allowed, reachable, upper_bound

FACTORS = np.geomspace(0.25, 64.0, 401)  # 1.4% apart


def samples_needed(alpha: float) -> int:
    """The fewest calibration requests with which a violation rate of alpha can be promised: 1 / alpha - 1.

    Raises:
        ConfigError: an alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha!r} is no rate of violations; give a number between 0 and 1, for example 0.05")
    return math.ceil(1 / alpha - 1 - 1e-9)


@dataclass(frozen=True, eq=False)
class Revising:
    """What is known when the choice is revised. Times of every setting, ``[n, K]``.

    Attributes:
        answer_ms: how long answering from the encoded image is predicted to take, at the first choice.
        spent_ms: what was taken when the image was encoded. rest_ms: what is predicted of the rest then.
        saving_ms, longer_ms: of that rest, see `budgetvlm.guard.specification.upper_bound`.
        factors: on ``rest_ms``, one for each of `FACTORS`, ``[F]``.
    """

    same_image: SameImage
    answer_ms: np.ndarray
    spent_ms: np.ndarray
    rest_ms: np.ndarray
    factors: np.ndarray
    saving_ms: np.ndarray | float = 0.0
    longer_ms: np.ndarray | float = 0.0


@dataclass(frozen=True, eq=False)
class Calls:
    """Calibration requests: what the policy prefers, and what was predicted when a setting is chosen.

    Attributes:
        values: what the policy prefers, ``[n, P, K]``: it takes the largest of the allowed ones.
        budget_ms: ``[n, P]``.
        rest_ms: the predicted rest of every setting, ``[n, K]``. spent_ms: what was known to be taken, ``[n, K]``.
        saving_ms, longer_ms: of the rest, see `budgetvlm.guard.specification.upper_bound`, ``[n, K]``.
        revising: None: the choice stays.
    """

    values: np.ndarray
    budget_ms: np.ndarray
    rest_ms: np.ndarray
    spent_ms: np.ndarray | float = 0.0
    saving_ms: np.ndarray | float = 0.0
    longer_ms: np.ndarray | float = 0.0
    revising: Revising | None = None

    def chosen(self, f: int) -> tuple[np.ndarray, np.ndarray]:
        """The setting that each request ends up with at factor number f, ``[n, P]``, and whether any was allowed.

        Where none is allowed the setting means nothing. These are the decisions of `budgetvlm.decide`.
        """
        bounds_ms = self.spent_ms + upper_bound(FACTORS[f], self.rest_ms, self.saving_ms, self.longer_ms)
        if self.revising is not None:
            bounds_ms = self._reachable(bounds_ms, self.revising, f)
        first = best_allowed(self.values, bounds_ms[:, None, :], self.budget_ms)
        chosen = np.maximum(first, 0)
        return chosen if self.revising is None else self._revised(chosen, self.revising, f), first >= 0

    def _reachable(self, bounds_ms: np.ndarray, later: Revising, f: int) -> np.ndarray:
        answer_ms = upper_bound(later.factors[f], later.answer_ms, self.saving_ms, self.longer_ms)
        aimed_ms = self.spent_ms + (self.rest_ms - later.answer_ms) + answer_ms
        return reachable(bounds_ms, aimed_ms, later.same_image.members)

    def _revised(self, chosen: np.ndarray, later: Revising, f: int) -> np.ndarray:
        """The choices ``[n, P]`` after the image is encoded; where nothing is allowed, the fastest is taken."""
        rest_ms = upper_bound(later.factors[f], later.rest_ms, later.saving_ms, later.longer_ms)
        here = later.same_image.of(chosen)
        bounds_ms = np.where(here, (later.spent_ms + rest_ms)[:, None, :], np.inf)
        best = best_allowed(self.values, bounds_ms, self.budget_ms)
        fastest = np.where(here, later.rest_ms[:, None, :], np.inf).argmin(axis=2)
        return np.where(best >= 0, best, fastest)


def losses(
    calls: Calls, latency_ms: np.ndarray, first_ms: np.ndarray | None = None, cut_cost: float = 1.0
) -> np.ndarray:
    """loss_i(f) of every request at every factor of `FACTORS`, ``[n, F]``.

    Args:
        latency_ms: of every setting, ``[n, K]``; in a hurry, where answers may be hurried.
        first_ms: until the answer's first token, ``[n, K]``: where that is in time, the answer is cut short and not
            late. None: answers are never cut.
        cut_cost: what a cut answer counts, from 0 to 1.
    """
    budget_ms = calls.budget_ms[:, :, None]
    over = (latency_ms[:, None, :] > budget_ms).astype(np.float64)
    if first_ms is not None:
        over[(over > 0) & (first_ms[:, None, :] <= budget_ms)] = cut_cost
    worst = np.zeros(over.shape[:2])
    out = np.empty((len(over), len(FACTORS)))
    for f in range(len(FACTORS) - 1, -1, -1):  # a loss counts the worst of all larger factors
        chosen, allowed = calls.chosen(f)
        missed = np.take_along_axis(over, chosen[:, :, None], axis=2)[:, :, 0] * allowed
        worst = np.maximum(worst, missed)
        out[:, f] = worst.mean(axis=1)
    return out


def choose_factor(loss: np.ndarray, alpha: float) -> float:
    """The smallest factor whose calibration losses ``[n, F]`` promise a violation rate of at most alpha.

    Raises:
        ConfigError: an alpha outside (0, 1).
        DataError: too few requests for this alpha, or no factor is large enough.
    """
    needed = samples_needed(alpha)
    if len(loss) < needed:
        raise DataError(
            f"{len(loss)} calibration requests cannot promise a violation rate of {alpha:g}: that takes {needed} at "
            f"least. Measure more, or allow more violations (the least that {len(loss)} can promise is "
            f"{1 / (len(loss) + 1):.3g})."
        )
    kept = (loss.sum(axis=0) + 1) / (len(loss) + 1) <= alpha + 1e-12
    if not kept.any():
        raise DataError(
            f"even {FACTORS[-1]:g} times the predicted latency is exceeded by more than {alpha:g} of the calibration "
            "requests; the latency model does not fit this machine. Profile its latency again."
        )
    return float(FACTORS[int(kept.argmax())])

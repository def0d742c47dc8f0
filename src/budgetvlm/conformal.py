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

Shapes: n calibration requests, P budgets each, K settings, F factors.
"""

from __future__ import annotations

import math

import numpy as np

from budgetvlm.errors import ConfigError, DataError

FACTORS = np.geomspace(0.25, 64.0, 401)  # 1.4% apart


def samples_needed(alpha: float) -> int:
    """The fewest calibration requests with which a violation rate of alpha can be promised: 1 / alpha - 1.

    Raises:
        ConfigError: an alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha!r} is no rate of violations; give a number between 0 and 1, for example 0.05")
    return math.ceil(1 / alpha - 1 - 1e-9)


def losses(
    values: np.ndarray,
    predicted_ms: np.ndarray,
    latency_ms: np.ndarray,
    budget_ms: np.ndarray,
    spent_ms: np.ndarray | float = 0.0,
) -> np.ndarray:
    """loss_i(f) of every request at every factor of `FACTORS`, ``[n, F]``.

    Args:
        values: what the policy prefers, ``[n, P, K]``: it takes the largest of the allowed ones.
        predicted_ms, latency_ms: of every setting, ``[n, K]``.
        budget_ms: ``[n, P]``.
        spent_ms: a part of the latency that is known when the setting is chosen; what is predicted is the rest.
    """
    left = budget_ms[:, :, None] - np.broadcast_to(spent_ms, predicted_ms.shape)[:, None, :]
    over = latency_ms[:, None, :] > budget_ms[:, :, None]
    worst = np.zeros(over.shape[:2], dtype=bool)
    out = np.empty((len(values), len(FACTORS)))
    for f in range(len(FACTORS) - 1, -1, -1):
        allowed = FACTORS[f] * predicted_ms[:, None, :] <= left
        chosen = np.where(allowed, values, -np.inf).argmax(axis=2)[:, :, None]
        violated = np.take_along_axis(over, chosen, axis=2)[:, :, 0] & allowed.any(axis=2)
        worst |= violated
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

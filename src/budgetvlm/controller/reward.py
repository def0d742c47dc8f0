"""The two objectives as pure functions of measured accuracy and latency. Shapes broadcast, for example ``[B, K]``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from budgetvlm.errors import ConfigError


@dataclass(frozen=True)
class RewardWeights:
    """Weights of `guide_reward`; the defaults are the guide's.

    Attributes:
        alpha: accuracy.
        beta: soft penalty on latency near and above the budget.
        gamma: penalty on a violated budget, quadratic in the excess.
        delta: bonus for the share of the budget that is left.
        epsilon: penalty on complexity.

    Raises:
        ConfigError: a weight that is negative or not a finite number.
    """

    alpha: float = 1.0
    beta: float = 0.5
    gamma: float = 10.0
    delta: float = 0.1
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        wrong = [f"{name}={value!r}" for name, value in asdict(self).items() if not 0 <= value < math.inf]
        if wrong:
            raise ConfigError(f"reward weights must be finite numbers of 0 or more; given {', '.join(wrong)}")


def guide_reward(
    accuracy: Tensor, latency_ms: Tensor, budget_ms: Tensor, complexity: Tensor, weights: RewardWeights
) -> Tensor:
    """The guide's reward; it trades accuracy for latency even below the budget, and may exceed the budget.

    r = alpha a - beta sigmoid(10 (l/b - 1)) - gamma max(0, l/b - 1)^2 + delta max(0, 1 - l/b) - epsilon complexity

    Args:
        accuracy: a, 0 to 1.
        latency_ms, budget_ms: l and b; only their ratio matters. An infinite budget counts as l/b = 0.
        complexity: mean over the knobs of value / largest value, in (0, 1].
    """
    excess = latency_ms / budget_ms - 1.0
    return (
        weights.alpha * accuracy
        - weights.beta * torch.sigmoid(10.0 * excess)
        - weights.gamma * excess.clamp(min=0.0).square()
        + weights.delta * (-excess).clamp(min=0.0)
        - weights.epsilon * complexity
    )


def constrained_reward(accuracy: Tensor, latency_ms: Tensor, reference_ms: float | Tensor, price: Tensor) -> Tensor:
    """r = a - price l / reference, meant for the settings that the budget allows: the budget itself is a ceiling.

    Args:
        accuracy: a, 0 to 1.
        latency_ms, reference_ms: l and the full setting's median latency.
        price: accuracy given for one reference latency; a small one only breaks ties between equally right settings.
    """
    return accuracy - price * (latency_ms / reference_ms)

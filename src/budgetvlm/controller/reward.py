"""The two objectives as pure functions of measured accuracy and latency. Shapes broadcast, for example ``[B, K]``."""

from __future__ import annotations

import torch
from torch import Tensor

from budgetvlm.controller.training_options import RewardWeights


def guide_reward(
    accuracy: Tensor, latency_ms: Tensor, budget_ms: Tensor, complexity: Tensor, weights: RewardWeights
) -> Tensor:
    """The guide's reward. It trades accuracy for latency even below the budget, and its optimum may exceed the budget.

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

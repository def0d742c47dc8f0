"""Policy losses that research compares GRPO's with: same network, same states, same rewards, another way to learn.

Each follows `budgetvlm.controller.policy_loss.PolicyLoss`: it takes a batch, the log-policy and the drawn settings, and
returns a scalar to minimise. Losses that compare all settings of a state ignore what was drawn.
Shapes: A samples, B states, G drawn settings, K settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, mse_loss

from budgetvlm.controller.policy_loss import Batch
from budgetvlm.errors import ConfigError


class Reinforce:
    """-mean((r - b) log pi) over drawn settings, b being a moving average of the rewards (Williams 1992)."""

    parameters: list[Tensor]

    def __init__(self, memory: float = 0.95) -> None:
        self.parameters, self.memory = [], memory
        self.baseline: Tensor | None = None

    def __call__(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> Tensor:
        drawn = _drawn(settings)
        rewards = batch.rewards.gather(1, drawn)
        mean = rewards.mean()
        self.baseline = mean if self.baseline is None else self.memory * self.baseline + (1 - self.memory) * mean
        return -((rewards - self.baseline) * log_policy.gather(1, drawn)).mean()


class PPO:
    """Clipped objective with a learnt value of the state as baseline (Schulman et al. 2017, arXiv 1707.06347).

    Args:
        inputs: width of a state: features and the basis of its budget and price side by side.
        hidden: width of the value network.
        epsilon: clip range of the ratio. value_coef: weight of the value network's squared error.
    """

    def __init__(self, inputs: int, hidden: int = 128, epsilon: float = 0.2, value_coef: float = 0.5) -> None:
        self.value = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.epsilon, self.value_coef = epsilon, value_coef

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.value.parameters())

    def __call__(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> Tensor:
        drawn = _drawn(settings)
        assert old_log_probs is not None
        rewards = batch.rewards.gather(1, drawn)
        value = self.value(torch.cat([batch.encoded, batch.basis.flatten(1)], dim=1))
        advantages = rewards - value.detach()
        ratio = (log_policy.gather(1, drawn) - old_log_probs).exp()
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        return policy + self.value_coef * mse_loss(value.expand_as(rewards), rewards)


@dataclass(frozen=True)
class DPO:
    """-log sigmoid(beta (log pi(better) - log pi(worse) - the same of the reference)) over drawn pairs.

    Rafailov et al. 2023, arXiv 2305.18290. Pairs are drawn among the allowed settings, "better" is the larger reward;
    by how much is not used. The reference is the policy that training starts from, the lookup table: a softmax of
    ``reference [K]`` and the price, whose normaliser cancels within a pair.
    """

    reference: Tensor
    beta: float = 0.1
    pairs: int = 8

    @property
    def parameters(self) -> list[Tensor]:
        return []

    def __call__(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> Tensor:
        weights = batch.allowed.to(log_policy.dtype)
        one, two = (torch.multinomial(weights, self.pairs, replacement=True) for _ in range(2))
        first, second = batch.rewards.gather(1, one), batch.rewards.gather(1, two)
        better, worse = torch.where(first > second, one, two), torch.where(first > second, two, one)
        start = self.reference + batch.offset
        margin = _difference(log_policy, better, worse) - _difference(start, better, worse)
        unequal = (first != second).to(log_policy.dtype)
        return -(unequal * logsigmoid(self.beta * margin)).sum() / unequal.sum().clamp(min=1.0)


@dataclass(frozen=True)
class OracleCrossEntropy:
    """-log pi(the setting that was best with hindsight). ``by_regret`` weighs each state by what a setting drawn at
    random among the allowed ones loses against the best (cost-sensitive classification)."""

    by_regret: bool = False

    @property
    def parameters(self) -> list[Tensor]:
        return []

    def __call__(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> Tensor:
        best, target = batch.ranked.max(dim=1)
        losses = -log_policy.gather(1, target[:, None])[:, 0]
        if not self.by_regret:
            return losses.mean()
        allowed = batch.allowed
        mean = batch.rewards.masked_fill(~allowed, 0.0).sum(dim=1) / allowed.sum(dim=1)
        return ((best - mean) * losses).mean()


def _drawn(settings: Tensor | None) -> Tensor:
    if settings is None:
        raise ConfigError("this loss learns from drawn settings; give num_generations, for example 8")
    return settings


def _difference(values: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    return values.gather(1, better) - values.gather(1, worse)

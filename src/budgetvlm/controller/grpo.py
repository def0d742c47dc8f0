"""Group Relative Policy Optimization for one-step episodes.

What is left of the textbook's algorithm: an episode is one choice, so there are no tokens, no discounting and no value
network; the profile table is the environment, so rewards are looked up. A group is G settings drawn for ONE state and
advantages keep the shape ``[B, G]``. Where every setting is measured the group can be the whole knob space, weighted by
the policy: the exact gradient, the limit of large G, with no sampling noise.

Shapes: B states, G group, K settings. Formulas after Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), names after
TRL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from budgetvlm.errors import ConfigError

ScaleRewards = Literal["none", "group", "batch"]
LossType = Literal["grpo", "cispo"]
Objective = Literal["constrained", "reward"]
STD_FLOOR = 1e-4
NEVER = -1e9  # logit of a setting that is not allowed; finite, so that 0 * log 0 stays 0 and not NaN
SAME_LOSS = ("bnpo", "dr_grpo", "dapo")


@dataclass(frozen=True)
class GRPOConfig:
    """Options of the algorithm; all that is wrong is reported at once.

    Attributes:
        objective: "constrained" (accuracy - price x latency, only settings within the budget) or "reward" (the guide's
            formula, budget as a penalty).
        num_generations: G, settings drawn for each state; None enumerates all of them (exact gradient).
        group_size: the guide's name for num_generations.
        epsilon, epsilon_high: clip range of the probability ratio, below and above (None: the same).
        beta: weight of the KL divergence from the reference policy, the one that training started from.
        num_iterations: updates made with one draw; above 1 the ratio leaves 1 and clipping matters.
        scale_rewards: divide advantages by the std of the "group" or of the "batch", or "none". With the group's std
            the tie-break outweighs the answers: most groups are all right or all wrong, and what is left to learn from
            is which setting is cheapest. The policy collapses to it.
        loss_type: "grpo" (clipped objective) or "cispo" (clipped weight, arXiv 2506.13585).
        entropy_coef: weight of an entropy bonus. It keeps the policy from learning single samples' luck by heart; at
            1 / logit_scale of the controller the values become expected accuracies.
        learning_rate, weight_decay, batch_size, num_epochs: AdamW and its schedule; batch_size counts states.
        ema_decay: decay of the averaged weights, which are validated and saved; 0 uses the last weights.

    Raises:
        ConfigError: options that cannot work.
    """

    objective: Objective = "constrained"
    num_generations: int | None = None
    group_size: int | None = None
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    num_iterations: int = 1
    scale_rewards: ScaleRewards = "none"
    loss_type: LossType = "grpo"
    entropy_coef: float = 0.05
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    batch_size: int = 64
    num_epochs: int = 100
    ema_decay: float = 0.998

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("these GRPO options cannot work: " + "; ".join(problems))
        size = self.group_size if self.num_generations is None else self.num_generations
        object.__setattr__(self, "num_generations", size)
        object.__setattr__(self, "group_size", size)

    @property
    def clip_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def _problems(config: GRPOConfig) -> Iterator[str]:
    for name, allowed in (("objective", Objective), ("scale_rewards", ScaleRewards), ("loss_type", LossType)):
        value, choices = getattr(config, name), get_args(allowed)
        if name == "loss_type" and value in SAME_LOSS:
            yield f"loss_type={value!r} averages tokens in another way, and an episode has one here; use 'grpo'"
        elif value not in choices:
            yield f"{name}={value!r} is unknown; choose from {', '.join(choices)}"
    sizes = {config.num_generations, config.group_size} - {None}
    for size in sorted(sizes, key=str):
        if not isinstance(size, int) or size < 2:
            yield (
                f"num_generations (group_size) is {size!r}, but a group needs at least 2 settings to compare; give "
                "2 or more, or leave it out to weigh all of them"
            )
    if len(sizes) > 1:
        yield f"num_generations={config.num_generations} and group_size={config.group_size} are one thing; give one"
    for name in ("num_iterations", "batch_size", "num_epochs"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            yield f"{name}={getattr(config, name)!r} must be a whole number of at least 1"
    if config.num_generations is None and config.group_size is None and config.num_iterations > 1:
        yield "num_iterations above 1 reuses drawn groups, but nothing is drawn; give num_generations too"
    yield from _number_problems(config)


def _number_problems(config: GRPOConfig) -> Iterator[str]:
    for name in ("epsilon", "learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            yield f"{name}={getattr(config, name)!r} must be a positive number"
    for name in ("beta", "entropy_coef", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            yield f"{name}={getattr(config, name)!r} must be 0 or more"
    if config.epsilon_high is not None and not 0 < config.epsilon_high < math.inf:
        yield f"epsilon_high={config.epsilon_high!r} must be a positive number, or left out"
    if not 0 <= config.ema_decay < 1:
        yield f"ema_decay={config.ema_decay!r} must be in [0, 1)"


def compute_advantages(rewards: Tensor, scale_rewards: ScaleRewards = "none") -> Tensor:
    """A = r - mean of the state's group, optionally / (std + 1e-4) of the group or of the batch. ``[B, G] -> [B, G]``

    Raises:
        ConfigError: groups smaller than 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ConfigError(
            f"rewards of shape {list(rewards.shape)} hold no groups; give [states, at least 2 settings each]"
        )
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_rewards == "group":
        return centred / (rewards.std(dim=1, keepdim=True) + STD_FLOOR)
    if scale_rewards == "batch":
        return centred / (rewards.std() + STD_FLOOR)
    return centred


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: LossType = "grpo",
) -> Tensor:
    """What GRPO minimises over drawn settings, a scalar; all arguments ``[B, G]``.

    grpo: -mean(min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)) with rho = pi / pi_old.
    cispo: -mean(stop_gradient(min(rho, 1 + epsilon_high)) A log pi).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = (log_probs - old_log_probs).exp()
    if loss_type == "cispo":
        return -(ratio.clamp(max=1.0 + high).detach() * advantages * log_probs).mean()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - epsilon, 1.0 + high) * advantages).mean()


def expectation(log_policy: Tensor, values: Tensor) -> Tensor:
    """Mean over states of E[values] under the policy, a scalar; both ``[B, K]`` and finite.

    The values are held fixed, and the gradient is right also where they hold log pi itself: E[d log pi] = 0. So of
    log pi it is minus the entropy, and of log pi - log pi_ref the KL divergence to a reference, both in nats.
    """
    return expectation_parts(log_policy, values).sum()


def expectation_parts(log_policy: Tensor, values: Tensor) -> Tensor:
    """What `expectation` is the sum of ``[B, K]``; without autograd it is its gradient by the log-policy too."""
    return log_policy.exp() * (values.detach() / len(values))


def through_softmax(log_policy: Tensor, gradient: Tensor) -> Tensor:
    """A gradient by the log-policy -> by the logits that it is the log-softmax of, ``[B, K]`` each."""
    return torch.addcmul(gradient, log_policy.exp(), gradient.sum(dim=1, keepdim=True), value=-1.0)


@torch.no_grad()
def exact_advantages(log_policy: Tensor, rewards: Tensor, scale_rewards: ScaleRewards = "none") -> Tensor:
    """Advantages of all settings ``[B, K]``, with mean and std under the policy, from rewards ``[B, K]``.

    -`expectation` of them is the exact policy loss: its gradient is that of the expected reward (Sutton and Barto 2018,
    section 13.1, for one-step episodes). "none" leaves out the mean too, which changes no gradient.
    """
    if scale_rewards == "none":
        return rewards
    weights = log_policy.exp()
    centred = rewards - (weights * rewards).sum(dim=1, keepdim=True)
    variance = (weights * centred.square()).sum(dim=1, keepdim=True)
    if scale_rewards == "batch":
        variance = (weights * rewards.square()).sum(dim=1).mean() - (weights * rewards).sum(dim=1).mean().square()
    return centred / (variance.clamp(min=0.0).sqrt() + STD_FLOOR)


def draw_groups(log_policy: Tensor, group_size: int, generator: torch.Generator | None = None) -> Tensor:
    """G settings for each state, with replacement, int64 ``[B, G]``."""
    return torch.multinomial(log_policy.detach().exp(), group_size, replacement=True, generator=generator)

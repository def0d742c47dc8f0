"""Group Relative Policy Optimization for one-step episodes.

What is left of the textbook's algorithm: an episode is one choice, so there are no tokens, no discounting and no value
network; the profile table is the environment, so rewards are looked up. A group is G settings drawn for ONE state and
advantages keep the shape ``[B, G]``. Where every setting is measured the group can be the whole knob space, weighted by
the policy: the exact gradient, the limit of large G, with no sampling noise.

Shapes: B states, G group, K settings. Formulas after Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), names after
TRL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from budgetvlm.controller.training_options import LossType, ScaleRewards
from budgetvlm.errors import ConfigError

STD_FLOOR = 1e-4
NEVER = -1e9  # logit of a setting that is not allowed; finite, so that 0 * log 0 stays 0 and not NaN


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

"""Group Relative Policy Optimization for one-step episodes.

This is what is left of the textbook's algorithm: an episode is one choice, so there are no tokens, no discounting and
no value network; the profile table is the environment, so rewards are looked up. A group is G settings drawn for ONE
state, and advantages keep the shape ``[B, G]``. Where every setting is measured, the group can be the whole knob space,
weighted by the policy: that is the exact gradient, the limit of large G, with no sampling noise.

Shapes: B states, G group, K settings; "..." may be a leading dimension of M members that are trained at once. Formulas
after Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), names after TRL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from budgetvlm.controller.training_options import LossType, ScaleRewards
from budgetvlm.errors import ConfigError

STD_FLOOR = 1e-4
NEVER = -1e9  # logit of a setting that is not allowed; finite, so that 0 * log 0 stays 0 and not NaN


def compute_advantages(rewards: Tensor, scale_rewards: ScaleRewards = "none") -> Tensor:
    """Advantages of drawn settings, ``[..., B, G] -> [..., B, G]``.

    A = reward - mean of the state's group, optionally divided by (std + 1e-4) of the group or of the batch.

    Raises:
        ConfigError: groups smaller than 2.
    """
    if rewards.ndim < 2 or rewards.shape[-1] < 2:
        raise ConfigError(
            f"rewards of shape {list(rewards.shape)} hold no groups; give [states, at least 2 settings each]"
        )
    shifted = rewards - rewards[..., :1]  # so that equal rewards have advantages of exactly 0, whatever is divided by
    centred = shifted - shifted.mean(dim=-1, keepdim=True)
    if scale_rewards == "group":
        return centred / (rewards.std(dim=-1, keepdim=True) + STD_FLOOR)
    if scale_rewards == "batch":
        return centred / (rewards.std(dim=(-2, -1), keepdim=True) + STD_FLOOR)
    return centred


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: LossType = "grpo",
) -> Tensor:
    """The loss of GRPO over drawn settings, ``[..., B, G]`` each -> ``[...]``, a scalar for one controller.

    grpo: -mean(min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)) with rho = pi / pi_old.
    cispo: -mean(stop_gradient(min(rho, 1 + epsilon_high)) A log pi).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = (log_probs - old_log_probs).exp()
    if loss_type == "cispo":
        gains = ratio.clamp(max=1.0 + high).detach() * advantages * log_probs
    else:
        gains = torch.minimum(ratio * advantages, ratio.clamp(1.0 - epsilon, 1.0 + high) * advantages)
    return -gains.mean(dim=(-2, -1))


def expectation(log_policy: Tensor, values: Tensor) -> Tensor:
    """E[values] under the policy, averaged over states, ``[..., B, K]`` each -> ``[...]``; both have to be finite.

    The values are held fixed. The gradient is right also where they contain log pi itself, because E[d log pi] = 0. So
    with log pi it is minus the entropy, and with log pi - log pi_ref the KL divergence from a reference, in nats.
    """
    return (log_policy.exp() * values.detach()).sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def exact_advantages(log_policy: Tensor, rewards: Tensor, scale_rewards: ScaleRewards = "none") -> Tensor:
    """Advantages of all settings ``[..., B, K]``; mean and std are those under the policy.

    -`expectation` of them is the exact policy loss: its gradient is that of the expected reward (Sutton and Barto 2018,
    section 13.1, for one-step episodes). "none" leaves out the mean too, which changes no gradient.
    """
    if scale_rewards == "none":
        return rewards
    weights, shifted = log_policy.exp(), rewards - rewards[..., :1]
    centred = shifted - (weights * shifted).sum(dim=-1, keepdim=True)
    if scale_rewards == "batch":
        mean = (weights * rewards).sum(dim=-1, keepdim=True)
        second_moment = (weights * rewards.square()).sum(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
        variance = second_moment - mean.mean(dim=-2, keepdim=True).square()
    else:
        variance = (weights * centred.square()).sum(dim=-1, keepdim=True)
    return centred / (variance.clamp(min=0.0).sqrt() + STD_FLOOR)


def draw_groups(log_policy: Tensor, group_size: int) -> Tensor:
    """Draw G settings for each state, with replacement, ``[..., B, K]`` -> int64 ``[..., B, G]``."""
    policy = log_policy.detach().exp()
    drawn = torch.multinomial(policy.flatten(0, -2), group_size, replacement=True)
    return drawn.view(*policy.shape[:-1], group_size)

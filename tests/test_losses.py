"""Policy losses beside GRPO's: known gradients, known answers, and what each of them learns on a planted table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.rivals.entries import dpo_loss, ppo_loss
from benchmarks.rivals.losses import DPO, PPO, OracleCrossEntropy, Reinforce
from budgetvlm.controller.grpo import NEVER
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import Batch
from budgetvlm.errors import ConfigError

REWARDS = torch.tensor([[0.1, 0.9, 0.4], [0.5, 0.2, 0.7]])


def batch(rewards: Tensor = REWARDS, forbidden: tuple[tuple[int, int], ...] = ()) -> Batch:
    offset = torch.zeros_like(rewards)
    for row, column in forbidden:
        offset[row, column] = NEVER
    count = len(rewards)
    return Batch(torch.ones(count, 4), torch.arange(count), torch.ones(count, 2, 3), offset, rewards)


def log_policy(logits: Tensor, of: Batch) -> Tensor:
    return (logits + of.offset).log_softmax(dim=1)


def test_cross_entropy_asks_for_the_best_allowed_setting() -> None:
    states = batch(forbidden=((0, 1),))
    policy = log_policy(torch.zeros(2, 3), states)
    # Two allowed settings in the first state, three in the second.
    assert OracleCrossEntropy()(states, policy, None, None).item() == pytest.approx((math.log(2) + math.log(3)) / 2)
    logits = torch.zeros(2, 3, requires_grad=True)
    OracleCrossEntropy()(states, log_policy(logits, states), None, None).backward()
    assert (-logits.grad).argmax(dim=1).tolist() == [2, 2]


def test_regret_weighs_a_state_by_what_a_random_choice_loses() -> None:
    states = batch()
    policy = log_policy(torch.zeros(2, 3), states)
    regret = (0.9 - 1.4 / 3 + 0.7 - 1.4 / 3) / 2
    assert OracleCrossEntropy(by_regret=True)(states, policy, None, None).item() == pytest.approx(regret * math.log(3))
    equal = batch(torch.full((2, 3), 0.5))
    assert OracleCrossEntropy(by_regret=True)(equal, policy, None, None).item() == pytest.approx(0.0, abs=1e-6)


def test_reinforce_pushes_towards_what_beats_its_moving_baseline() -> None:
    states, drawn = batch(), torch.tensor([[1, 0], [2, 1]])
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = Reinforce()
    loss(states, log_policy(logits, states), drawn, None).backward()
    assert loss.baseline is not None and loss.baseline.item() == pytest.approx((0.9 + 0.1 + 0.7 + 0.2) / 4)
    assert (-logits.grad).argmax(dim=1).tolist() == [1, 2]


def test_ppo_clips_the_ratio_and_learns_the_states_value() -> None:
    states, drawn = batch(), torch.tensor([[1, 0], [2, 1]])
    torch.manual_seed(0)
    loss = PPO(inputs=4 + 6, hidden=8)
    assert len(loss.parameters) == 4
    logits = torch.zeros(2, 3, requires_grad=True)
    policy = log_policy(logits, states)
    old = policy.detach().gather(1, drawn)
    loss(states, policy, drawn, old).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters)
    assert logits.grad.abs().sum() > 0
    # So far from the old policy that every ratio with a positive advantage is clipped: nothing more to gain there.
    with torch.no_grad():
        for parameter in loss.parameters:
            parameter.zero_()  # a value of 0, so that all advantages are positive
    logits = torch.zeros(2, 3, requires_grad=True)
    loss(states, log_policy(logits, states), drawn, old - 1.0).backward()
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_dpo_prefers_the_better_of_a_pair_whatever_the_difference() -> None:
    close = batch(torch.tensor([[0.50, 0.51]]))
    far = batch(torch.tensor([[0.0, 1.0]]))
    gradients = []
    for states in (close, far):
        torch.manual_seed(0)
        logits = torch.zeros(1, 2, requires_grad=True)
        DPO(torch.zeros(2))(states, log_policy(logits, states), None, None).backward()
        gradients.append(logits.grad)
    assert torch.equal(gradients[0], gradients[1]) and gradients[0][0, 1] < 0


def test_dpo_without_unequal_pairs_is_nothing() -> None:
    states = batch(torch.full((2, 3), 0.5))
    assert DPO(torch.zeros(3))(states, log_policy(torch.zeros(2, 3), states), None, None).item() == 0


@pytest.mark.parametrize("loss", [Reinforce(), PPO(10)])
def test_losses_over_drawn_settings_say_that_they_need_them(loss) -> None:
    states = batch()
    with pytest.raises(ConfigError, match="num_generations"):
        loss(states, log_policy(torch.zeros(2, 3), states), None, None)


def test_losses_with_parts_of_their_own_fit_the_controller() -> None:
    controller = GRPOController(3, 2, hidden_dim=8, knob_values={"tiles": [1, 4]})
    controller.start_from([0.4, 0.6])
    assert dpo_loss(controller).reference.tolist() == pytest.approx([8.0, 12.0])  # logit_scale 20
    assert ppo_loss(controller).value[0].in_features == 5 + 2 * 13

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_tables import tiny

from budgetvlm.controller.grpo import (
    compute_advantages,
    exact_advantages,
    expectation,
    grpo_loss,
)
from budgetvlm.controller.member_stack import MemberStack
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.trainer import GRPOTrainer
from budgetvlm.controller.training_options import GRPOConfig, StatePlan
from budgetvlm.controller.training_states import MeasuredOutcomes, TrainingData, TrainingStates, draw_states
from budgetvlm.errors import ConfigError

KNOBS = {"max_crops": [1, 4], "top_k": [2, 8]}
LATENCY = np.array([10.0, 20.0, 30.0, 40.0])


def test_advantages_are_rewards_less_the_mean_of_their_own_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.2, 0.2, 1.0]])
    wanted = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-0.2, -0.2, -0.2, 0.6]])
    torch.testing.assert_close(compute_advantages(rewards), wanted)
    # the groups' own std: sqrt(4 * 0.25 / 3) = 0.5774 and sqrt((3 * 0.04 + 0.36) / 3) = 0.4
    by_group = wanted / torch.tensor([[math.sqrt(1 / 3) + 1e-4], [0.4 + 1e-4]])
    torch.testing.assert_close(compute_advantages(rewards, "group"), by_group)
    torch.testing.assert_close(compute_advantages(rewards, "batch"), wanted / (rewards.std() + 1e-4))


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("reward", [0.7, 0.9, 1 / 3])
def test_equal_rewards_have_no_advantage_at_all(scale, reward):
    """A float32 mean of eight times 0.7 is not 0.7; divided by a std of 0, that would become a step of Adam."""
    rewards = torch.full((3, 8), reward)
    assert not compute_advantages(rewards, scale).any()
    if scale != "none":
        policy = torch.log_softmax(torch.arange(24.0).view(3, 8), dim=-1)
        assert not exact_advantages(policy, rewards, scale).any()


def test_states_in_another_order_have_the_same_advantages_in_that_order():
    """Groups that mixed samples, or advantages sliced onto the wrong rows, would fail here."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(16, 8, generator=generator)
    order = torch.randperm(16, generator=generator)
    for scale in ("none", "group", "batch"):
        torch.testing.assert_close(compute_advantages(rewards[order], scale), compute_advantages(rewards, scale)[order])


def test_dividing_by_the_groups_std_turns_a_tie_break_into_a_full_size_advantage():
    all_right = torch.tensor([[1.0 - 0.002, 1.0 - 0.01]])  # both settings answer; one is cheaper by 0.008
    assert compute_advantages(all_right)[0, 0].item() == pytest.approx(0.004, rel=1e-3)
    assert compute_advantages(all_right, "group")[0, 0].item() == pytest.approx(0.695, rel=1e-2)


@pytest.mark.parametrize("shape", [(3, 1), (3,), (3, 0)])
def test_groups_smaller_than_2_are_refused(shape):
    with pytest.raises(ConfigError, match="no groups"):
        compute_advantages(torch.zeros(shape))


def test_the_clipped_loss_by_hand():
    old = torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25]]))
    new = torch.log(torch.tensor([[0.50, 0.20, 0.50, 0.10]]))  # ratios 2, 0.8, 2, 0.4
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    # min(2, 1.2) = 1.2; min(0.8, 0.8) = 0.8; min(-2, -1.2) = -2; min(-0.4, -0.8) = -0.8
    assert grpo_loss(new, old, advantages, epsilon=0.2).item() == pytest.approx(-(1.2 + 0.8 - 2.0 - 0.8) / 4)
    assert grpo_loss(new, old, advantages, 0.2, 0.5).item() == pytest.approx(-(1.5 + 0.8 - 2.0 - 0.8) / 4)
    weights = torch.tensor([1.2, 0.8, 1.2, 0.4])
    cispo = -(weights * advantages[0] * new[0]).mean().item()
    assert grpo_loss(new, old, advantages, 0.2, loss_type="cispo").item() == pytest.approx(cispo)


def test_no_gradient_flows_through_a_clipped_gain():
    new = torch.log(torch.tensor([[0.9, 0.25]])).requires_grad_()
    old = torch.log(torch.tensor([[0.25, 0.25]]))
    grpo_loss(new, old, torch.tensor([[1.0, 1.0]])).backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([0.0, -0.5])


def test_the_exact_loss_has_the_gradient_of_the_expected_reward():
    """d E[r] / d logit_k = pi_k (r_k - E[r]) for one state."""
    logits = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[0.2, 0.9, 0.4]], dtype=torch.float64)
    log_policy = logits.log_softmax(dim=1)
    (-expectation(log_policy, exact_advantages(log_policy, rewards))).backward()
    policy = logits.detach().softmax(dim=1)
    torch.testing.assert_close(-logits.grad, policy * (rewards - (policy * rewards).sum()))


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_the_scaled_exact_loss_divides_that_gradient_by_the_std_under_the_policy(scale):
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[0.2, 0.9, 0.4], [1.0, 1.0, 0.9]], dtype=torch.float64)
    log_policy = logits.log_softmax(dim=1)
    (-expectation(log_policy, exact_advantages(log_policy, rewards, scale))).backward()
    policy = logits.detach().softmax(dim=1)
    mean = (policy * rewards).sum(dim=1, keepdim=True)
    if scale == "group":
        std = (policy * (rewards - mean).square()).sum(dim=1, keepdim=True).sqrt()
    else:
        std = ((policy * rewards.square()).sum() / 2 - mean.mean().square()).sqrt()
    torch.testing.assert_close(-logits.grad, policy * (rewards - mean) / (std + 1e-4) / 2)


def test_kl_and_entropy_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert expectation(p.log(), p.log() - q.log()).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)
    )
    assert expectation(p.log(), p.log() - p.log()).item() == 0.0
    assert -expectation(p.log(), p.log()).item() == pytest.approx(math.log(2))
    forbidden = torch.tensor([[0.0, -1e9]])  # a setting that is not allowed adds nothing, and no NaN
    alone = forbidden.log_softmax(dim=1)
    assert expectation(alone, alone).item() == 0.0


def test_all_wrong_options_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        GRPOConfig(num_generations=1, scale_rewards="std", epsilon=0.0, batch_size=0, beta=-1.0, ema_decay=1.0)  # type: ignore[arg-type]
    for word in ("at least 2 settings", "scale_rewards='std'", "epsilon=0.0", "batch_size=0", "beta=-1.0", "ema_decay"):
        assert word in str(caught.value)


def test_group_size_is_another_name_for_num_generations():
    assert GRPOConfig(group_size=8) == GRPOConfig(num_generations=8)
    assert GRPOConfig(group_size=8).num_generations == 8
    assert GRPOConfig().num_generations is None
    with pytest.raises(ConfigError, match="one thing"):
        GRPOConfig(group_size=8, num_generations=4)
    with pytest.raises(ConfigError, match="nothing is drawn"):
        GRPOConfig(num_iterations=2)
    with pytest.raises(ConfigError, match="use 'grpo'"):
        GRPOConfig(loss_type="dr_grpo")  # type: ignore[arg-type]


def trainer(
    accuracy: np.ndarray,
    config: GRPOConfig,
    features: np.ndarray | None = None,
    seed: int = 0,
    dropout: float = 0.0,
    **plan,
) -> GRPOTrainer:
    """A trainer on outcomes ``[S, 4]``, every setting's latency being `LATENCY`."""
    image = torch.eye(len(accuracy)) if features is None else torch.from_numpy(features).float()
    torch.manual_seed(seed)
    controller = GRPOController(
        image.shape[1], 1, budget_dim=8, hidden_dim=32, knob_values=KNOBS, latency_reference_ms=40.0,
        latency_ms=LATENCY.tolist(), bounds_ms=LATENCY.tolist(), logit_scale=1.0, dropout=dropout,
    )  # fmt: skip
    torch.nn.init.normal_(controller.heads.weight, std=0.3)
    outcomes = MeasuredOutcomes.from_arrays(accuracy, np.tile(LATENCY, (len(accuracy), 1)))
    data = TrainingData(outcomes, image, torch.zeros(len(accuracy), 1))
    return GRPOTrainer(config, [controller], data, StatePlan(**plan), seeds=[seed])


def states_of(sample: torch.Tensor, budget_ms: torch.Tensor, price: torch.Tensor) -> TrainingStates:
    """States of a single member, from ``[N]`` each."""
    return TrainingStates(sample[None], budget_ms[None], price[None])


def train_epochs(made: GRPOTrainer, first: int, last: int) -> None:
    made.train(first, last, lambda epoch, losses: True)


def test_drawn_groups_give_the_enumerated_gradient_on_average():
    """The sampled estimator against the exact one, on a small network in float64.

    A group's own mean as the baseline shrinks the expectation by (G - 1) / G, since each draw is part of its baseline.
    """
    accuracy = np.random.default_rng(0).random((5, 4))
    made = trainer(accuracy, GRPOConfig(num_generations=4, entropy_coef=0.0))
    made.template.double()
    made.stack.double()
    made.data = replace(made.data, image=made.data.image.double(), language=made.data.language.double())
    made.encoded = None
    states = states_of(torch.arange(5), torch.tensor([40.0, 30.0, 25.0, math.inf, 15.0]), torch.full((5,), 0.1))
    batch = made.prepare(states)
    weight = made.stack.layers["heads"].weight

    def gradient(rows: torch.Tensor, group: int | None) -> torch.Tensor:
        policy = made.log_policy(batch)[:, rows]
        part = replace(batch, rewards=batch.rewards[:, rows])
        made.config = replace(made.config, num_generations=group, group_size=group)
        groups = made.draw_groups(policy)
        loss = made.loss(part, policy, groups, made.advantages(part, policy, groups))
        return torch.autograd.grad(loss.sum(), weight)[0]

    exact = gradient(torch.arange(5), None)
    torch.manual_seed(0)
    for group in (2, 8):
        drawn = gradient(torch.arange(5).repeat(40_000 // group), group) * group / (group - 1)
        assert (drawn - exact).norm() / exact.norm() < 0.03


def test_only_allowed_and_measured_settings_count():
    accuracy = np.array([[0.5, 0.6, 0.7, 0.8], [0.5, np.nan, 0.7, 0.8], [np.nan, 0.6, 0.7, 0.8]])
    made = trainer(accuracy, GRPOConfig())
    states = states_of(torch.arange(3), torch.tensor([30.0, 30.0, 15.0]), torch.tensor([0.1, 0.1, 0.1]))
    batch = made.prepare(states)
    assert (made.log_policy(batch)[0] > -1e6).tolist() == [
        [True, True, True, False],
        [True, False, True, False],
        [True, False, False, False],  # nothing allowed was measured: the cheapest, alone, so nothing is learnt
    ]
    torch.testing.assert_close(batch.rewards[0, 0], torch.tensor([0.475, 0.55, 0.625, 0.70]))
    assert batch.rewards[0, 1, 1] == 0.0


def test_the_guides_objective_sees_every_setting():
    made = trainer(np.full((1, 4), 0.5), GRPOConfig(objective="reward"))
    states = states_of(torch.tensor([0]), torch.tensor([20.0]), torch.tensor([0.0]))
    batch = made.prepare(states)
    assert (made.log_policy(batch) > -1e6).all()
    assert batch.rewards[0, 0, 3].item() == pytest.approx(0.5 - 0.5 / (1 + math.exp(-10)) - 10 - 0.05, abs=1e-4)


def test_states_are_drawn_as_planned():
    accuracy = np.full((400, 4), 0.5)
    accuracy[:100, 3] = np.nan
    outcomes = MeasuredOutcomes.from_arrays(accuracy, np.tile(LATENCY, (400, 1)))
    plan = StatePlan(wide_share=0.0, price_share=0.5, price_range=(0.05, 0.5))
    states = draw_states(plan, outcomes, 40.0, torch.Generator().manual_seed(0))
    assert len(states) == 1200
    samples = states.sample.view(400, 3)
    assert (samples == samples[:, :1]).all()  # a sample's states lie side by side
    assert sorted(samples[:, 0].tolist()) == list(range(400)) != samples[:, 0].tolist()
    limited = states.budget_ms[states.budget_ms.isfinite()]
    allowed = {round(f * ms, 3) for f in (0.8, 1.0, 1.2) for ms in LATENCY.tolist()}
    assert {round(ms, 3) for ms in limited.tolist()} == allowed
    first = (states.sample < 100) & states.budget_ms.isfinite()
    assert states.budget_ms[first].max() == pytest.approx(36.0)  # an unmeasured setting's latency is no budget
    priced = states.price != plan.default_price
    assert priced.float().mean() == pytest.approx(0.5, abs=0.05)
    assert 0.05 <= states.price[priced].min() < 0.06 and 0.45 < states.price[priced].max() <= 0.5
    assert states.budget_ms[priced].isinf().float().mean() == pytest.approx(0.5, abs=0.06)
    assert not states.budget_ms[~priced].isinf().any()


def test_wide_budgets_cover_the_range_whatever_the_settings_cost():
    outcomes = MeasuredOutcomes.from_arrays(np.full((400, 4), 0.5), np.full((400, 4), 1.0))
    plan = StatePlan(wide_share=0.5, wide_range=(0.3, 1.3), price_share=0.0)
    budgets = draw_states(plan, outcomes, 40.0, torch.Generator().manual_seed(0)).budget_ms[0]
    wide = budgets[budgets > 2.0]
    assert len(wide) / len(budgets) == pytest.approx(0.5, abs=0.05)
    assert 12.0 <= wide.min() < 12.5 and 51.5 < wide.max() <= 52.0
    assert wide.mean() == pytest.approx(32.0, abs=1.5)


def test_wrong_plans_are_refused():
    with pytest.raises(ConfigError, match=r"budget_factors.*price_share=2.*price_range"):
        StatePlan(budget_factors=(0.8, -1.0), price_share=2.0, price_range=(0.5, 0.1))


CLASSES = np.arange(400) % 4


def planted_best(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Four visible classes, each answered by one setting alone; noisy features ``[400, 8]``."""
    rng = np.random.default_rng(seed)
    features = np.eye(4)[CLASSES] @ rng.normal(size=(4, 8)) * 2 + 0.1 * rng.normal(size=(400, 8))
    return np.eye(4)[CLASSES], features


def chosen_settings(made: GRPOTrainer) -> np.ndarray:
    states = states_of(torch.arange(400), torch.full((400,), 40.0), torch.full((400,), 0.01))
    averaged = GRPOTrainer(made.config, [made.averaged_controller(0)], made.data)
    with torch.no_grad():
        return averaged.log_policy(averaged.prepare(states))[0].argmax(dim=1).numpy()


@pytest.mark.parametrize("group", [None, 8])
def test_a_planted_best_setting_is_learnt(group):
    accuracy, features = planted_best(0)
    config = GRPOConfig(num_generations=group, learning_rate=5e-3, entropy_coef=0.01, num_epochs=12, ema_decay=0.9)
    made = trainer(accuracy, config, features)
    train_epochs(made, 0, config.num_epochs)
    assert (chosen_settings(made) == CLASSES).mean() > 0.99


def test_dividing_by_the_groups_std_collapses_to_the_cheapest_setting():
    """Hard or easy whatever the setting, as most questions are: what is left to learn from is the price."""
    rng = np.random.default_rng(0)
    # two thirds: all settings right or all wrong; one third: only the dearest is right
    accuracy = np.where(rng.random((600, 1)) < 0.35, np.array([0.0, 0.0, 0.0, 1.0]), rng.random((600, 1)) < 0.5)
    features = rng.normal(size=(600, 4))
    mean_accuracy = {}
    for scale in ("none", "group"):
        config = GRPOConfig(num_generations=4, scale_rewards=scale, learning_rate=5e-3, entropy_coef=0.0, ema_decay=0.9)
        made = trainer(accuracy, config, features, price_share=0.0)
        train_epochs(made, 0, 6)
        chosen = chosen_settings(made)
        mean_accuracy[scale] = accuracy[np.arange(400), chosen].mean()
    assert mean_accuracy["none"] > mean_accuracy["group"] + 0.2


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not():
    def weights(seed: int) -> torch.Tensor:
        accuracy, features = planted_best(0)
        made = trainer(accuracy, GRPOConfig(num_generations=8), features, seed=seed)
        train_epochs(made, 0, 2)
        return torch.cat([p.detach().flatten() for p in made.stack.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_kl_to_the_starting_policy_holds_the_policy_back():
    accuracy, features = planted_best(0)
    moved = {}
    for beta in (0.0, 5.0):
        made = trainer(accuracy, GRPOConfig(beta=beta, learning_rate=3e-3), features)
        before = made.log_policy(made.prepare(states_of(torch.arange(400), torch.full((400,), 40.0), torch.zeros(400))))
        train_epochs(made, 0, 3)
        after = made.log_policy(made.prepare(states_of(torch.arange(400), torch.full((400,), 40.0), torch.zeros(400))))
        moved[beta] = expectation(after, after - before).item()
    assert moved[5.0] < 0.2 * moved[0.0]


def test_several_updates_with_one_draw_use_the_probabilities_it_was_drawn_with():
    accuracy, features = planted_best(0)
    config = GRPOConfig(num_generations=8, num_iterations=2, learning_rate=5e-3, num_epochs=6, ema_decay=0.9)
    made = trainer(accuracy, config, features)
    train_epochs(made, 0, 6)
    assert made.average.n_averaged == 6 * 2 * math.ceil(400 * 3 / 64)
    assert (chosen_settings(made) == CLASSES).mean() > 0.99


def test_the_average_of_the_weights_has_a_short_memory_at_the_start():
    """Update n makes it decay x average + (1 - decay) x weights with decay = min(ema_decay, n / (n + 10))."""
    accuracy, features = planted_best(0)
    made = trainer(accuracy, GRPOConfig(ema_decay=0.3, batch_size=64), features)
    seen, update = [], made.average.update_parameters

    def noted(stack: torch.nn.Module) -> None:
        seen.append(stack.layers["heads"].bias.detach().clone())
        update(stack)

    made.average.update_parameters = noted  # type: ignore[method-assign]
    train_epochs(made, 0, 1)
    average = seen[0]  # the first update has no earlier average
    for n, weights in enumerate(seen[1:], 2):
        decay = min(0.3, n / (n + 10))
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(made.average.module.layers["heads"].bias, average)
    torch.testing.assert_close(made.averaged_controller(0).heads.bias, average[0])


def test_rewards_of_settings_beyond_the_budget_change_nothing():
    """Without the mask of affordable settings, training would learn from settings that no budget allows."""
    accuracy, features = planted_best(0)
    other = accuracy.copy()
    other[:, 3] = 1.0 - other[:, 3]
    weights = []
    for table in (accuracy, other):
        made = trainer(table, GRPOConfig(learning_rate=1e-2), features, price_share=0.0, wide_share=0.0)
        made.template.bounds_ms[3] = 1000.0
        train_epochs(made, 0, 2)
        weights.append(made.stack.layers["heads"].weight.detach())
    assert torch.equal(*weights)
    made.template.bounds_ms[3] = 40.0
    train_epochs(made, 2, 3)
    assert not torch.equal(weights[0], made.stack.layers["heads"].weight)


def test_a_table_becomes_outcomes_with_its_gaps():
    table, _ = tiny(6)
    accuracy = table.accuracy.copy()
    accuracy[0, 1] = np.nan
    outcomes = MeasuredOutcomes.from_arrays(accuracy, table.latency_ms)
    assert not outcomes.measured[0, 1] and outcomes.measured.sum() == 23
    assert outcomes.latency_ms[0, 1] == 0.0


def test_features_may_hold_more_than_the_samples():
    rng = np.random.default_rng(4)
    accuracy, wide = rng.random((5, 4)), rng.random((9, 3)).astype(np.float32)
    rows = torch.tensor([8, 0, 3, 5, 1])
    alone = trainer(accuracy, GRPOConfig(), wide[rows.numpy()])
    data = TrainingData(alone.data.outcomes, torch.from_numpy(wide), torch.zeros(9, 1), rows)
    within = GRPOTrainer(GRPOConfig(), [alone.template], data)
    states = states_of(torch.tensor([4, 0, 2]), torch.full((3,), 40.0), torch.full((3,), 0.1))
    assert torch.equal(within.prepare(states).encoded, alone.prepare(states).encoded)
    within.encoded = None  # as for features that are too large to be standardised in advance
    assert torch.equal(within.prepare(states).encoded, alone.prepare(states).encoded)


def test_states_of_one_sample_share_its_features_in_a_batch_that_may_be_cut_anywhere():
    rng = np.random.default_rng(4)
    made = trainer(rng.random((5, 4)), GRPOConfig(), rng.random((5, 3)).astype(np.float32))
    sample = torch.tensor([4, 4, 4, 0, 0, 2, 4])
    states = states_of(sample, torch.linspace(20.0, 50.0, 7), torch.full((7,), 0.1))
    whole = made.prepare(states)
    assert [whole.features.shape[1], whole.sample.tolist()] == [4, [0, 0, 0, 1, 1, 2, 3]]
    assert torch.equal(whole.encoded, torch.cat([made.prepare(states[[i]]).features for i in range(7)], dim=1))
    parts = list(whole.split(2))
    assert [(len(part), part.features.shape[1]) for part in parts] == [(2, 1), (2, 2), (2, 2), (1, 1)]
    for name in ("encoded", "basis", "offset", "rewards"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))


def members(count: int, config: GRPOConfig, seeds: list[int], dropout: float = 0.0) -> GRPOTrainer:
    """A trainer of several controllers whose weights differ."""
    accuracy, features = planted_best(0)
    made = [trainer(accuracy, config, features, seed=seed, dropout=dropout) for seed in range(count)]
    return GRPOTrainer(config, [one.template for one in made], made[0].data, seeds=seeds)


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1, "scale_rewards": "batch"}])
def test_members_that_train_at_once_end_where_they_end_alone(changes):
    """Without dropout and drawn groups, which share one random stream, a member does not see the others."""
    config = replace(GRPOConfig(learning_rate=3e-3, ema_decay=0.9), **changes)
    together = members(3, config, seeds=[5, 6, 7])
    train_epochs(together, 0, 2)
    for number in range(3):
        alone = members(3, config, seeds=[5, 6, 7])
        alone.keep([number])
        train_epochs(alone, 0, 2)
        for name, weights in alone.stack.state_dict().items():
            torch.testing.assert_close(weights[0], together.stack.state_dict()[name][number], rtol=1e-3, atol=1e-5)


def test_members_that_stay_go_on_as_if_the_others_had_never_left():
    config = GRPOConfig(learning_rate=3e-3, beta=0.1)
    whole, fewer = (members(3, config, seeds=[0, 1, 2]) for _ in range(2))
    train_epochs(whole, 0, 2)
    train_epochs(fewer, 0, 1)
    fewer.keep([0, 2])
    assert fewer.seeds == [0, 2]
    train_epochs(fewer, 1, 2)
    for position, number in enumerate((0, 2)):
        found, wanted = fewer.averaged_controller(position), whole.averaged_controller(number)
        for name, value in wanted.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_each_members_loss_is_that_of_its_own_policy():
    config = GRPOConfig(num_generations=4, scale_rewards="batch", beta=0.2)
    made = members(3, config, seeds=[0, 1, 2])
    batch = next(iter(made.batches(made.draw_states(0))))
    log_policy = made.log_policy(batch) * 1.1
    log_policy = log_policy.log_softmax(dim=-1)
    groups = made.draw_groups(log_policy)
    together = made.loss(batch, log_policy, groups, made.advantages(batch, log_policy, groups))
    for number in range(3):
        rewards = batch.rewards[number].gather(1, groups.settings[number])
        advantages = compute_advantages(rewards, "batch")
        alone = grpo_loss(
            log_policy[number].gather(1, groups.settings[number]), groups.old_log_probs[number], advantages
        )
        start = made.reference(batch.features, batch.sample, batch.basis)[number] + batch.offset[number]
        kl = expectation(log_policy[number], log_policy[number] - start.log_softmax(dim=-1))
        entropy = -expectation(log_policy[number], log_policy[number])
        torch.testing.assert_close(together[number], alone + 0.2 * kl - 0.05 * entropy)


def test_matrices_decay_and_biases_do_not():
    """Where every reward is 0 and there is no entropy bonus, weights change by their decay alone."""
    config = GRPOConfig(learning_rate=1e-3, weight_decay=0.5, entropy_coef=0.0, batch_size=4096)
    made = trainer(np.zeros((400, 4)), config, planted_best(0)[1], price_share=0.0)
    made.plan = replace(made.plan, default_price=0.0)
    before = {name: value.clone() for name, value in made.stack.state_dict().items()}
    train_epochs(made, 0, 1)
    for name, value in made.stack.state_dict().items():
        shrunk = before[name] if name.endswith("bias") else before[name] * (1 - 1e-3 * 0.5)
        if "context" not in name:
            torch.testing.assert_close(value, shrunk, rtol=0, atol=1e-6)


def test_expectations_of_the_log_policy_have_the_gradients_of_entropy_and_kl():
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5))).requires_grad_()
    log_policy, reference = logits.log_softmax(dim=1), torch.randn(3, 5).double().log_softmax(dim=1)
    policy = log_policy.exp()
    pairs = (
        (-expectation(log_policy, log_policy), -(policy * log_policy).sum(dim=1).mean()),
        (expectation(log_policy, log_policy - reference), (policy * (log_policy - reference)).sum(dim=1).mean()),
    )
    for short, long in pairs:
        found, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (short, long))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_stack_computes_what_its_controllers_compute(layers):
    controllers = []
    for seed in range(3):
        torch.manual_seed(seed)
        made = GRPOController(5, 3, budget_dim=4, hidden_dim=8, knob_values=KNOBS, num_hidden_layers=layers)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        controllers.append(made.eval())
    image, language = torch.randn(4, 5), torch.randn(4, 3)
    sample, budget = torch.tensor([0, 0, 1, 2, 3, 3]), torch.linspace(100.0, 900.0, 6)
    stack = MemberStack(controllers).eval()
    encoded = controllers[0].encode(image, language)
    basis = controllers[0].context_basis(budget, torch.zeros(6))
    found = stack(encoded.expand(3, -1, -1), sample, basis.expand(3, -1, -1, -1))
    for number, controller in enumerate(controllers):
        logits = controller(image[sample], language[sample], budget, price=0.0)
        torch.testing.assert_close(found[number], controller.setting_logits(logits), rtol=1e-4, atol=1e-4)
        copy = GRPOController(**controller.config)
        stack.copy_to(number, copy)
        assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), controller.parameters(), strict=True))

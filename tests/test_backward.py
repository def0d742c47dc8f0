"""What training does by hand is what autograd and `torch.optim.AdamW` do, parameter by parameter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_grpo import planted_best, trainer

from budgetvlm.controller.backward import Backward, CompiledBackward
from budgetvlm.controller.flat import FlatAdamW
from budgetvlm.controller.grpo import draw_groups, expectation
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.trainer import SEED_STRIDE, GRPOTrainer
from budgetvlm.controller.training_options import GRPOConfig
from budgetvlm.controller.training_states import draw_states
from budgetvlm.errors import CheckpointError


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.5])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float64, Backward), (torch.float32, CompiledBackward)])
def test_logits_and_gradient_are_autograds(layers, dropout, dtype, kind):
    torch.manual_seed(layers)
    made = GRPOController(5, 3, budget_dim=4, hidden_dim=32, num_hidden_layers=layers, dropout=dropout).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.grad = torch.full_like(parameter, torch.nan)  # whatever is there is written over
    encoded, seen = torch.randn(8, 8, dtype=dtype), torch.rand(2, 8, dtype=dtype)
    basis = made.context_basis(*seen)
    torch.manual_seed(9)
    wanted = made.train().value_logits(encoded, basis)
    gradient = torch.randn_like(wanted)
    wanted_gradients = torch.autograd.grad(wanted, list(made.parameters()), gradient)
    torch.manual_seed(9)  # the same numbers are dropped
    backward = Backward.of(made)
    assert type(backward) is kind
    found, back = backward.logits(encoded, basis)
    back(gradient)
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {}
    torch.testing.assert_close(found, wanted, **close)
    for parameter, expected in zip(made.parameters(), wanted_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, **close)


def plain_updates(made: GRPOTrainer, epochs: int) -> dict:
    """`train_epoch` with autograd and AdamW over single parameters; the state that such a trainer saved."""
    config, parameters = made.config, list(made.controller.parameters())
    groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]]
    decays = config.weight_decay, 0.0
    optimizer = torch.optim.AdamW(
        [{"params": g, "weight_decay": w} for g, w in zip(groups, decays, strict=True)], lr=config.learning_rate
    )
    average, steps = [p.detach().clone() for p in parameters], 0
    made.controller.train()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(made.seed * SEED_STRIDE + epoch)
        states = draw_states(made.plan, made.outcomes, made.controller.latency_reference_ms.item(), generator)
        torch.manual_seed(made.seed * SEED_STRIDE + epoch)
        for batch in made.prepare(states).split(config.batch_size):
            log_policy, settings, old = made.log_policy(batch), None, None
            if config.num_generations is not None:
                settings = draw_groups(log_policy, config.num_generations)
                old = log_policy.detach().gather(1, settings)
            optimizer.zero_grad()
            made.loss(batch, log_policy, settings, old).backward()
            optimizer.step()
            steps += 1
            decay = min(config.ema_decay, steps / (steps + 10.0))
            average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, parameters, strict=True)]
    weights = [p.detach().clone() for p in parameters]
    return {"weights": weights, "average": average, "optimizer": optimizer.state_dict(), "steps": steps}


OPTIONS = {
    "all settings, dropout": ({}, 0.5),
    "by the group's std": ({"scale_rewards": "group"}, 0.0),
    "drawn groups": ({"num_generations": 8}, 0.5),
    "held back": ({"beta": 0.1, "num_generations": 8, "loss_type": "cispo"}, 0.0),
}


def two(name: str) -> list[GRPOTrainer]:
    changes, dropout = OPTIONS[name]
    config = replace(GRPOConfig(learning_rate=3e-3, ema_decay=0.9), **changes)
    accuracy, features = planted_best(0)
    return [trainer(accuracy, config, features, dropout=dropout) for _ in range(2)]


def assert_same(made: GRPOTrainer, state: dict) -> None:
    for kind, found in (("weights", made.parameters), ("average", made.average)):
        for value, wanted in zip(found, state[kind], strict=True):
            torch.testing.assert_close(value.detach(), wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_epochs_end_where_autograd_and_adamw_end(name):
    quick, plain = two(name)
    start = torch.cat([p.detach().flatten() for p in quick.parameters])
    for epoch in range(2):
        quick.train_epoch(epoch)
    assert (torch.cat([p.detach().flatten() for p in quick.parameters]) - start).abs().max() > 0.02
    assert_same(quick, plain_updates(plain, 2))


def test_what_an_optimiser_over_single_parameters_saved_is_taken_up():
    quick, plain = two("all settings, dropout")
    quick.load_state_dict(plain_updates(plain, 1))
    quick.train_epoch(1)
    assert_same(quick, plain_updates(two("all settings, dropout")[0], 2))


def test_a_state_of_another_network_is_refused():
    small, large = (FlatAdamW([torch.zeros(n, 2), torch.zeros(n)], 1e-3, 0.01) for n in (2, 3))
    with pytest.raises(CheckpointError, match="is of 6 numbers, but 9 are trained"):
        large.load_state_dict(small.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_those_of_adamw(dtype):
    """In float32 a compiled loop, otherwise PyTorch's; more weights than the loop takes at once."""
    start = torch.randn(70, 60, dtype=dtype)
    optimizer = FlatAdamW([start.clone()], learning_rate=0.1, weight_decay=0.5)
    (ours,) = optimizer.parameters
    theirs = start.clone().requires_grad_()
    plain, average = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.5), start
    for _ in range(4):
        ours.grad.copy_(torch.randn_like(start))
        theirs.grad = ours.grad.clone()
        optimizer.step(average_decay=0.75)
        plain.step()
        average = 0.75 * average + 0.25 * theirs.detach()
    torch.testing.assert_close(ours, theirs.detach())
    torch.testing.assert_close(optimizer.average[0], average)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_decay_and_vectors_do_not(dtype):
    """Without a gradient AdamW moves a weight by - learning rate x decay x weight alone."""
    matrix, vector = torch.full((2, 2), 4.0, dtype=dtype), torch.full((3,), 4.0, dtype=dtype)
    optimizer = FlatAdamW([vector, matrix], learning_rate=0.1, weight_decay=0.5)
    optimizer.step(average_decay=0.75)
    assert matrix.unique().tolist() == pytest.approx([3.8]) and vector.unique().tolist() == [4.0]
    assert [a.unique().tolist() for a in optimizer.average] == [[4.0], pytest.approx([3.95])]


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

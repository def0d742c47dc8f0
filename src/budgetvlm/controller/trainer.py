"""The training loop of GRPO: draws states, looks rewards up, updates the controllers.

M controllers ("members", usually one) train at once, each on states of its own. Each epoch has its own random stream,
seeded with (seed, epoch), so a resumed run continues bit by bit.

Shapes: M members, S samples, K settings, N states of an epoch, B states of a batch, G settings drawn for a state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from budgetvlm._threads import torch_threads
from budgetvlm.controller.grpo import (
    NEVER,
    compute_advantages,
    draw_groups,
    exact_advantages,
    expectation,
    grpo_loss,
)
from budgetvlm.controller.member_stack import MemberStack
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import Batch, PolicyLoss
from budgetvlm.controller.reward import constrained_reward, guide_reward
from budgetvlm.controller.training_options import GRPOConfig, RewardWeights, StatePlan
from budgetvlm.controller.training_states import TrainingData, TrainingStates, draw_states
from budgetvlm.errors import ConfigError
from budgetvlm.policies.stacked_networks import decay_groups

BLOCK = 4096  # states prepared at once, so that look-ups cost little per update
# States x weights of an update above which several threads pay. Below, they wait for each other longer than they
# compute: on two cores without a common cache 64 states take 1.6 times as long with two threads as with one.
WORTH_SHARING = 6e7
CACHE_LIMIT = 32_000_000  # numbers; features up to this size are standardised once, larger ones whenever they are used
SEED_STRIDE = 1_000_003  # keeps the random streams of neighbouring seeds apart

Validate = Callable[[int, Tensor], bool]
"""Called after each epoch with the number of finished epochs and the members' mean losses ``[M]``; False stops."""


@dataclass(frozen=True)
class DrawnGroups:
    """Settings drawn for each state and the log-probabilities that they were drawn with, ``[M, B, G]`` each."""

    settings: Tensor
    old_log_probs: Tensor


class GRPOTrainer:
    """Trains M controllers of one architecture on the same measured outcomes.

    Args:
        config: the algorithm.
        controllers: where training starts; feature statistics, bounds and latencies are set and equal. They are not
            changed; `controller` and `average` read the weights.
        data: outcomes and features.
        plan: how states are drawn.
        weights: of the guide's reward; only the objective "reward" uses them.
        seeds: one for each controller.
        policy_loss: a loss in place of GRPO's, for a single controller; KL and entropy terms are added to either.

    Raises:
        ConfigError: another loss for several controllers.
    """

    def __init__(
        self,
        config: GRPOConfig,
        controllers: Sequence[GRPOController],
        data: TrainingData,
        plan: StatePlan | None = None,
        weights: RewardWeights | None = None,
        seeds: Sequence[int] = (0,),
        policy_loss: PolicyLoss | None = None,
    ):
        if policy_loss is not None and len(controllers) > 1:
            raise ConfigError(f"a loss of one's own trains one controller, not {len(controllers)}; train them in turn")
        self.config, self.data, self.policy_loss = config, data, policy_loss
        self.plan, self.weights, self.seeds = plan or StatePlan(), weights or RewardWeights(), list(seeds)
        if config.objective == "reward":  # the guide's reward knows no price
            self.plan = replace(self.plan, price_share=0.0)
        self.template = controllers[0]  # its standardisation, bounds and latencies are those of all members
        self.complexity = torch.tensor(self.template.knob_space.complexity).to(data.image)
        small = data.image.numel() + data.language.numel() <= CACHE_LIMIT
        self.encoded = self.template.encode(data.image, data.language) if small else None
        self.stack = MemberStack(controllers)
        self.reference = copy.deepcopy(self.stack).requires_grad_(False).eval() if config.beta else None
        self._start_optimizer()

    def _start_optimizer(self) -> None:
        """Build optimiser and average for the stack as it is."""
        groups = decay_groups(list(self.stack.parameters()), vector_dimensions=2)
        if self.policy_loss is not None:
            groups += decay_groups(self.policy_loss.parameters)
        config = self.config
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.average = AveragedModel(self.stack, multi_avg_fn=self._update_average)

    def train(self, first_epoch: int, last_epoch: int, validate: Validate) -> None:
        """Run algorithm 1 of Shao et al. 2024 for one-step episodes, for the epochs ``range(first_epoch, last_epoch)``.

        The paper's outer loop, which replaces the reference policy, is left out: the reference stays where training
        started.
        """
        config = self.config
        for epoch in range(first_epoch, last_epoch):
            losses = []
            with self._random_stream(epoch):
                # Draw states: each sample with several budgets and prices.
                states = self.draw_states(epoch)
                # Look up features, allowed settings and the reward of every setting.
                for batch in self.batches(states):
                    groups = None
                    for _ in range(config.num_iterations):
                        # The policy, and the settings that are drawn from it once per batch.
                        log_policy = self.log_policy(batch)
                        groups = groups or self.draw_groups(log_policy)
                        # Advantages, and the loss that they weigh.
                        advantages = self.advantages(batch, log_policy, groups)
                        loss = self.loss(batch, log_policy, groups, advantages)
                        # One gradient step, and the moving average of the weights.
                        self.optimizer.zero_grad()
                        loss.sum().backward()
                        self.optimizer.step()
                        self.average.update_parameters(self.stack)
                        losses.append(loss.detach())
            if not validate(epoch + 1, torch.stack(losses).mean(dim=0)):
                return

    @contextmanager
    def _random_stream(self, epoch: int) -> Iterator[None]:
        """Seed dropout and drawn groups for this epoch; the caller's random state is restored afterwards."""
        weights = sum(parameter.numel() for parameter in self.stack.parameters())
        one_thread = self.config.batch_size * weights < WORTH_SHARING
        self.stack.train()
        with torch.random.fork_rng(devices=[]), torch_threads(1 if one_thread else None):
            torch.manual_seed(self.seeds[0] * SEED_STRIDE + epoch)
            yield
        self.stack.eval()

    def draw_states(self, epoch: int) -> TrainingStates:
        """The states of an epoch, ``[M, N]``; a member's depend on its own seed alone."""
        reference_ms = self.template.latency_reference_ms.item()
        generators = [torch.Generator().manual_seed(seed * SEED_STRIDE + epoch) for seed in self.seeds]
        drawn = [draw_states(self.plan, self.data.outcomes, reference_ms, generator) for generator in generators]
        return TrainingStates.stacked(drawn)

    def batches(self, states: TrainingStates) -> Iterator[Batch]:
        """The states in batches of ``config.batch_size``."""
        size = self.config.batch_size
        block = max(size, BLOCK // size * size)
        for start in range(0, len(states), block):
            yield from self.prepare(states[start : start + block]).split(size)

    @torch.no_grad()
    def prepare(self, states: TrainingStates) -> Batch:
        """Look up everything that an update of these states needs."""
        controller, outcomes = self.template, self.data.outcomes
        members, count = states.sample.shape
        budget, price, rows = (column.flatten() for column in (states.budget_ms, states.price, states.sample))
        accuracy, latency, measured = (
            column.index_select(0, rows) for column in (outcomes.accuracy, outcomes.latency_ms, outcomes.measured)
        )
        if self.config.objective == "constrained":
            bounds = None if self.data.bounds_ms is None else self.data.bounds_ms.index_select(0, rows)
            allowed = controller.allowed(controller.feasible(budget, bounds) & measured)
            rewards = constrained_reward(accuracy, latency, controller.latency_reference_ms, price[:, None])
        else:
            allowed = controller.allowed(measured)
            rewards = guide_reward(accuracy, latency, budget[:, None], self.complexity, self.weights)
        offset = controller.price_term(price).add_(~allowed, alpha=NEVER)
        # Neighbouring states of one sample share its features.
        is_first = torch.ones(count, dtype=torch.bool, device=rows.device)
        is_first[1:] = (states.sample[:, 1:] != states.sample[:, :-1]).any(dim=0)
        features = self._features_of(states.sample[:, is_first].flatten())
        return Batch(
            features.unflatten(0, (members, -1)),
            is_first.cumsum(0) - 1,
            controller.context_basis(budget, price).unflatten(0, (members, count)),
            offset.unflatten(0, (members, count)),
            rewards.mul_(measured).unflatten(0, (members, count)),
        )

    def _features_of(self, samples: Tensor) -> Tensor:
        """Standardised features of samples, int64 ``[n]`` -> ``[n, F]``."""
        rows = samples if self.data.rows is None else self.data.rows[samples]
        if self.encoded is not None:
            return self.encoded.index_select(0, rows)
        image, language = (x.index_select(0, rows) for x in (self.data.image, self.data.language))
        return self.template.encode(image, language)

    def log_policy(self, batch: Batch) -> Tensor:
        """Log-probability of every setting, ``[M, B, K]``, about `NEVER` where it is not allowed."""
        logits = self.stack(batch.features, batch.sample, batch.basis) + batch.offset
        return logits.log_softmax(dim=-1)

    def draw_groups(self, log_policy: Tensor) -> DrawnGroups | None:
        """Settings to compare for each state; None means all of them, weighted by the policy."""
        if self.config.num_generations is None:
            return None
        settings = draw_groups(log_policy, self.config.num_generations)
        return DrawnGroups(settings, log_policy.detach().gather(-1, settings))

    def advantages(self, batch: Batch, log_policy: Tensor, groups: DrawnGroups | None) -> Tensor:
        """How much better each setting is than its state's others, ``[M, B, G]``, or ``[M, B, K]`` without groups."""
        scale = self.config.scale_rewards
        if groups is None:
            return exact_advantages(log_policy, batch.rewards, scale)
        return compute_advantages(batch.rewards.gather(-1, groups.settings), scale)

    def loss(self, batch: Batch, log_policy: Tensor, groups: DrawnGroups | None, advantages: Tensor) -> Tensor:
        """Each member's loss ``[M]``: the policy loss minus the entropy bonus plus the KL divergence."""
        return self._policy_loss(batch, log_policy, groups, advantages) + self._regularisation(batch, log_policy)

    def _policy_loss(self, batch: Batch, log_policy: Tensor, groups: DrawnGroups | None, advantages: Tensor) -> Tensor:
        if self.policy_loss is not None:
            drawn = (None, None) if groups is None else (groups.settings[0], groups.old_log_probs[0])
            return self.policy_loss(batch.of_member(0), log_policy[0], *drawn)[None]
        if groups is None:
            return -expectation(log_policy, advantages)
        config, log_probs = self.config, log_policy.gather(-1, groups.settings)
        return grpo_loss(
            log_probs, groups.old_log_probs, advantages, config.epsilon, config.clip_high, config.loss_type
        )

    def _regularisation(self, batch: Batch, log_policy: Tensor) -> Tensor:
        penalty = self.config.entropy_coef * log_policy.detach()
        if self.reference is not None:
            reference = self.reference(batch.features, batch.sample, batch.basis) + batch.offset
            penalty += self.config.beta * (log_policy.detach() - reference.log_softmax(dim=-1))
        return expectation(log_policy, penalty)

    def _update_average(self, averages: Any, weights: Any, updates: Any) -> None:
        """Exponential moving average with a short memory at the start; see `AveragedModel`."""
        decay = min(self.config.ema_decay, (float(updates) + 1.0) / (float(updates) + 11.0))
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    def averaged_controller(self, member: int) -> GRPOController:
        """A copy of the controller with the member's averaged weights, in evaluation mode."""
        controller = copy.deepcopy(self.template)
        averaged = self.average.module
        assert isinstance(averaged, MemberStack)
        averaged.copy_to(member, controller)
        return controller.eval()

    def keep(self, members: Sequence[int]) -> None:
        """Continue with some members only, given by their present positions."""
        rows = torch.tensor(members)
        state = _select(self.state_dict(), rows)
        self.seeds = [self.seeds[member] for member in members]
        self.stack.keep(rows)
        if self.reference is not None:
            self.reference.keep(rows)
            self.reference.requires_grad_(False)
        self._start_optimizer()
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed trainer needs besides its arguments; holds references, copy it to keep it."""
        return {
            "weights": self.stack.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.stack.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def _select(state: Any, members: Tensor) -> Any:
    """The part of a trainer's state that belongs to these members."""
    if isinstance(state, dict):
        return {name: _select(value, members) for name, value in state.items()}
    if isinstance(state, Tensor) and state.ndim > 0:  # counters have no dimension and are the same for all
        return state[members]
    return state

"""The training loop: draws states, looks rewards up, updates the controller. Everything stays in tensors.

Each epoch has its own random stream, seeded with (seed, epoch), so a resumed run continues bit by bit.

Shapes: S samples, K settings, N states of an epoch, B states of a batch, G settings drawn for a state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from budgetvlm._threads import torch_threads
from budgetvlm.controller.backward import Backward, CompiledBackward
from budgetvlm.controller.flat import FlatAdamW
from budgetvlm.controller.grpo import (
    NEVER,
    compute_advantages,
    draw_groups,
    exact_advantages,
    expectation,
    expectation_parts,
    grpo_loss,
    through_softmax,
)
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import Batch, PolicyLoss
from budgetvlm.controller.reward import constrained_reward, guide_reward
from budgetvlm.controller.training_options import GRPOConfig, RewardWeights, StatePlan
from budgetvlm.controller.training_states import Outcomes, States, draw_states

BLOCK = 4096  # states prepared at once: preparing takes half a millisecond and 5 microseconds a state
# States x weights of an update that several threads share. Below, they wait for each other's numbers longer than they
# compute: on two cores that have no cache in common 64 states take 1.6 times as long with two threads as with one.
WORTH_SHARING = 6e7
SEED_STRIDE = 1_000_003  # keeps the streams of neighbouring seeds apart


class GRPOTrainer:
    """Trains a controller on measured outcomes.

    Args:
        config: the algorithm.
        controller: its feature statistics, bounds and latencies are already set; it is changed in place.
        outcomes: accuracy and latency ``[S, K]``.
        image, language: raw features ``[F, Di]`` and ``[F, Dl]``. They are encoded when they are used, because a
            second copy of them would be the most memory of a training.
        plan: how states are drawn.
        weights: of the guide's reward; used by the objective "reward" alone.
        seed: of everything random.
        rows: which rows of the features the samples are, int64 ``[S]``; None: all, in the same order.
        policy_loss: in place of GRPO's, see `policy_loss.PolicyLoss`; KL and entropy terms are added to either.
    """

    def __init__(
        self,
        config: GRPOConfig,
        controller: GRPOController,
        outcomes: Outcomes,
        image: Tensor,
        language: Tensor,
        plan: StatePlan | None = None,
        weights: RewardWeights | None = None,
        seed: int = 0,
        policy_loss: PolicyLoss | None = None,
        rows: Tensor | None = None,
    ):
        self.config, self.controller, self.outcomes, self.seed = config, controller, outcomes, seed
        self.policy_loss = policy_loss
        self.plan, self.weights = plan or StatePlan(), weights or RewardWeights()
        if config.objective == "reward":  # the guide's reward knows no price
            self.plan = replace(self.plan, price_share=0.0)
        self.image, self.language, self.rows = image, language, rows
        self.complexity = torch.tensor(controller.knob_space.complexity).to(image)
        self.parameters: list[Tensor] = list(controller.parameters())
        self.others = policy_loss.parameters if policy_loss else []
        self.optimizer = FlatAdamW([*self.parameters, *self.others], config.learning_rate, config.weight_decay)
        self.average = self.optimizer.average[: len(self.parameters)]
        self.backward = Backward.of(controller)
        self.compiled: CompiledBackward | None = None  # computes an update's loss, too
        exact = config.num_generations is None and policy_loss is None and config.scale_rewards == "none"
        if exact and not config.beta and isinstance(self.backward, CompiledBackward):
            self.compiled = self.backward
        self.reference = copy.deepcopy(controller).requires_grad_(False).eval() if config.beta else None
        self.steps = 0

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over freshly drawn states; returns the mean loss."""
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + epoch)
        self.controller.train()
        states = draw_states(self.plan, self.outcomes, self.controller.latency_reference_ms.item(), generator)
        total = torch.zeros((), device=self.image.device)
        count = 0
        few = self.config.batch_size * self.optimizer.values.numel() < WORTH_SHARING
        with torch.random.fork_rng(devices=[]), torch_threads(1 if few else None):
            torch.manual_seed(self.seed * SEED_STRIDE + epoch)  # dropout and drawn groups
            for batch in self._batches(states):
                for loss in self._updates(batch):
                    total += loss
                    count += 1
        self.controller.eval()
        return {"loss": total.item() / max(count, 1)}

    def _batches(self, states: States) -> Iterator[Batch]:
        size = self.config.batch_size
        block = max(size, BLOCK // size * size)
        for start in range(0, len(states), block):
            prepared = self.prepare(states[start : start + block])
            if self.compiled is not None:
                self.compiled.expect(size, len(prepared) // size)
            yield from prepared.split(size)

    @torch.no_grad()
    def prepare(self, states: States) -> Batch:
        """Look up everything that an update of these states needs."""
        rows = states.sample
        outcomes = self.outcomes
        accuracy, latency, measured = (
            part.index_select(0, rows) for part in (outcomes.accuracy, outcomes.latency_ms, outcomes.measured)
        )
        budget, price = states.budget_ms[:, None], states.price[:, None]
        if self.config.objective == "constrained":
            allowed = self.controller.allowed(self.controller.feasible(states.budget_ms) & measured)
            rewards = constrained_reward(accuracy, latency, self.controller.latency_reference_ms, price)
        else:
            allowed = self.controller.allowed(measured)
            rewards = guide_reward(accuracy, latency, budget, self.complexity, self.weights).mul_(measured)
        # Like `masked_fill` with NEVER, in a fifth of its time.
        offset = self.controller.price_term(states.price) + NEVER * (~allowed).view(torch.uint8)
        samples, sample = rows.unique_consecutive(return_inverse=True)
        places = samples if self.rows is None else self.rows[samples]
        return Batch(
            self.controller.encode_rows(self.image, self.language, places),
            sample,
            self.controller.context_basis(states.budget_ms, states.price),
            offset,
            rewards,  # 0 where not measured, as accuracy and latency are
        )

    def _updates(self, batch: Batch) -> Iterator[Tensor | float]:
        """The updates made with one batch; yields each loss."""
        settings = old_log_probs = None
        loss: Tensor | float
        for _ in range(self.config.num_iterations):
            if self.compiled is not None:
                loss, gradient, back = self.compiled.exact(batch, self.config.entropy_coef)
            else:
                logits, back = self.backward.logits(batch.encoded, batch.basis)
                log_policy = logits.add_(batch.offset).log_softmax(dim=1)
                if self.config.num_generations is not None and settings is None:
                    settings = draw_groups(log_policy, self.config.num_generations)
                    old_log_probs = log_policy.gather(1, settings)
                loss, gradient = self._gradient(batch, log_policy, settings, old_log_probs)
                gradient = through_softmax(log_policy, gradient)
            back(gradient)
            self.steps += 1
            # The average of the weights has a short memory at the start.
            self.optimizer.step(average_decay=min(self.config.ema_decay, self.steps / (self.steps + 10.0)))
            yield loss

    def _gradient(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`loss`, and its gradient by the log-policy ``[B, K]``; that by other parameters is written into them."""
        if settings is None and self.policy_loss is None:
            parts = expectation_parts(log_policy, self._costs(batch, log_policy, exact=True))
            return parts.sum(), parts
        leaf = log_policy.detach().requires_grad_()
        loss = self.loss(batch, leaf, settings, old_log_probs)
        gradient, *others = torch.autograd.grad(loss, [leaf, *self.others])
        for parameter, other in zip(self.others, others, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(other)
        return loss.detach(), gradient

    def log_policy(self, batch: Batch) -> Tensor:
        """Log-probability of every setting, ``[B, K]``, about `NEVER` where not allowed."""
        return (self.controller.value_logits(batch.encoded, batch.basis) + batch.offset).log_softmax(dim=1)

    def loss(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None = None, old_log_probs: Tensor | None = None
    ) -> Tensor:
        """Policy loss of drawn settings ``[B, G]`` (None: all, exactly), and the other terms that are switched on."""
        config, exact = self.config, self.policy_loss is None and (settings is None or old_log_probs is None)
        costs = self._costs(batch, log_policy, exact)
        if self.policy_loss is not None:
            return self.policy_loss(batch, log_policy, settings, old_log_probs) + expectation(log_policy, costs)
        if settings is None or old_log_probs is None:
            return expectation(log_policy, costs)
        advantages = compute_advantages(batch.rewards.gather(1, settings), config.scale_rewards)
        log_probs = log_policy.gather(1, settings)
        loss = grpo_loss(log_probs, old_log_probs, advantages, config.epsilon, config.clip_high, config.loss_type)
        return loss + expectation(log_policy, costs)

    @torch.no_grad()
    def _costs(self, batch: Batch, log_policy: Tensor, exact: bool) -> Tensor:
        """What each setting costs ``[B, K]``, to be weighed with the policy: the terms that are an expectation over all
        settings, as KL divergence and entropy are, and the policy loss too where it is exact."""
        config = self.config
        costs = config.entropy_coef * log_policy
        if exact:
            costs -= exact_advantages(log_policy, batch.rewards, config.scale_rewards)
        if self.reference is not None:
            reference = self.reference.value_logits(batch.encoded, batch.basis) + batch.offset
            costs += config.beta * (log_policy - reference.log_softmax(dim=1))
        return costs

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The controller has the averaged weights inside the ``with`` block and its own again after it."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._set(self.average)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed trainer needs besides its arguments; holds references, copy it to keep it."""
        weights = [parameter.detach() for parameter in self.parameters]
        optimizer = self.optimizer.state_dict()
        return {"weights": weights, "average": self.average, "optimizer": optimizer, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._set(state["weights"])
        for average, value in zip(self.average, state["average"], strict=True):
            average.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]

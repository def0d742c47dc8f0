"""Options of a training run. Reading them takes no PyTorch, so that `budgetvlm train --help` is quick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from budgetvlm.errors import ConfigError

ScaleRewards = Literal["none", "group", "batch"]
LossType = Literal["grpo", "cispo"]
Objective = Literal["constrained", "reward"]
LARGEST_SEED = 2**62  # PyTorch takes 64 bits; members of an ensemble count on from it
SAME_LOSS = ("bnpo", "dr_grpo", "dapo")


@dataclass(frozen=True)
class GRPOConfig:
    """Options of the algorithm; a ConfigError names all that cannot work.

    Attributes:
        objective: "constrained" maximises accuracy minus a price for latency among the settings that the budget allows,
            and "reward" maximises the guide's formula, in which a broken budget is a penalty.
        num_generations: number of settings drawn for each state (G); without it all of them are weighed, which gives
            the exact gradient.
        group_size: the guide's name for num_generations.
        epsilon: how far the probability ratio may fall below 1 before it is clipped.
        epsilon_high: how far it may rise above 1; None: as far as it may fall.
        beta: weight of the KL divergence from the reference policy, which is the one that training started from.
        num_iterations: updates made with one draw; above 1 the ratio leaves 1 and clipping matters.
        scale_rewards: divide advantages by the standard deviation of the "group" or of the "batch", or by "none". With
            "group" the policy collapses to the cheapest setting, because most groups are all right or all wrong and
            differ in latency alone.
        loss_type: "grpo" clips the objective; "cispo" clips the weight (arXiv 2506.13585).
        entropy_coef: weight of the entropy bonus, which keeps the policy from learning single samples by heart. At
            1 / logit_scale of the controller its values become expected accuracies.
        learning_rate: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        batch_size: number of states in one update.
        num_epochs: number of epochs at most.
        ema_decay: decay of the averaged weights, which are validated and saved; 0 uses the last weights.
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


@dataclass(frozen=True)
class RewardWeights:
    """Weights of `guide_reward`, 0 or more (else ConfigError); the defaults are the guide's.

    Attributes:
        alpha: weight of the accuracy.
        beta: weight of the soft penalty on latency near and above the budget.
        gamma: weight of the penalty on a violated budget, which is quadratic in the excess.
        delta: weight of the bonus for the share of the budget that is left.
        epsilon: weight of the penalty on complexity.
    """

    alpha: float = 1.0
    beta: float = 0.5
    gamma: float = 10.0
    delta: float = 0.1
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        wrong = [f"{name}={value!r}" for name, value in asdict(self).items() if not 0 <= value < math.inf]
        if wrong:
            raise ConfigError(f"reward weights must be finite numbers of 0 or more; given {', '.join(wrong)}")


@dataclass(frozen=True)
class StatePlan:
    """How states are drawn; a ConfigError names all that cannot work.

    Attributes:
        budget_factors: every sample gets one state a factor; its budget is factor x the sample's latency at a
            measured setting drawn at random.
        wide_share: share of the states that get a budget drawn uniformly from ``wide_range`` x the reference latency
            instead. Most settings are cheap, so without it large budgets would be rare.
        default_price: price of latency in an ordinary state: accuracy given for one full latency. A small one decides
            between settings that are equally right.
        price_share: share of the states that get a price drawn log-uniformly from ``price_range`` instead; half of
            these have no budget, so that one controller serves both faces of the trade.
    """

    budget_factors: tuple[float, ...] = (0.8, 1.0, 1.2)
    wide_share: float = 0.5
    wide_range: tuple[float, float] = (0.3, 1.3)
    default_price: float = 0.01
    price_share: float = 0.4
    price_range: tuple[float, float] = (0.01, 1.0)

    def __post_init__(self) -> None:
        problems = []
        if not self.budget_factors or not all(0 < factor < math.inf for factor in self.budget_factors):
            problems.append(f"budget_factors={self.budget_factors!r} must be positive numbers, one at least")
        if not 0 <= self.default_price < math.inf:
            problems.append(f"default_price={self.default_price!r} must be 0 or more")
        for name in ("wide_share", "price_share"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name}={getattr(self, name)!r} must be between 0 and 1")
        for name in ("wide_range", "price_range"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
                problems.append(f"{name}={ends!r} must be two positive numbers, the smaller first")
        if problems:
            raise ConfigError("states cannot be drawn like this: " + "; ".join(problems))


@dataclass(frozen=True)
class TrainingConfig:
    """Options of a run; a ConfigError names all that cannot work.

    Attributes:
        grpo: options of the algorithm.
        weights: weights of the guide's reward.
        plan: how states are drawn.
        budget_dim: width of the budget's embedding.
        hidden_dim: width of the hidden layers.
        num_hidden_layers: number of hidden layers.
        dropout: share of the hidden units that training leaves out.
        feature_dim: reduce each feature to N principal components, fitted on the training split; None does not.
        guard_quantile: quantile of the training samples' latencies up to which a setting counts as within a budget.
        alpha: share of the requests that may break their budgets at run time; see `budgetvlm.guard.adaptive`.
        train_split: share of training samples among training and validation samples where the data stores no splits; a
            fifth of all is held out for testing then.
        patience: epochs without a better validation reward before training stops; None, or 0 on the command line, never
            stops early.
        teachers: number of supervised networks that training starts from, beside a ridge regression (see
            `budgetvlm.policies.teachers`); 0 starts from the lookup table.
        seed: seed of everything random.
        device: PyTorch device, for example "cpu" or "cuda".
    """

    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    weights: RewardWeights = field(default_factory=RewardWeights)
    plan: StatePlan = field(default_factory=StatePlan)
    budget_dim: int = 32
    hidden_dim: int = 256
    num_hidden_layers: int = 2
    dropout: float = 0.5
    feature_dim: int | None = None
    guard_quantile: float = 0.95
    alpha: float = 0.05
    train_split: float = 0.8
    patience: int | None = 15
    teachers: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.train_split < 1:
            problems.append(f"train_split={self.train_split!r} leaves a side empty; give a share like 0.8")
        if not 0 < self.guard_quantile <= 1:
            problems.append(f"guard_quantile={self.guard_quantile!r} must be in (0, 1]")
        if not 0 < self.alpha < 1:
            problems.append(f"alpha={self.alpha!r} must be in (0, 1)")
        if self.patience is not None and self.patience < 1:
            problems.append(f"patience={self.patience!r} must be at least 1 epoch, or None")
        if self.teachers < 0:
            problems.append(f"teachers={self.teachers!r} must be 0 or more")
        if not 0 <= self.seed <= LARGEST_SEED:
            problems.append(f"seed={self.seed!r} must be from 0 to 2**62")
        if self.device.startswith("cuda") and not _has_cuda():
            problems.append(f"device={self.device!r}: no such device is available here; use 'cpu'")
        if problems:
            raise ConfigError("these training options cannot work: " + "; ".join(problems))

    @property
    def maximised(self) -> str:
        """One line that says what training maximises."""
        if self.grpo.objective == "constrained":
            return (
                f"maximised (objective constrained): accuracy - {self.plan.default_price:g} x latency / full latency, "
                "among the settings that the budget allows; the reward weights are not used"
            )
        w = self.weights
        return (
            f"maximised (objective reward): {w.alpha:g} accuracy - {w.beta:g} sigmoid(10 (l/b - 1)) - {w.gamma:g} "
            f"max(0, l/b - 1)^2 + {w.delta:g} max(0, 1 - l/b) - {w.epsilon:g} complexity, over all settings"
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()

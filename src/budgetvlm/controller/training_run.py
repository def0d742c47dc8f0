"""The moving parts of a training run, in memory: the trainer, the validation samples and each member's progress.

A run trains M members at once; one member is a plain training, several become an ensemble.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import PolicyLoss
from budgetvlm.controller.trainer import GRPOTrainer
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.controller.training_states import MeasuredOutcomes, TrainingData
from budgetvlm.controller.validation import Validation
from budgetvlm.controller.warm_start import distil, new_controller
from budgetvlm.features import Features
from budgetvlm.guard.input_bounds import fit_guard
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.unmeasured import with_predictions
from budgetvlm.table import ProfileTable

MakeLoss = Callable[[GRPOController], PolicyLoss]
SMALLEST_GAIN = 1e-6  # of validation reward, to count as better


@dataclass
class MemberProgress:
    """What is known of one member while it trains.

    Attributes:
        seed: of everything random in it.
        history: figures of each finished epoch; epoch 0 is the start.
        best: the best epoch's figures. best_state: its averaged weights and buffers, a controller's state dict.
        stopped: whether its patience is spent.
    """

    seed: int
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    best_state: dict[str, Tensor] = field(default_factory=dict)
    stopped: bool = False

    def record(self, figures: dict[str, Any], controller: GRPOController, patience: int | None) -> None:
        """Note a finished epoch; its controller is kept if it is the best so far."""
        self.history.append(figures)
        if not self.best or (figures["reward_mean"] or 0.0) > self.best["reward_mean"] + SMALLEST_GAIN:
            self.best, self.best_state = figures, controller.state_dict()
        self.check_patience(patience)

    def check_patience(self, patience: int | None) -> None:
        """Stop if the last ``patience`` epochs brought nothing better."""
        self.stopped = patience is not None and self.epochs_run - self.best["epoch"] >= patience

    @property
    def epochs_run(self) -> int:
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def metrics(self) -> dict[str, float | None]:
        """Validation figures of the best epoch."""
        return {name: value for name, value in self.best.items() if name not in ("epoch", "loss")}


class TrainingRun:
    """A run that can be stopped after any epoch, saved and taken up again.

    Args:
        table: profiles with a "train" and a "validation" split.
        features: of the table's samples, in the same order.
        config: its seed is not used.
        seeds: one for each member.
        make_loss: from the untrained controller to a loss in place of GRPO's; for a single member.
        say: told what was predicted of cells that were not measured.

    Raises:
        DataError: a side of the split is empty, or no accuracy was measured.
    """

    def __init__(
        self,
        table: ProfileTable,
        features: Features,
        config: TrainingConfig,
        seeds: Sequence[int],
        make_loss: MakeLoss | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.config, self.members = config, [MemberProgress(seed) for seed in seeds]
        self.training = list(range(len(seeds)))  # the members in the trainer, in its order
        timed = table.subset("train")  # bounds are of measured cells: predicted ones lack spread
        self.guard = fit_guard(timed, features.aligned(timed.sample_ids), config.guard_quantile)
        table = with_predictions(table, features, say)
        train, validation = table.subset("train"), table.subset("validation")
        means = SettingMeans.fit(train)
        device = config.device
        image, language = (torch.from_numpy(x).to(device) for x in (features.image, features.language))
        rows, held_out = (torch.from_numpy(table.rows_of(side)).to(device) for side in ("train", "validation"))
        controllers = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                controllers.append(new_controller(table, features, config, self.guard, means).to(device))
                policy_loss = make_loss(controllers[0]) if make_loss else None
        controllers[0].fit_features(image, language, rows)
        for controller in controllers[1:]:
            controller.copy_feature_statistics(controllers[0])
        if config.teachers:
            distil(controllers, table, features, config.teachers, seeds)
        self.starts = [controller.eval() for controller in controllers]
        outcomes = MeasuredOutcomes.from_arrays(train.accuracy, train.latency_ms, device)
        bounds = controllers[0].bounds_of(image, language) if self.guard.by_input else None
        data = TrainingData(outcomes, image, language, rows, None if bounds is None else bounds[rows])
        self.trainer = GRPOTrainer(config.grpo, controllers, data, config.plan, config.weights, seeds, policy_loss)
        self.validation = Validation(
            validation,
            controllers[0].encode(image[held_out], language[held_out]),
            means,
            self.guard,
            config.grpo.objective,
            config.weights,
            config.plan.default_price,
            None if bounds is None else bounds[held_out],
        )

    @property
    def epoch(self) -> int:
        """Finished epochs of the members that train longest."""
        return max(member.epochs_run for member in self.members)

    def train(self, on_epoch: Callable[[], None] = lambda: None) -> None:
        """Train until the last epoch or until every member's patience is spent.

        Args:
            on_epoch: called after each validation, first after that of the untrained members.
        """

        def validate(epoch: int, losses: Tensor | None) -> bool:
            self._validate(epoch, losses)
            some_left = self._drop_stopped()
            on_epoch()
            return some_left

        if not self.members[0].history:
            validate(0, None)
        if self._drop_stopped():
            self.trainer.train(self.epoch, self.config.grpo.num_epochs, validate)

    def _validate(self, epoch: int, losses: Tensor | None) -> None:
        """Measure the averaged weights of each member that trains."""
        for position, number in enumerate(self.training):
            controller = self.trainer.averaged_controller(position)
            figures = self.validation.measure(controller)
            loss = None if losses is None else losses[position].item()
            self.members[number].record({"epoch": epoch, "loss": loss, **figures}, controller, self.config.patience)

    def _drop_stopped(self) -> bool:
        """Take members whose patience is spent out of the trainer; False if none is left to train."""
        kept = [position for position, number in enumerate(self.training) if not self.members[number].stopped]
        if kept and len(kept) < len(self.training):
            self.trainer.keep(kept)
            self.training = [self.training[position] for position in kept]
        return bool(kept)

    def best_controllers(self) -> list[GRPOController]:
        """Every member's best controller, in evaluation mode."""
        return [self.controller(number) for number in range(len(self.members))]

    def controller(self, member: int) -> GRPOController:
        """A member's best controller, in evaluation mode."""
        controller = copy.deepcopy(self.trainer.template)
        controller.load_state_dict(self.members[member].best_state)
        return controller.eval()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, copied; plain values and tensors only."""
        members = [vars(member) for member in self.members]
        return copy.deepcopy({"trainer": self.trainer.state_dict(), "training": self.training, "members": members})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, perhaps with more patience than before."""
        self.members = [MemberProgress(**member) for member in state["members"]]
        self.training = list(state["training"])
        if len(self.training) < len(self.members):
            self.trainer.keep(self.training)
        self.trainer.load_state_dict(state["trainer"])
        for number in self.training:
            self.members[number].check_patience(self.config.patience)

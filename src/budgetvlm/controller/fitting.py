"""Training in memory: a controller from a table and features, with no files. Comparisons and ensembles use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from budgetvlm.controller.ensemble import merge
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.training import MakeLoss, Run, out_of_patience
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable


@dataclass(frozen=True)
class Fitted:
    """A trained controller, the epoch that was kept (0: untrained, the lookup table) and its validation figures."""

    controller: GRPOController
    best_epoch: int
    epochs_run: int
    metrics: dict[str, float | None]


def fit_controller(
    table: ProfileTable,
    features: Features,
    config: TrainingConfig,
    make_loss: MakeLoss | None = None,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Fitted:
    """Train on the table's "train" split and keep the best epoch on "validation", as `training.train` does.

    Args:
        make_loss: from the untrained controller to a loss in place of GRPO's, see `budgetvlm.controller.policy_loss`.
        on_epoch: called with the number of each finished epoch.

    Raises:
        DataError: a side of the split is empty, or samples lack features.
    """
    run = Run(table, features.aligned(table.sample_ids), config, make_loss)
    run.validate(None)
    while run.epoch < config.grpo.num_epochs and not out_of_patience(run, config):
        loss = run.trainer.train_epoch(run.epoch)["loss"]
        run.epoch += 1
        run.validate(loss)
        on_epoch(run.epoch)
    run.controller.load_state_dict(run.best_state)
    figures = {name: value for name, value in run.best.items() if name not in ("epoch", "loss")}
    return Fitted(run.controller.eval(), int(run.best["epoch"]), run.epoch, figures)


def fit_ensemble(
    table: ProfileTable, features: Features, config: TrainingConfig, members: int, make_loss: MakeLoss | None = None
) -> GRPOController:
    """Several controllers that differ in their seeds, averaged in one; see `member_seeds`."""
    seeds = member_seeds(config.seed, members)
    return merge([fit_controller(table, features, replace(config, seed=s), make_loss).controller for s in seeds])


def member_seeds(seed: int, members: int) -> tuple[int, ...]:
    """Seeds of an ensemble's members; two ensembles of one size and different seeds share none."""
    return tuple(range(seed * members, (seed + 1) * members))

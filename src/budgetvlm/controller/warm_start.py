"""Where training starts: a controller that chooses as the lookup table does, then one that knows what teachers know.

Predicting every setting's accuracy learns from all cells of the table at once and takes seconds, while the policy
gradient learns only from settings that the policy likes. So the controller's values are first fitted to the accuracies
that supervised teachers predict (`budgetvlm.policies.teachers`), and GRPO goes on from there with the budgets, the
prices and its own objective. With one network's size the controller decides as quickly as before.
Distillation after Hinton et al. 2015, arXiv 1503.02531.

Shapes: M members, S samples, B samples of a batch, F standardised features, K settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from budgetvlm.controller.known_terms import KnownTerms
from budgetvlm.controller.member_stack import MemberStack
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.provenance import TrainedOn
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies.predictor import PredictorConfig
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.stacked_networks import SupervisedOptions, train_stacked
from budgetvlm.policies.teachers import Teachers
from budgetvlm.table import ProfileTable

DISTILLATION = SupervisedOptions(lr=1e-3, weight_decay=1e-2, batch_size=128, num_epochs=60, patience=10)
LARGEST_SAMPLE = 20_000  # samples of a split that teachers see: this is only a start, and GRPO goes on with all


def new_controller(
    table: ProfileTable, features: Features, config: TrainingConfig, guard: StaticGuard, means: SettingMeans
) -> GRPOController:
    """An untrained controller that chooses as the lookup table does. Raises DataError: no accuracy was measured."""
    controller = GRPOController(
        features.image.shape[1],
        features.language.shape[1],
        budget_dim=config.budget_dim,
        hidden_dim=config.hidden_dim,
        knob_values=table.knob_space.to_dict(),
        latency_reference_ms=means.reference_ms,
        latency_ms=[float(ms) if np.isfinite(ms) else None for ms in means.latency_ms],
        bounds_ms=[float(ms) if np.isfinite(ms) else None for ms in guard.bounds_ms],
        num_hidden_layers=config.num_hidden_layers,
        dropout=config.dropout,
        feature_dim=config.feature_dim,
        default_price=config.plan.default_price,
        bounds_by_input=guard.by_input is not None,
    )
    if controller.input_bounds is not None and guard.by_input is not None:
        controller.input_bounds.copy(guard.by_input)
    if not np.isfinite(means.accuracy).any():
        raise DataError("no accuracy was measured on the training samples; profile it (exp5) and prepare again")
    shares = means.latency_share[np.isfinite(means.latency_share)]
    terms = KnownTerms.of_plan(config.plan, shares.tolist()).to_dict()
    controller.trained_on = replace(TrainedOn.of_table(table), terms=terms)
    controller.start_from(means.accuracy.tolist())
    return controller


def distil(
    controllers: Sequence[GRPOController],
    table: ProfileTable,
    features: Features,
    teachers: int,
    seeds: Sequence[int],
) -> None:
    """Fit the values of M controllers to what their own teachers predict, in place; all are trained at once.

    The epoch with the smallest squared error on the validation samples is kept. Feature statistics must be set.

    Args:
        table: with a "train" and a "validation" split.
        teachers: how many networks each controller learns from. seeds: one for each controller.
    """
    config = PredictorConfig(hidden_dim=controllers[0].feature_layer.out_features)
    own_seeds = np.array([[seed * teachers + number for number in range(teachers)] for seed in seeds])
    table = table.subset(np.concatenate([_spread(table.rows_of(side)) for side in ("train", "validation")]))
    taught = Teachers.fit(table, features, config, own_seeds)

    def lessons(side: str) -> tuple[Tensor, Tensor]:
        """Standardised features of a split and the values to learn, ``[S, F]`` and ``[M, S, K]``."""
        part = features.aligned(table.subset(side).sample_ids)
        return _encoded(controllers[0], part), torch.from_numpy(taught.values(part).astype(np.float32))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        _fit_values(controllers, lessons("train"), lessons("validation"))


def _spread(rows: np.ndarray) -> np.ndarray:
    """The rows, or `LARGEST_SAMPLE` of them, evenly spread, if there are more."""
    if len(rows) <= LARGEST_SAMPLE:
        return rows
    return rows[np.linspace(0, len(rows) - 1, LARGEST_SAMPLE).astype(np.int64)]


def _encoded(controller: GRPOController, features: Features) -> Tensor:
    """Standardised features, ``[S, F]``."""
    device = controller.heads.weight.device
    image, language = torch.from_numpy(features.image).to(device), torch.from_numpy(features.language).to(device)
    return controller.encode(image, language)


def _fit_values(
    controllers: Sequence[GRPOController], data: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]
) -> None:
    """Least squares on features ``[S, F]`` and targets ``[M, S, K]``; context and embeddings stay as they are."""
    stack = MemberStack(controllers)
    device = data[0].device
    (x, y), (held_out_x, held_out_y) = ((features, values.to(device)) for features, values in (data, held_out))
    members = torch.arange(len(controllers), device=device)[:, None]

    def loss(rows: Tensor) -> Tensor:
        return (stack.train().feature_values(x[rows]) - y[members, rows]).square().mean(dim=(-2, -1))

    @torch.no_grad()
    def validate() -> Tensor:
        values = stack.eval().feature_values(held_out_x.expand(len(controllers), -1, -1))
        return (values - held_out_y).square().mean(dim=(-2, -1))

    parameters = [p for name, p in stack.named_parameters() if "embedding" not in name and "context" not in name]
    train_stacked(parameters, len(x), loss, validate, DISTILLATION)
    for member, controller in enumerate(controllers):
        stack.copy_to(member, controller)

"""An untrained controller for a table: it knows the settings' latencies and chooses as the lookup table does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

if TYPE_CHECKING:
    from budgetvlm.controller.training_options import TrainingConfig


def new_controller(
    table: ProfileTable, features: Features, config: TrainingConfig, guard: StaticGuard, expected: SettingMeans
) -> GRPOController:
    """Build it with the sizes of a run's options. Raises DataError where no accuracy was measured."""
    controller = GRPOController(
        features.image.shape[1],
        features.language.shape[1],
        budget_dim=config.budget_dim,
        hidden_dim=config.hidden_dim,
        knob_values=table.knob_space.to_dict(),
        num_hidden_layers=config.num_hidden_layers,
        dropout=config.dropout,
        feature_dim=config.feature_dim,
        latency_reference_ms=expected.reference_ms,
        latency_ms=[float(ms) if np.isfinite(ms) else None for ms in expected.latency_ms],
        bounds_ms=[float(ms) if np.isfinite(ms) else None for ms in guard.bounds_ms],
        default_price=config.plan.default_price,
    )
    if not np.isfinite(expected.accuracy).any():
        raise DataError("no accuracy was measured on the training samples; profile it (exp5) and prepare again")
    controller.start_from(expected.accuracy.tolist())
    return controller

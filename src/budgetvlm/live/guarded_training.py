"""Training of a controller together with the guard that bounds latencies at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetvlm.controller import training
from budgetvlm.controller.training import TrainingResult
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.table import ProfileTable


def train(
    table: ProfileTable, features: Features, config: TrainingConfig, output_dir: str | Path, **how: Any
) -> TrainingResult:
    """Train as `budgetvlm.controller.training.train` does, and write a guard beside the controller.

    Args:
        how: members, resume, overwrite, say and progress, as there.
    """
    return training.train(table, features, config, output_dir, fit_guard=AdaptiveGuard.fit, **how)

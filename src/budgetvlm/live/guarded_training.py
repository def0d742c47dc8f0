"""Training of a controller together with what is used at run time: a guard, and the price for each mean budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from budgetvlm._io import time_text
from budgetvlm.controller import training
from budgetvlm.controller.checkpoint import set_default_price
from budgetvlm.controller.price_sweep import price_curve_of
from budgetvlm.controller.training import Say, TrainingResult
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.spending import require_mean_budget
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.unmeasured import with_predictions
from budgetvlm.table import ProfileTable


def train(
    table: ProfileTable,
    features: Features,
    config: TrainingConfig,
    output_dir: str | Path,
    *,
    mean_budget_ms: float | None = None,
    say: Say = tqdm.write,
    **how: Any,
) -> TrainingResult:
    """Train as `budgetvlm.controller.training.train` does, and write a guard and a price curve beside the controller.

    Args:
        mean_budget_ms: the controller's default price becomes the one at which requests take this on average.
        how: members, resume, overwrite and progress, as there.

    Raises:
        ConfigError: a mean budget below what the cheapest setting takes.
    """
    table = training.with_splits(table, config)
    expected = with_predictions(table, features)
    if mean_budget_ms is not None:
        means = SettingMeans.fit(expected.subset("train"))
        require_mean_budget(mean_budget_ms, means.latency_ms[means.measured].min())
    result = training.train(table, features, config, output_dir, say=say, fit_guard=AdaptiveGuard.fit, **how)
    curve = price_curve_of(result.controller, expected, features)
    curve.save(result.output_dir)
    if mean_budget_ms is not None:
        solved = curve.solve(mean_budget_ms)
        set_default_price(result.controller, solved.price, result.output_dir)
        beyond = "" if mean_budget_ms <= curve.most_ms else ", more than any price makes use of"
        say(f"mean budget of {time_text(mean_budget_ms)}{beyond}: {solved}; it is the controller's default price now")
    return result

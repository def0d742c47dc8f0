"""Plain sentences about results that are of no use, so that nobody has to see it in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from budgetvlm.controller.network import GRPOController
    from budgetvlm.evaluation.records import EvaluationReport
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable

NOTHING_SCORES = (
    "every answer at every setting scores 0, so there is nothing to choose between: look at the answers in the "
    "accuracy results (pred beside answers), the metric, the prompt and max_new_tokens"
)
NO_PROMISE = "nothing is promised about late answers; `budgetvlm calibrate` fits it to this machine"
UNCALIBRATED = f"the guard was never calibrated, so {NO_PROMISE}"
NO_GUARD = f"no guard lies beside this controller: fixed bounds stand in for it, and {NO_PROMISE}"


def useless_accuracies(accuracy: np.ndarray) -> str | None:
    """Return what is wrong with accuracies ``[S, K]`` from which nothing can be learnt; None if nothing is."""
    import numpy as np

    known = accuracy[np.isfinite(accuracy)]
    if not known.size or known.max() == 0:
        return NOTHING_SCORES
    if np.all(np.nanmax(accuracy, axis=1) - np.nanmin(accuracy, axis=1) < 1e-9):
        return (
            "each sample scores the same at all settings, so the cheapest setting is the best one and there is nothing "
            "to learn"
        )
    return None


def one_choice(settings: Iterable[Mapping[str, Any]], cheapest: Mapping[str, Any]) -> str | None:
    """Return a sentence where a controller always chose the same setting, whatever the input and the budget."""
    different = {tuple(setting.items()) for setting in settings}
    if len(different) != 1:
        return None
    chosen = dict(different.pop())
    is_cheapest = chosen == dict(cheapest)
    which = "the cheapest setting" if is_cheapest else "the same setting"
    hint = "look whether a higher setting is any better" if is_cheapest else "give features that tell more of a request"
    words = ", ".join(f"{name}={value:g}" for name, value in chosen.items())
    return (
        f"the controller always takes {which} ({words}), whatever the input and the budget, so it is worth no more "
        f"than that setting: profile more samples, or {hint}"
    )


def choices_on_validation(controller: GRPOController, table: ProfileTable, features: Features) -> str | None:
    """Return what `one_choice` says of the validation samples at the budgets that training validates.

    A price above the usual one, as a mean budget may want, is no fault of the controller's: it is asked at the usual.
    """
    import numpy as np
    import torch

    from budgetvlm.controller.training_options import StatePlan
    from budgetvlm.controller.validation import choose
    from budgetvlm.policies.budget_grid import BUDGET_SHARES, grid_with_choice

    rows = table.rows_of("validation")
    own = features.aligned(table.sample_ids)
    image, language = torch.from_numpy(own.image[rows]), torch.from_numpy(own.language[rows])
    encoded, bounds = controller.encode(image, language), controller.bounds_of(image, language)
    reference_ms, price = controller.latency_reference_ms.item(), controller.default_price.item()
    price = min(price, StatePlan.default_price)
    shares = grid_with_choice(BUDGET_SHARES, np.atleast_2d(bounds.numpy()), reference_ms)
    chosen = [choose(controller, encoded, share * reference_ms, price, bounds) for share in shares]
    space = controller.knob_space
    return one_choice((space.settings[k] for k in np.unique(chosen)), space.cheapest)


def verdict_of(report: EvaluationReport, table: ProfileTable) -> list[str]:
    """Return what is to be said of an evaluation of a controller."""
    found = [report.guard.get("why"), useless_accuracies(table.subset(report.split).accuracy)]
    first = report.policies[0]
    if first.role == "controller":
        chosen = [share.setting for at in first.at_budget for share in at.settings]
        found.append(one_choice(chosen, table.knob_space.cheapest))
    return [sentence for sentence in found if sentence]

"""What would be chosen for a request at any budget, without answering it: what the playground's slider shows.

Shapes: K settings, B budgets. Times in ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from budgetvlm import decide
from budgetvlm.answer import AMPLE_MS
from budgetvlm.guard.bounds import Spent
from budgetvlm.runtime import AdaptiveVLM

NUM_BUDGETS = 40
LESS, MORE = 0.8, 1.2  # of a budget: what a fifth less or more time would change


def preview(model: AdaptiveVLM, image: Image.Image, question: str, price: float | None = None) -> dict[str, Any]:
    """Decide a request at a grid of budgets, from half the fastest setting's bound to twice the slowest one's.

    Args:
        price: see `AdaptiveVLM.generate`.

    Returns:
        "knobs": names and values, whose settings are numbered in row-major order; "budgets_ms" ``[B]``;
        "expected_ms" ``[K]``, null where a setting may not be chosen; and at each budget "allowed": numbers of the
        settings whose bounds keep it, "values": what the controller expects of each setting ``[B, K]``, as a share of
        right answers less what its time costs, "choice": the setting that is taken (the fastest where none is
        allowed), "less" and "more": that at 80% and 120% of the budget.
    """
    overview, request = model.vlm.encode_overview(image), model.request(image, question)
    overview_ms = overview.preprocess_ms + overview.vision_ms
    spent = Spent(overview_ms, overview_ms, overview.preprocess_ms)

    def decision(budget_ms: float) -> decide.Decision:
        asked = request, overview.feature, budget_ms, spent, model.known, price
        return decide.choose(model.guard, model.network, *asked)

    ample = decision(AMPLE_MS).bounds
    budgets_ms = _grid(ample.bounds_ms, ample.predicted_ms)
    made = [decision(budget_ms) for budget_ms in budgets_ms]
    pairs = list(zip(made, budgets_ms, strict=True))
    return {
        "knobs": [{"name": name, "values": list(values)} for name, values in model.guard.knob_space.knobs],
        "budgets_ms": budgets_ms,
        "expected_ms": [round(ms, 2) if np.isfinite(ms) else None for ms in ample.predicted_ms.tolist()],
        "allowed": [np.flatnonzero(one.bounds.allowed(budget_ms)).tolist() for one, budget_ms in pairs],
        "values": [one.values.astype(float).round(4).tolist() for one in made],
        "choice": [one.settled(budget_ms) for one, budget_ms in pairs],
        "less": [decision(LESS * budget_ms).settled(budget_ms) for budget_ms in budgets_ms],
        "more": [decision(MORE * budget_ms).settled(budget_ms) for budget_ms in budgets_ms],
    }


def _grid(bounds_ms: np.ndarray, predicted_ms: np.ndarray) -> list[float]:
    """Budgets on a logarithmic scale, rounded to three digits; predicted times serve where no bounds are known."""
    times = np.where(bounds_ms > 0, bounds_ms, predicted_ms)
    known = times[np.isfinite(times) & (times > 0)]
    grid = np.geomspace(known.min() / 2, 2 * known.max(), NUM_BUDGETS)
    return [float(f"{ms:.3g}") for ms in grid]

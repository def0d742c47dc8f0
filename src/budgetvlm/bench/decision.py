"""A decision: features in hand to setting out, the guard's bounds included, beside the PyTorch network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from budgetvlm.adaptive import Request, Spent
from budgetvlm.bench.figures import Figure, percentile, times_us
from budgetvlm.bench.material import Material, threads

P50_US, P99_US = 50.0, 200.0


def measure(material: Material) -> list[Figure]:
    """Both ways take turns, on states that all differ, on one core."""
    rounds, count = (3, 300) if material.options.quick else (7, 2000)
    quick, eager = _decisions(material, count)
    with threads(1):
        pairs = [(times_us(quick), times_us(eager[: count // 5])) for _ in range(rounds + 1)][1:]
    ours, theirs = zip(*pairs, strict=True)
    p50, p99 = ([percentile(times, share) for times in ours] for share in (0.5, 0.99))
    network = [percentile(times, 0.5) for times in theirs]
    return [
        Figure.of("decision, guard included: p50", "us", p50, at_most=P50_US),
        Figure.of("decision, guard included: p99", "us", p99, at_most=P99_US),
        Figure.of("the same decision by the PyTorch network: p50", "us", network),
    ]


def _decisions(material: Material, count: int) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """The same decisions made by both ways."""
    system = material.system
    controller, decider, guard = system.controller, system.decider, system.guard
    assert guard is not None
    rng = np.random.default_rng(material.options.seed)
    _, features = material.profile
    sizes = _sizes(material)
    quick, eager = [], []
    for _ in range(count):
        image, language = features.image[row := rng.integers(len(features))].copy(), features.language[row].copy()
        request = Request(sizes[rng.integers(len(sizes))], float(rng.integers(8, 20)), language)
        budget_ms = float(rng.uniform(0.4, 1.2) * controller.latency_reference_ms)
        spent = Spent(0.05 * budget_ms, 0.04 * budget_ms)

        def decide(request: Request, image: np.ndarray, budget_ms: float, spent: Spent) -> int:
            bounds = guard.bounds(request, budget_ms, spent)
            seen_ms = system.seen_budget_ms(bounds, budget_ms)
            return decider.choose(image, request.feature, seen_ms, None, bounds.allowed(budget_ms))

        @torch.inference_mode()
        def by_network(request: Request, image: np.ndarray, budget_ms: float, spent: Spent) -> int:
            bounds = guard.bounds(request, budget_ms, spent)
            seen_ms = system.seen_budget_ms(bounds, budget_ms)
            logits = controller(torch.from_numpy(image), torch.from_numpy(request.feature), seen_ms)
            allowed = torch.from_numpy(bounds.allowed(budget_ms))[None]
            chosen = controller.sample_actions(logits, deterministic=True, feasible=allowed)["setting_index"]
            return int(chosen)

        quick.append(partial(decide, request, image, budget_ms, spent))
        eager.append(partial(by_network, request, image, budget_ms, spent))
    return quick, eager


def _sizes(material: Material) -> np.ndarray:
    """Visual tokens of some requests, float64 ``[n, K]``; those of the model's images where the table has none."""
    tokens = material.profile[0].tokens.get("vision")
    if tokens is not None:
        return tokens[:500].astype(np.float64)
    return np.stack([material.vlm.prompt_size(s.load_image(), s.question)[0] for s in material.samples(20)])

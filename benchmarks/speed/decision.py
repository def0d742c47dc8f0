"""A decision: features in hand to setting out, the guard's bounds included, beside the PyTorch network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.speed.bench_data import Material
from benchmarks.speed.figures import Figure, percentile, times_us
from budgetvlm import decide
from budgetvlm._threads import torch_threads
from budgetvlm.guard.bounds import Request, Spent
from budgetvlm.guard.specification import best_allowed
from budgetvlm.runtime import AdaptiveVLM

P50_US, P99_US = 100.0, 300.0
FULL, QUICK = (7, 2000), (3, 300)  # rounds, decisions
LANGUAGE_TOKENS = 8, 20  # of made-up requests, from and to below


def measure(material: Material) -> list[Figure]:
    """Both ways take turns, on states that all differ, on one core."""
    rounds, count = QUICK if material.options.quick else FULL
    quick, eager = decisions(material, count)
    with torch_threads(1):
        pairs = [(times_us(quick), times_us(eager[: count // 5])) for _ in range(rounds + 1)][1:]
    ours, theirs = zip(*pairs, strict=True)
    p50, p99 = ([percentile(times, share) for times in ours] for share in (0.5, 0.99))
    network = [percentile(times, 0.5) for times in theirs]
    return [
        Figure.of("decision, guard included: p50", "us", p50, at_most=P50_US),
        Figure.of("decision, guard included: p99", "us", p99, at_most=P99_US),
        Figure.of("the same decision by the PyTorch network: p50", "us", network),
        Figure.of("times faster", "x", [b / a for a, b in zip(p50, network, strict=True)]),
    ]


def decisions(material: Material, count: int) -> tuple[list[Callable[[], int]], list[Callable[[], int]]]:
    """The same decisions as a request takes them, and with the network in the decider's place."""
    system = material.system
    rng = np.random.default_rng(material.options.seed)
    _, features = material.profile
    rows = _sizes(material)
    asked = []
    for _ in range(count):
        image, language = features.image[row := rng.integers(len(features))].copy(), features.language[row].copy()
        request = Request(rows[rng.integers(len(rows))], float(rng.integers(*LANGUAGE_TOKENS)), language)
        budget_ms = float(rng.uniform(0.4, 1.2) * system.controller.latency_reference_ms)
        asked.append((request, image, budget_ms, Spent(0.05 * budget_ms, 0.04 * budget_ms)))
    return [partial(_decide, system, *one) for one in asked], [partial(_decide_eagerly, system, *one) for one in asked]


def _decide(system: AdaptiveVLM, request: Request, image: np.ndarray, budget_ms: float, spent: Spent) -> int:
    return decide.choose(system.guard, system.network, request, image, budget_ms, spent, system.known).settled(
        budget_ms
    )


@torch.inference_mode()
def _decide_eagerly(system: AdaptiveVLM, request: Request, image: np.ndarray, budget_ms: float, spent: Spent) -> int:
    """By the network itself."""
    guard, controller = system.guard, system.controller
    bounds = guard.bounds_at_choice(request, budget_ms, spent, system.known)
    seen_ms = decide.seen_budget_ms(budget_ms, guard.own_ms, bounds.slowdown)
    states = torch.from_numpy(image), torch.from_numpy(request.feature), seen_ms
    values = (controller.setting_logits(controller(*states))[0] / controller.logit_scale).numpy()
    best = int(best_allowed(values, bounds.bounds_ms, budget_ms))
    return decide.Decision(bounds, values, best).settled(budget_ms)


def _sizes(material: Material) -> np.ndarray:
    """Visual tokens of some requests, float64 ``[n, K]``; those of the model's images where the table has none."""
    tokens = material.profile[0].tokens.get("vision")
    if tokens is not None:
        return tokens[:500].astype(np.float64)
    return np.stack([material.vlm.prompt_size(s.load_image(), s.question)[0] for s in material.samples(20)])

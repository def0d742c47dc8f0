"""What features, controller and guard cost in a real request, beside the model's own time."""

from __future__ import annotations

import statistics

from budgetvlm.bench.figures import Figure, percentile, timed_s, times_us
from budgetvlm.bench.material import Material
from budgetvlm.profiling.latency import request
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import Sample

MOST_SHARE, MOST_SHARE_OF_LARGE = 1.0, 0.1  # percent
LARGE_MS = 300.0  # a request of a model of ordinary size
CHANGE_US = 100.0


def measure(material: Material) -> list[Figure]:
    """Requests of the whole system and of the bare model at its cheapest setting take turns; no question comes twice.

    Caches are as cold as in service: between two decisions lies a run of the model.
    """
    rounds, count = (3, 12) if material.options.quick else (5, 40)
    samples = material.samples(rounds * count)
    size = max(1, len(samples) // rounds)
    system = material.system
    parts = [_round(system, samples[start : start + size]) for start in range(0, len(samples), size)]
    own, cheapest = zip(*parts, strict=True)
    change = [lambda: _change(system)] * (300 if material.options.quick else 2000)
    return [
        Figure.of("features, controller and guard, in a request", "ms", own),
        Figure.of("the model at its cheapest setting", "ms", cheapest),
        Figure.of(
            "their share of it", "%", [100 * a / b for a, b in zip(own, cheapest, strict=True)], at_most=MOST_SHARE
        ),
        Figure.of(
            f"their share of a {LARGE_MS:.0f} ms request", "%", [100 * a / LARGE_MS for a in own],
            at_most=MOST_SHARE_OF_LARGE,
        ),
        Figure.of(
            "applying and releasing a setting", "us", [percentile(times_us(change), 0.5) for _ in range(rounds)],
            at_most=CHANGE_US,
        ),
    ]  # fmt: skip


def _round(system: AdaptiveVLM, samples: list[Sample]) -> tuple[float, float]:
    """Medians in ms: of what the system adds to a request, and of the model's cheapest request."""
    cheapest, budget_ms = system.vlm.knob_space.cheapest, 0.6 * float(system.controller.latency_reference_ms)
    own, model = [], []
    for sample in samples:
        image, answers = sample.load_image(), []
        # What is learnt from a request is learnt when its answer is there already, but it is paid for all the same.
        whole_ms = 1e3 * timed_s(
            lambda image=image, sample=sample, answers=answers: answers.append(
                system.generate(image, sample.question, budget_ms=budget_ms)
            )
        )
        own.append(answers[0].controller_ms + whole_ms - answers[0].latency_ms)
        model.append(request(system.vlm, image, sample.question, cheapest, 16).total_ms)
    return statistics.median(own), statistics.median(model)


def _change(system: AdaptiveVLM) -> None:
    with system.vlm.apply(system.vlm.knob_space.cheapest):
        pass

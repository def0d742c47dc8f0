"""What features, controller and guard cost in a real request, beside the model's own time.

Only what is added counts: the question is tokenised before either side's clock starts, and the overview is a part of
the image that every setting encodes. What is added is what a request takes beside the model's own stages, less what the
bare model takes beside them, and what runs within them that the bare model lacks. Caches are as cold as in service,
because a run of the model lies between any two of these parts; warm, in a loop, they take a fifth (section "decision").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.speed.bench_data import Material
from benchmarks.speed.figures import Figure, percentile, times_us
from budgetvlm import decide
from budgetvlm.answer import Answer
from budgetvlm.profiling.measure.timed_requests import request
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import Sample
from budgetvlm.vlm import STAGES, adapter
from budgetvlm.vlm.decoding import Pace

MOST_SHARE, MOST_SHARE_OF_LARGE = 1.0, 0.1  # percent
LARGE_MS = 300.0  # a request of a model of ordinary size
CHANGE_US = 100.0
FULL, QUICK = (5, 40), (3, 12)  # rounds, requests
CHANGES = 1000
BUDGET_SHARE = 0.6  # of the full setting's time: most settings are allowed, and the image is usually cut into tiles
ALL, MODEL = "all that is added to a request", "the bare model at its cheapest setting"
OVERVIEW, REVISE = "  the overview's feature", "  they choose anew when the image is encoded"
CLOCK = "  watching the clock before each block and token"
REST = "  the rest: checks, a second pass over the image, the record"
PARTS = {  # by function
    "request": "  the question's feature, the prompt's size",
    "pool": OVERVIEW,
    "choose": "  guard and controller choose",
    "revise": REVISE,
    "reads": CLOCK,
    "has_read": CLOCK,
    "next": CLOCK,
    "update": "  the guard learns, when the answer is there",
}
APART = "encoding the overview apart, at the full setting"


def measure(material: Material) -> list[Figure]:
    """Requests of the whole system and of the bare model take turns; no question comes twice."""
    rounds, count = QUICK if material.options.quick else FULL
    samples = material.samples(rounds * count)
    size = max(1, len(samples) // rounds)
    system = material.system
    found = [_round(system, samples[start : start + size]) for start in range(0, len(samples) - size + 1, size)]
    names = (ALL, *dict.fromkeys(PARTS.values()), REST, MODEL, APART)
    own, model = ([one[name] for one in found] for name in (ALL, MODEL))
    change = [lambda: _change(system)] * CHANGES
    return [
        *(Figure.of(name, "ms", [one[name] for one in found]) for name in names),
        Figure.of(
            "what is added, of that request", "%", [100 * a / b for a, b in zip(own, model, strict=True)],
            at_most=MOST_SHARE,
        ),
        Figure.of(
            f"what is added, of a {LARGE_MS:.0f} ms request", "%", [100 * a / LARGE_MS for a in own],
            at_most=MOST_SHARE_OF_LARGE,
        ),
        Figure.of(
            "applying and releasing a setting", "us", [percentile(times_us(change), 0.5) for _ in found],
            at_most=CHANGE_US,
        ),
    ]  # fmt: skip


def _round(system: AdaptiveVLM, samples: list[Sample]) -> Mapping[str, float]:
    """Medians in ms, by name."""
    runs = [_compared(system, sample) for sample in samples]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _compared(system: AdaptiveVLM, sample: Sample) -> dict[str, float]:
    """One question: the bare model, the overview apart and with the rest, the whole system, as it is and in parts."""
    vlm, image, question = system.vlm, sample.load_image(), sample.question
    cheapest, full = vlm.knob_space.cheapest, vlm.knob_space.full
    vlm.prompt_size(image, question)  # tokenises it
    one_pass = vlm.generate(image, question, full, max_new_tokens=1).stages_ms
    apart = request(vlm, image, question, full, 1).stages_ms
    bare, bare_beside_ms = _beside_stages(lambda: vlm.generate(image, question, cheapest))
    budget_ms = BUDGET_SHARE * float(system.controller.latency_reference_ms)
    _, beside_ms = _beside_stages(lambda: system.generate(image, question, budget_ms=budget_ms))
    parts = _parts(system, lambda: system.generate(image, question, budget_ms=budget_ms))
    all_ms = beside_ms - bare_beside_ms + parts[OVERVIEW] + parts[CLOCK]
    return {
        ALL: all_ms,
        **parts,
        REST: all_ms - sum(parts.values()),
        MODEL: bare.total_ms,
        APART: sum(apart[stage] - one_pass[stage] for stage in ("preprocess", "vision")),
    }


def _beside_stages(answer: Callable[[], Any]) -> tuple[Any, float]:
    """What ``answer`` returns, and the ms that it took beside the model's stages."""
    start = time.perf_counter()
    made = answer()
    took_ms = 1e3 * (time.perf_counter() - start)
    return made, took_ms - sum(made.stages_ms[stage] for stage in STAGES)


def _parts(system: AdaptiveVLM, answer: Callable[[], Answer]) -> dict[str, float]:
    """What each of `PARTS` takes of one request, in ms."""
    took = dict.fromkeys(PARTS.values(), 0.0)
    watched: dict[Any, tuple[str, ...]] = {
        system: ("request",), decide: ("choose",), system.guard: ("update",), adapter: ("pool",),
        Pace: ("reads", "has_read", "next"),
    }  # fmt: skip
    with ExitStack() as stack:
        for owner, names in watched.items():
            stack.enter_context(_timed(owner, took, *names))
        controller_ms = answer().controller_ms
    took[REVISE] = controller_ms - took[PARTS["request"]] - took[PARTS["choose"]]
    return took


@contextmanager
def _timed(owner: Any, took: dict[str, float], *names: str) -> Iterator[None]:
    """Adds the milliseconds in these functions of an object, class or module, in the ``with`` block, to ``took``."""

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            took[PARTS[name]] += 1e3 * (time.perf_counter() - start)
            return result

        return call

    own = {name: vars(owner)[name] for name in names if name in vars(owner)}
    try:
        for name in names:
            setattr(owner, name, watched(name))
        yield
    finally:
        for name in names:
            setattr(owner, name, own[name]) if name in own else delattr(owner, name)


def _change(system: AdaptiveVLM) -> None:
    with system.vlm.apply(system.vlm.knob_space.cheapest):
        pass

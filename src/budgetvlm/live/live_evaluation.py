"""Evaluation on the clock: the whole system answers held-out questions, and every budget is checked on the real clock.

Two systems take turns on each request, in random order: one with its guard, one without (a setting is allowed if it is
expected to keep the budget on average, no answer is cut, and nothing is learnt). Budgets are drawn at random from a
grid, samples come in random order. Busy processes may run beside it in the middle third, to see what the guard does
about them.

Shapes: R requests. Times in ms.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from budgetvlm._threads import side_by_side
from budgetvlm.answer import Answer
from budgetvlm.decide import Cut
from budgetvlm.evaluation.evaluation_options import BUDGET_SHARES
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.rule import UNGUARDED
from budgetvlm.live.calibration import Measured
from budgetvlm.live.replay import replay
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import Sample, Task
from budgetvlm.vlm.protocol import fresh_images, require_side_by_side

System = Literal["guarded", "unguarded"]
Phase = Literal["before", "loaded", "after"]
LEAST_GROUP = 200  # requests that a group needs to be judged alone
STARTING_S = 60.0  # that a busy process may take to start


@dataclass(frozen=True)
class LiveRecord:
    """One request: what was asked for and what came of it.

    Attributes:
        number: place in the run. phase: whether busy processes ran beside it.
        hurried: tokens that were made at a quicker setting.
        groups: labels of the sample, and "image tokens", the most visual tokens that its image can get.
    """

    system: System
    number: int
    phase: Phase
    sample_id: str
    groups: dict[str, str]
    budget_share: float
    budget_ms: float
    latency_ms: float
    controller_ms: float
    promised: bool
    violated: bool
    accuracy: float
    finish_reason: str
    setting: dict[str, Any]
    hurried: int = 0


def run_live(
    guarded: AdaptiveVLM,
    task: Task,
    samples: Sequence[Sample],
    *,
    num_requests: int,
    reference_ms: float,
    load: int = 0,
    cut: Cut = "always",
    seed: int = 0,
    progress: bool = True,
    concurrency: int = 1,
) -> list[LiveRecord]:
    """Answer requests with both systems.

    Args:
        guarded: its guard learns on.
        samples: drawn from at random, without replacement while they last.
        num_requests: of each system.
        reference_ms: the full setting's time on this machine; budgets are `BUDGET_SHARES` of it.
        load: busy processes beside the middle third.
        cut: see `AdaptiveVLM.generate`.
        concurrency: requests in flight, where the model is served elsewhere. No cache of an engine knows their images.

    Raises ConfigError: the model answers one request at a time.
    """
    require_side_by_side(guarded.vlm, concurrency)
    assert isinstance(guarded.guard, AdaptiveGuard)
    rng = np.random.default_rng(seed)
    unguarded = guarded.guard.copy().replaced(rule=UNGUARDED)
    systems: dict[System, AdaptiveVLM] = {
        "guarded": guarded,
        "unguarded": AdaptiveVLM(guarded.vlm, guarded.controller, unguarded),
    }
    order = np.concatenate([rng.permutation(len(samples)) for _ in range(-(-num_requests // len(samples)))])
    drawn = [
        (float(rng.choice(np.asarray(BUDGET_SHARES))), rng.permutation(list(systems))) for _ in range(num_requests)
    ]

    def ask(number: int) -> list[LiveRecord]:
        """Ask all systems about one sample, one after the other."""
        phase = _phase(number, num_requests, load)
        (busy.set if phase == "loaded" else busy.clear)()
        sample, (share, names) = samples[order[number]], drawn[number]
        image, found = sample.load_image(), []
        groups = {**sample.groups, "image tokens": str(int(guarded.request(image, sample.question).vision.max()))}
        for name in names:
            answer = systems[name].generate(
                image, sample.question, budget_ms=share * reference_ms, max_new_tokens=task.max_new_tokens, cut=cut
            )
            accuracy = task.score(answer.answer, sample)
            asked = {"system": name, "number": number, "phase": phase, "sample_id": sample.sample_id}
            found.append(_record(answer, accuracy, **asked, groups=groups, budget_share=share))
        return found

    with busy_processes(load) as busy, fresh_images(guarded.vlm):
        made = side_by_side(ask, range(num_requests), concurrency)
        records = dict(tqdm(made, total=num_requests, desc="live", unit="request", disable=not progress))
    return [record for number in range(num_requests) for record in records[number]]


def _record(answer: Answer, accuracy: float, **asked: Any) -> LiveRecord:
    """The record of an answer and of what was asked, the first six fields of `LiveRecord`."""
    return LiveRecord(
        **asked,
        budget_ms=answer.budget_ms,
        latency_ms=answer.latency_ms,
        controller_ms=answer.controller_ms,
        promised=answer.feasible,
        violated=not answer.budget_met,
        accuracy=accuracy,
        finish_reason=answer.finish_reason,
        setting=dict(answer.setting),
        hurried=answer.num_hurried_tokens,
    )


def _phase(number: int, total: int, load: int) -> Phase:
    if not load or number < total // 3:
        return "before"
    return "loaded" if number < 2 * total // 3 else "after"


@contextmanager
def busy_processes(count: int) -> Iterator[Event]:
    """Start processes that are busy while the event that is yielded is set; none is left behind."""
    context = multiprocessing.get_context("spawn")
    on, ready = context.Event(), context.Semaphore(0)
    processes = [context.Process(target=_spin, args=(on, ready), daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        for _ in processes:  # starting is a load of its own
            ready.acquire(timeout=STARTING_S)
        yield on
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _spin(on: Any, ready: Any) -> None:
    """While it is on, and not longer than the process that started it: that may have been killed."""
    ready.release()
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        if on.wait(timeout=1.0):
            for _ in range(100_000):
                pass


def price_of_guarantee(
    model: AdaptiveVLM,
    task: Task,
    measured: Measured,
    reference_ms: float,
    budget_shares: Sequence[float] = BUDGET_SHARES,
    cut: Cut = "always",
) -> dict[str, float]:
    """What not knowing the future costs: accuracy by the guard's bounds and by the times that were then measured.

    Both choose by the same controller; where nothing is allowed both take the setting that the guard thinks fastest.
    The guard goes on learning (`budgetvlm.live.replay`).
    """
    found = replay(
        model,
        task,
        measured,
        reference_ms=reference_ms,
        budget_shares=budget_shares,
        num_requests=len(measured) * len(budget_shares),
        cut=cut,
    )
    fields = {"guard": "accuracy", "true latencies": "true_accuracy"} | {n: n for n in ("late", "cut", "hurried")}
    means = {name: float(np.mean([getattr(r, field) for r in found])) for name, field in fields.items()}
    return {"requests": len(measured), **means}


def summary(records: Sequence[LiveRecord], alpha: float) -> dict[str, Any]:
    """Violations with binomial intervals, accuracy and use of the budget; for both systems, JSON-able.

    A violation is a request over its budget although a setting was expected to keep it. Requests for which none was
    are counted as "infeasible", and whether they were over is told apart.
    """
    by_system = {name: [r for r in records if r.system == name] for name in dict.fromkeys(r.system for r in records)}
    return {
        "alpha": alpha,
        "requests": sum(r.system == "guarded" for r in records),
        "systems": {name: _system(own) for name, own in by_system.items()},
    }


def _system(records: Sequence[LiveRecord]) -> dict[str, Any]:
    """The figures of one system: of all requests, by budget, phase and group, and of each hundred in a row."""
    labels = sorted({name for r in records for name in r.groups} - {"image_id", "split"})

    def by_label(label: str) -> dict[str, Any]:
        return _by(records, lambda r: r.groups.get(label, ""))

    by_group = {label: by_label(label) for label in labels}
    large = [
        {"label": label, "name": name, **figures}
        for label, groups in by_group.items()
        for name, figures in groups.items()
        if figures["requests"] >= LEAST_GROUP
    ]
    return {
        "all": _figures(records),
        "by_budget": _by(records, lambda r: f"{r.budget_share:g}"),
        "by_phase": _by(records, lambda r: r.phase),
        "by_group": by_group,
        "worst_group": max(large, key=lambda group: group["violation_rate"], default=None),
        "stretches": [_figures(records[i : i + 100]) for i in range(0, len(records), 100)],
    }


def _by(records: Sequence[LiveRecord], key: Callable[[LiveRecord], str]) -> dict[str, Any]:
    return {name: _figures([r for r in records if key(r) == name]) for name in sorted(set(map(key, records)))}


def _figures(records: Sequence[LiveRecord]) -> dict[str, Any]:
    """The figures of some requests."""
    violations = sum(r.violated and r.promised for r in records)
    interval = binomtest(violations, len(records)).proportion_ci(method="wilson")
    promised = [r for r in records if r.promised]
    used = [r.latency_ms / r.budget_ms for r in promised]
    return {
        "requests": len(records),
        "violations": violations,
        "violation_rate": violations / len(records),
        "interval": [float(interval.low), float(interval.high)],
        "infeasible": len(records) - len(promised),
        "infeasible_over": sum(r.violated and not r.promised for r in records),
        "cut": sum(r.finish_reason == "budget" for r in records),
        "hurried": sum(r.hurried > 0 for r in records),
        "accuracy": float(np.mean([r.accuracy for r in records])),
        "latency_ms": float(np.mean([r.latency_ms for r in records])),
        "used_median": float(np.median(used)) if used else None,
        "controller_ms": float(np.median([r.controller_ms for r in records])),
    }

"""Calibrating a guard on the machine that it is to work on: measure a few requests, refit scales and bounds.

The controller is not trained again: it sees budgets as they would be on the machine that was profiled. Each request is
measured once at every setting, in random order, as single requests are: the median of repeats would hide the tail that
the promise is about. A part of the requests gives the stages' scales; the rest, which neither these nor the controller
nor the latency model have seen, gives the factor, with the controller's choice in the loop (`guard.conformal`).

Shapes: n requests, K settings, P budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from tqdm import tqdm

from budgetvlm._threads import side_by_side
from budgetvlm.errors import DataError
from budgetvlm.evaluation.evaluation_options import BUDGET_SHARES
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.bounds import MOMENTS, Bounds, Moment, Request, Spent
from budgetvlm.guard.conformal import FACTORS, Calls, Revising, choose_factor, losses, samples_needed
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.recourse import SameImage
from budgetvlm.guard.rule import Rule
from budgetvlm.guard.speed import StageSpeed
from budgetvlm.guard.state import IMAGE_STAGES
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import Sample, Task
from budgetvlm.vlm import STAGES, Deadline
from budgetvlm.vlm.protocol import RecordingClock, fresh_images, require_side_by_side

SCALE_SHARE = 1 / 3  # of the requests, for the scales
LEAST_FOR_SCALES = 5


@dataclass(frozen=True, eq=False)
class Measured:
    """Requests measured at every setting, the model's part of them.

    Attributes:
        samples: what was asked. requests: their sizes. image: features ``[n, Di]``.
        order: numbers of the settings in the order in which they were run, int64 ``[n, K]``.
        accuracy, output, latency_ms, overview_ms: of the answers, their tokens, their time and the overview's share
            of it, ``[n, K]`` each. prepared_ms: of that, preparing it. stages_ms: the time by stage.
        steps_ms: of prefill and decode what each block that read and each further token took, for each request and
            setting ``[blocks + tokens - 1]``; None: as long as any other.
    """

    samples: tuple[Sample, ...]
    requests: tuple[Request, ...]
    image: np.ndarray
    order: np.ndarray
    accuracy: np.ndarray
    output: np.ndarray
    latency_ms: np.ndarray
    overview_ms: np.ndarray
    prepared_ms: np.ndarray
    stages_ms: dict[str, np.ndarray]
    steps_ms: tuple[tuple[np.ndarray, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def image_ms(self) -> np.ndarray:
        """What preprocessing and encoding the image took, the overview included, ``[n, K]``."""
        out: np.ndarray = sum((self.stages_ms[stage] for stage in IMAGE_STAGES), np.zeros(self.latency_ms.shape))
        return out


def requests_needed(alpha: float) -> int:
    """The fewest requests that calibrate a guard for this alpha. Raises ConfigError."""
    rest = samples_needed(alpha)
    total = rest + max(LEAST_FOR_SCALES, int(rest * SCALE_SHARE / (1 - SCALE_SHARE)))
    return total + (total - for_scales(total) < rest)


def measure(
    model: AdaptiveVLM, task: Task, samples: Sequence[Sample], seed: int = 0, progress: bool = True,
    concurrency: int = 1,
) -> Measured:  # fmt: skip
    """Answer each sample once at every setting that may be chosen, in an order drawn anew each time.

    ``concurrency``: samples that are asked side by side. Raises ConfigError: the model answers one at a time.
    """
    require_side_by_side(model.vlm, concurrency)
    rng, shape = np.random.default_rng(seed), (len(samples), len(model.settings))
    order = np.stack([rng.permutation(shape[1]) for _ in samples])
    accuracy, output, latency, overviews, prepared = (np.zeros(shape) for _ in range(5))
    stages = {stage: np.zeros(shape) for stage in STAGES}
    steps = [[np.empty(0)] * shape[1] for _ in samples]

    def ask(row: int) -> tuple[Request, np.ndarray]:
        """Fill a row of the arrays; returns what is known of the request, and the image's feature."""
        sample, image = samples[row], samples[row].load_image()
        for k in order[row][model.known[order[row]]]:
            clock = RecordingClock()
            overview = model.vlm.encode_overview(image)
            answer = model.vlm.generate(
                image, sample.question, model.settings[k],
                max_new_tokens=task.max_new_tokens, overview=overview, deadline=Deadline.never(clock.read),
            )  # fmt: skip
            steps[row][k] = np.diff(clock.readings) * 1e3
            if overview.vision_ms:  # features alone do not tell how fast the model is
                prepared[row, k] = overview.preprocess_ms
                overviews[row, k] = prepared[row, k] + overview.vision_ms
            accuracy[row, k] = task.score(answer.text, sample)
            output[row, k], latency[row, k] = answer.num_output_tokens, answer.total_ms
            for stage, ms in answer.stages_ms.items():
                stages[stage][row, k] = ms
        return model.request(image, sample.question), overview.feature

    asked: dict[int, tuple[Request, np.ndarray]] = {}
    bar = tqdm(total=len(samples), desc="all settings", unit="request", disable=not progress)
    with fresh_images(model.vlm), bar:
        for row, known in side_by_side(ask, range(len(samples)), concurrency):
            asked[row] = known
            bar.update()
    requests, images = zip(*(asked[row] for row in range(len(samples))), strict=True)
    return Measured(
        tuple(samples), requests, np.stack(images), order, accuracy, output, latency, overviews, prepared,
        stages, tuple(map(tuple, steps)) if model.vlm.can_revise else None,
    )  # fmt: skip


def typical(runs: Sequence[Measured]) -> Measured:
    """The same requests measured several times, as one: what a stage takes is the median of its repeats."""

    def medians(times: Sequence[np.ndarray]) -> np.ndarray:
        out: np.ndarray = np.median(np.stack(times), axis=0)
        return out

    stages = {name: medians([run.stages_ms[name] for run in runs]) for name in runs[0].stages_ms}
    return replace(
        runs[0],
        latency_ms=np.sum(list(stages.values()), axis=0),
        overview_ms=medians([run.overview_ms for run in runs]),
        prepared_ms=medians([run.prepared_ms for run in runs]),
        stages_ms=stages,
        steps_ms=None,
    )


def calibrated(
    model: AdaptiveVLM, guard: AdaptiveGuard, measured: Measured, alpha: float, *, hurries: bool = True
) -> AdaptiveGuard:
    """A guard for this machine.

    ``guard``: its latency model and lengths are kept, what it learnt is not. ``hurries``: see
    `budgetvlm.guard.rule.Rule`. Raises DataError: too few requests for this alpha.
    """
    needed = requests_needed(alpha)
    if len(measured) < needed:
        raise DataError(
            f"{len(measured)} requests cannot calibrate a violation rate of {alpha:g}: that takes {needed}. Give "
            f"--samples {needed} or more, or a larger --alpha."
        )
    # A part of the requests tells how fast the stages are here, and how far predictions scatter.
    count = for_scales(len(measured))
    rule = Rule(hurries=hurries).for_model(guard.rule.revises)
    speed = StageSpeed(guard.latency.stages, log_scales(guard, measured, range(count)))
    fresh = AdaptiveGuard(guard.latency, guard.lengths, Margin(alpha), speed, model.own_ms, rule=rule)
    scores = _predictions(fresh, measured, range(count)).scores(model.known)
    pairs = Margin.start(alpha, scores)
    # The others give the factor, with every choice made as it will be at run time.
    found = _predictions(fresh, measured, range(count, len(measured)))
    calls = calibration_calls(model, measured, found, pairs.image_factors(FACTORS))
    calls = calls if rule.revises else replace(calls, revising=None)
    loss = losses(calls, found.latency_ms - found.saved_ms, found.first_ms, pairs.cut_cost)
    margin = Margin.start(alpha, found.scores(model.known), math.log(choose_factor(loss, alpha)))
    speed = StageSpeed(speed.stages, speed.log_scale)
    return AdaptiveGuard(guard.latency, guard.lengths, margin, speed, model.own_ms, len(measured), rule)


def calibration_calls(model: AdaptiveVLM, measured: Measured, found: Predictions, image_factors: np.ndarray) -> Calls:
    """The requests as the procedure that is calibrated sees them, each at several budgets.

    Budgets are shares of the reference latency as the controller sees them (`decide.seen_budget_ms`), so that on a
    slower machine they are as tight as on the one that was profiled.
    """
    seen_ms = float(model.controller.latency_reference_ms) * np.array(BUDGET_SHARES)
    budgets_ms = seen_ms * found.slowdown[:, None] + found.own_ms

    def preferred(row: int, budget_ms: float) -> np.ndarray:
        return model.network.values(measured.image[row], measured.requests[row].feature, budget_ms, None)

    return Calls(
        values=np.stack([[preferred(row, budget) for budget in seen_ms] for row in found.rows]),
        budget_ms=budgets_ms,
        rest_ms=np.where(model.known, found.rest_ms, np.inf),
        spent_ms=found.overview_ms,
        saving_ms=found.saving_ms,
        longer_ms=found.longer_ms,
        revising=Revising(
            same_image=SameImage(model.controller.knob_space),
            answer_ms=found.answer_ms,
            spent_ms=found.image_ms,
            rest_ms=np.where(model.known, found.later_rest_ms, np.inf),
            factors=image_factors,
            saving_ms=found.later_saving_ms,
            longer_ms=found.later_longer_ms,
        ),
    )


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the guard predicts of each run, having seen those before it, and what it took, ``[n, K]`` if not named.

    Attributes:
        rows: which requests these are. own_ms: the controller's time beside the model, a number.
        slowdown: of each request's first run, ``[n]``.
        rest_ms: when the setting is chosen; of it answer_ms from the encoded image on. overview_ms: spent by then.
        later_rest_ms: when the image is encoded. image_ms: spent by then.
        saving_ms, later_saving_ms: what hurrying would save of the two rests.
        longer_ms, later_longer_ms: how much longer they are than with an answer of the expected length.
        latency_ms: what it took in all. first_ms: until the answer's first token, in a hurry.
        saved_ms: what hurrying once the image is encoded would have saved, by the stages' predicted times.
    """

    rows: range
    own_ms: float
    slowdown: np.ndarray
    rest_ms: np.ndarray
    answer_ms: np.ndarray
    overview_ms: np.ndarray
    later_rest_ms: np.ndarray
    image_ms: np.ndarray
    saving_ms: np.ndarray
    later_saving_ms: np.ndarray
    longer_ms: np.ndarray
    later_longer_ms: np.ndarray
    latency_ms: np.ndarray
    first_ms: np.ndarray
    saved_ms: np.ndarray

    def scores(self, known: np.ndarray) -> dict[Moment, np.ndarray]:
        """Of the settings that may be chosen (bool ``[K]``), in one row for each moment."""
        times = {
            "overview": (self.latency_ms - self.overview_ms) / self.rest_ms,
            "image": (self.latency_ms - self.image_ms) / self.later_rest_ms,
        }
        return {moment: np.log(times[moment][:, known]).ravel() for moment in MOMENTS}


def _predictions(guard: AdaptiveGuard, measured: Measured, rows: range) -> Predictions:
    """Of these rows, in the order in which they were run; the guard follows the machine's speed."""
    settings, own_ms = measured.latency_ms.shape[1], guard.own_ms
    names = [field.name for field in fields(Predictions)][3:]
    out = {name: np.zeros((len(rows), settings)) for name in names}
    slowdown = np.zeros(len(rows))
    for place, row in enumerate(rows):
        for number, k in enumerate(measured.order[row].tolist()):
            first, found = _predicted_run(guard, measured, row, k)
            for name, ms in found.items():
                out[name][place, k] = ms
            if number == 0:
                slowdown[place] = first.slowdown
            took_ms = guard.speed.by_stage({name: times[row, k] for name, times in measured.stages_ms.items()})
            guard.follow(first, k, took_ms, measured.output[row, k])
    return Predictions(rows, own_ms, slowdown, **out)


def _predicted_run(guard: AdaptiveGuard, measured: Measured, row: int, k: int) -> tuple[Bounds, dict[str, float]]:
    """The bounds when setting k of a row is chosen, and the numbers of `Predictions` about this run."""
    own_ms, all_settings = guard.own_ms, np.ones(measured.latency_ms.shape[1], dtype=bool)
    overview_ms, model_ms = float(measured.overview_ms[row, k]), float(measured.image_ms[row, k])
    total_ms = float(measured.latency_ms[row, k]) + own_ms
    spent = Spent(overview_ms, overview_ms, float(measured.prepared_ms[row, k]))
    first = guard.bounds_at_choice(measured.requests[row], math.inf, spent, all_settings)
    later = guard.bounds_at_revision(first, k, Spent(model_ms, model_ms), all_settings)
    stages = {name: float(times[row, k]) for name, times in measured.stages_ms.items()}
    hurried = (guard.faster_settings(k) or (k,))[-1]
    read_saved = stages["prefill"] * _share(later.read_ms, k, hurried)
    return first, {
        "overview_ms": overview_ms,
        "image_ms": model_ms + own_ms,
        "latency_ms": total_ms,
        "first_ms": total_ms - stages["decode"] - read_saved,
        "saved_ms": read_saved + stages["decode"] * _share(later.step_ms, k, hurried),
        **{name: getattr(first, name)[k] for name in ("rest_ms", "answer_ms", "saving_ms", "longer_ms")},
        **{f"later_{name}": getattr(later, name)[k] for name in ("rest_ms", "saving_ms", "longer_ms")},
    }


def _share(predicted_ms: np.ndarray, index: int, faster: int) -> float:
    """Which share of a setting's time a faster one would have saved."""
    return float(max(1 - predicted_ms[faster] / max(predicted_ms[index], 1e-9), 0.0))


def for_scales(count: int) -> int:
    """How many of this number of requests tell how fast the stages are; the rest gives the factor."""
    return max(LEAST_FOR_SCALES, int(count * SCALE_SHARE))


def log_scales(guard: AdaptiveGuard, measured: Measured, rows: range) -> np.ndarray:
    """Median log ratio of measured to predicted time of each stage, ``[stages]``."""
    ratios: list[list[float]] = [[] for _ in guard.latency.stages]
    for row in rows:
        size = measured.requests[row]
        for k in range(measured.latency_ms.shape[1]):
            predicted = guard.latency.stages_of(k, size.vision, size.language, measured.output[row, k])
            for g, stage in enumerate(guard.latency.stages):
                ms = measured.stages_ms[stage][row, k] if stage in measured.stages_ms else 0.0
                if ms > 0 and predicted[g] > 0:
                    ratios[g].append(float(np.log(ms / predicted[g])))
    return np.array([np.median(found) if found else 0.0 for found in ratios])

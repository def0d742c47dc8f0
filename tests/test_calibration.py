"""Calibration on a simulated machine: the procedure that is calibrated is the one that runs, and keeps its promise."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_adaptive import ALL, IMAGE, KNOWN, LATENCY, STAGES, TOKENS, asked, guard, network, requests, violation_rate
from test_latency import SPACE

from budgetvlm import decide
from budgetvlm.answer import cuts
from budgetvlm.errors import DataError
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.bounds import Bounds, Outcome, Spent
from budgetvlm.guard.conformal import FACTORS
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.recourse import SameImage
from budgetvlm.guard.rule import GUARDED, Rule
from budgetvlm.live.calibration import Measured, _predictions, calibrated, calibration_calls

OWN_MS = 0.5
REFERENCE_MS = float(np.median(sum(STAGES.values())[:, -1]))


def model(known=ALL):
    """What calibration reads of a model."""
    controller = SimpleNamespace(latency_reference_ms=REFERENCE_MS, knob_space=SPACE)
    return SimpleNamespace(own_ms=OWN_MS, known=known, controller=controller, network=network())


def measured(count, noise, seed=0, slow=1.0) -> Measured:
    """Requests of the simulated machine, each run at every setting; each run has its own noise."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(TOKENS["vision"]), count, replace=False)
    shape = (count, len(SPACE))
    factor = slow * np.exp(noise * rng.standard_t(4, shape))
    stages = {name: factor * times[rows] for name, times in STAGES.items()}
    prepared, encoded = (factor * STAGES[name][rows, :1] for name in ("preprocess", "vision"))
    images = np.tile(IMAGE, (count, 1)) * rng.normal(1, 0.3, (count, 1)).astype(np.float32)
    return Measured(
        samples=(None,) * count,
        requests=tuple(asked(row) for row in rows),
        image=images,
        order=np.stack([rng.permutation(shape[1]) for _ in range(count)]),
        accuracy=np.ones(shape),
        output=TOKENS["output"][rows].astype(float),
        latency_ms=np.sum(list(stages.values()), axis=0),
        overview_ms=prepared + encoded,
        prepared_ms=prepared,
        stages_ms=stages,
    )


def with_equal_images(runs: Measured) -> Measured:
    """An image takes as long to encode in all runs that show it."""
    stages = {name: times.copy() for name, times in runs.stages_ms.items()}
    for name in ("preprocess", "vision"):
        for members in SameImage(SPACE).members:
            stages[name][:, members] = stages[name][:, members[:1]]
    return replace(runs, stages_ms=stages, latency_ms=np.sum(list(stages.values()), axis=0))


@pytest.mark.parametrize("known", [ALL, KNOWN], ids=["all", "some"])
@pytest.mark.parametrize(("hurries", "revises"), [(True, True), (False, True), (False, False)])
def test_the_calibrated_procedure_is_the_one_that_runs(monkeypatch, known, hurries, revises):
    """Every choice that calibration counted at a factor is what a request decides with the margin of that factor."""
    monkeypatch.setattr(AdaptiveGuard, "follow", lambda *args: False)  # the machine is as fast in all runs
    here, runs = model(known), with_equal_images(measured(12, noise=0.0, slow=1.1))
    made = guard(hurries=hurries)
    made = made.replaced(rule=made.rule.for_model(revises))
    found = _predictions(made, runs, range(len(runs)))
    image_factors = FACTORS**0.8
    calls = calibration_calls(here, runs, found, image_factors)
    calls = calls if revises else replace(calls, revising=None)
    seen = set()
    for f in range(120, 300, 15):
        chosen, allowed = calls.chosen(f)
        scores = {"overview": [math.log(FACTORS[f])] * 100, "image": [math.log(image_factors[f])] * 100}
        at_factor = made.replaced(margin=Margin(0.05, scores))
        for row, place in np.ndindex(chosen.shape):
            budget_ms = float(calls.budget_ms[row, place])
            index = decided(here, at_factor, runs, row, budget_ms)
            assert index == (chosen[row, place] if allowed[row, place] else None), (f, row, place)
            seen.add(index)
    assert len(seen) >= 5 and None in seen


def decided(here, made, runs, row, budget_ms):
    """The setting that a request ends up with, as `AdaptiveVLM.generate` decides it; None: nothing was allowed."""
    overview_ms, prepared_ms = float(runs.overview_ms[row, 0]), float(runs.prepared_ms[row, 0])
    spent = Spent(overview_ms, overview_ms, prepared_ms)
    request, image = runs.requests[row], runs.image[row]
    first = decide.specified_choice(made, here.network, request, image, budget_ms, spent, here.known)
    if not first.feasible:
        return None
    if not made.rule.revises:
        return first.best
    image_ms = float(runs.image_ms[row, first.best])
    later = Spent(OWN_MS + image_ms, image_ms)
    return decide.specified_revision(made, first, first.best, budget_ms, later, here.known).settled(budget_ms)


@pytest.mark.parametrize(("alpha", "count"), [(0.05, 60), (0.2, 40)])
@pytest.mark.parametrize("slow", [1.0, 2.5])
def test_a_calibrated_guard_keeps_its_promise_from_the_first_request_on(alpha, count, slow):
    """Calibrated on another machine's profile, then two thousand requests on the simulated clock."""
    made = calibrated(model(), guard(), measured(count, noise=0.08, slow=slow), alpha)
    np.testing.assert_allclose(np.exp(made.speed.normal), slow, rtol=0.1)
    assert made.calibrated_on == count and made.own_ms == OWN_MS
    results = list(requests(made, lambda row: slow))
    assert violation_rate(results[:200]) <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / 200)
    assert violation_rate(results) <= 1.1 * alpha
    assert np.mean([promised for _, _, promised in results]) > 0.7


def test_a_guard_for_a_model_that_cannot_revise_is_calibrated_for_choices_that_stay():
    made = guard().replaced(rule=GUARDED.for_model(False))
    assert calibrated(model(), made, measured(30, noise=0.1), 0.05).rule == Rule(revises=False, hurries=False)


def test_too_few_requests_calibrate_nothing():
    with pytest.raises(DataError, match=r"20 requests cannot calibrate a violation rate of 0\.05: that takes 28"):
        calibrated(model(), guard(), measured(20, noise=0.1), 0.05)


@pytest.mark.parametrize(
    ("cut", "promised", "may_be_late", "expected"),
    [
        ("always", True, True, True),
        ("always", False, False, True),
        ("needed", True, True, False),
        ("needed", True, False, True),
        ("needed", False, True, True),
        ("needed", False, False, True),
    ],
)
def test_which_answers_are_cut(cut, promised, may_be_late, expected):
    """An answer is finished late only if the caller asked for it, something was promised, and the promise holds."""
    assert cuts(cut, promised, may_be_late) == expected


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_late_answers_stay_within_their_credit_whatever_happens(alpha):
    """With cut="needed", at most 1 + alpha T of T promised requests are late, even if all of them would be."""
    made, rng = guard(alpha=alpha), np.random.default_rng(0)
    stages = dict.fromkeys(LATENCY.stages, 5.0)
    bounds = made.bounds_at_choice(asked(0), 60.0, Spent(), ALL)
    late = promised = 0
    for _ in range(600):
        is_promised = bool(rng.random() < 0.9)
        is_late = not cuts("needed", is_promised, made.may_be_late)
        promised, late = promised + is_promised, late + (is_late and is_promised)
        made.update(0, [bounds], Outcome(stages, 3, 21.0, is_late, cut=not is_late, promised=is_promised))
        assert late <= 1 + alpha * promised
    assert late > 0.8 * alpha * promised  # and the credit is used


def test_bounds_at_a_moment_are_kept_for_the_lesson():
    """Scores are taken from the bounds of both moments: one that is left out would teach only half."""
    made = guard()
    first = made.bounds_at_choice(asked(0), 60.0, Spent(3.0, 2.5), ALL)
    later = made.bounds_at_revision(first, 0, Spent(6.0, 5.5), ALL)
    before = [scores[-1] for scores in made.margin.scores.arrived]
    made.update(0, [first, later], Outcome(dict.fromkeys(LATENCY.stages, 4.0), 3, 30.0, False))
    assert isinstance(later, Bounds) and all(
        scores[-1] != last for scores, last in zip(made.margin.scores.arrived, before, strict=True)
    )

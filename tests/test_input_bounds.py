"""Latency bounds for each input: what is fitted, when they are taken, and that all who choose use the same ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from budgetvlm.commands.verdicts import verdict_of
from budgetvlm.comparison import compare
from budgetvlm.comparison.compare_options import CompareOptions
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.ensemble import merge
from budgetvlm.controller.grpo import NEVER
from budgetvlm.controller.training import train
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.controller.training_run import TrainingRun
from budgetvlm.controller.training_states import TrainingStates
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluate
from budgetvlm.features import Features
from budgetvlm.guard.input_bounds import fit_guard
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"tiles": [1, 2, 4, 8]})
BASE = np.array([20.0, 35.0, 60.0, 100.0])  # ms of each setting where the input asks for nothing
RIGHT = np.array([0.4, 0.55, 0.68, 0.78])
BUDGETS = (25.0, 40.0, 55.0, 70.0, 90.0, 110.0)
EVALUATION = EvaluationOptions(resamples=5)
QUICK = TrainingConfig(grpo=GRPOConfig(num_epochs=1, batch_size=64), hidden_dim=8, budget_dim=4, teachers=0)


def planted(
    samples: int, seed: int = 0, signal: float = 0.5, noise: float = 0.1, split: bool = False
) -> tuple[ProfileTable, Features]:
    """The third image feature multiplies all times by exp(signal x feature); noise does so at random."""
    rng = np.random.default_rng(seed)
    image, language = 3.0 + 2.0 * rng.normal(size=(samples, 6)), rng.normal(size=(samples, 2))
    asked = signal * (image[:, 2:3] - 3.0) / 2.0
    latency = BASE * np.exp(asked + noise * rng.normal(size=(samples, 4)))
    ids = tuple(f"s{i}" for i in range(samples))
    sides = np.resize(["train", "train", "validation", "test"], samples) if split else None
    table = ProfileTable.from_arrays(SPACE, ids, rng.random((samples, 4)) < RIGHT, latency, split=sides)
    return table, Features(ids, image, language)


def chosen(mask: np.ndarray) -> np.ndarray:
    """The largest allowed setting, which is the best on average."""
    return 3 - mask[:, ::-1].argmax(axis=1)


def test_where_the_input_tells_the_time_bounds_are_that_time() -> None:
    guard = fit_guard(*planted(1000, noise=1e-3))
    table, fresh = planted(300, seed=1, noise=1e-3)
    assert guard.by_input is not None and guard.why.startswith("latency bounds depend on the input")
    ratio = guard.bounds_of(fresh) / table.latency_ms
    assert np.quantile(ratio, [0.05, 0.5, 0.95]) == pytest.approx(1.0, abs=0.08)  # ridge shrinks slopes a little
    for budget in BUDGETS:
        known = guard.feasible(np.full(300, budget), table.latency_ms)
        own = guard.feasible(np.full(300, budget), guard.bounds_of(fresh))
        assert (chosen(known) == chosen(own)).mean() > 0.9
        assert (chosen(known) == chosen(guard.feasible(np.full(300, budget)))).mean() < 0.8  # one bound a setting


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_where_it_does_not_the_bounds_are_those_of_all_inputs(seed: int, noise: float) -> None:
    table, features = planted(400, seed, signal=0.0, noise=noise)
    guard = fit_guard(table, features)
    assert guard.by_input is None and guard.why.startswith("latency bounds are the same for every input")
    assert guard.bounds_of(features).tolist() == [StaticGuard.fit_table(table).bounds_ms.tolist()]


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_the_promised_share_is_kept_for_the_chosen_settings_over_many_fits(noise: float) -> None:
    late, more = [], []
    for seed in range(40):
        guard = fit_guard(*planted(300, seed, noise=noise))
        table, fresh = planted(300, 1000 + seed, noise=noise)
        budgets, rows = np.repeat(BUDGETS, 300), np.tile(np.arange(300), len(BUDGETS))
        allowed = guard.feasible(budgets, guard.bounds_of(fresh)[rows])
        if guard.by_input is None:
            continue
        some, before = allowed.any(axis=1), guard.feasible(budgets)
        over = table.latency_ms[rows, chosen(allowed)] > budgets
        late.append(over[some].mean())
        more.append(allowed.mean() - before.mean())
    assert len(late) > 30
    assert np.mean(late) < 0.05 and np.mean(more) > 0.03


def test_a_bound_beyond_all_that_was_seen_stays_within_it() -> None:
    table, features = planted(400)
    guard = fit_guard(table, features)
    seen = guard.bounds_of(features)
    odd = replace(features, image=features.image * 1e4)
    assert guard.bounds_of(odd).max() == pytest.approx(seen.max()) and guard.bounds_of(odd).min() >= seen.min() * 0.999


def test_too_little_to_tell_is_said() -> None:
    table, features = planted(400)
    one_unit = replace(table, groups={"image_id": ("x",) * 400})
    predicted = replace(table, groups={"latency_source": ("measured",) * 60 + ("predicted",) * 340})
    few = table.subset(np.arange(80))
    for known, own, words in [
        (table, None, "there are no features"),
        (one_unit, features, "fewer than 5 images"),
        (predicted, features, "60 training samples were timed at every setting"),
        (
            few,
            features.aligned(few.sample_ids),
            "80 training samples were timed at every setting, and bounds for each input need 100",
        ),
    ]:
        guard = fit_guard(known, own)
        assert guard.by_input is None and words in guard.why
    assert fit_guard(table, features, quantile=1.0).by_input is None  # nothing promises that none is late


def test_cells_that_were_not_measured_are_left_out() -> None:
    table, features = planted(800)
    rng = np.random.default_rng(0)
    hidden = rng.random((800, 4)) < np.array([0.3, 0.3, 0.96, 0.3])
    hidden[:, 3] = True
    latency, accuracy = (np.where(hidden, np.nan, x).astype(np.float32) for x in (table.latency_ms, table.accuracy))
    guard = fit_guard(replace(table, latency_ms=latency, accuracy=accuracy), features)
    whole, fresh = fit_guard(table, features), planted(200, seed=1)[1]
    assert guard.by_input is not None
    found = guard.bounds_of(fresh) / whole.bounds_of(fresh)
    assert np.isinf(found[:, 3]).all() and not guard.feasible(np.inf, guard.bounds_of(fresh))[:, 3].any()
    assert found[:, :2] == pytest.approx(1.0, abs=0.1)
    assert found[:, 2] == pytest.approx(1.0, abs=0.25)  # of some 32 samples: its slope is that of the others


def test_wide_features_are_read_by_their_principal_components() -> None:
    table, features = planted(300)
    looks = np.random.default_rng(0).normal(size=(6, 900))
    guard = fit_guard(table, replace(features, image=features.image @ looks))
    fresh = planted(200, seed=1)[1]
    found = guard.bounds_of(replace(fresh, image=fresh.image @ looks))
    assert found / fit_guard(table, features).bounds_of(fresh) == pytest.approx(1.0, abs=0.15)


@pytest.fixture(scope="module")
def data() -> tuple[ProfileTable, Features]:
    return planted(600, split=True)


def test_training_and_evaluation_use_the_same_masks(data) -> None:
    run, evaluated = TrainingRun(*data, QUICK, [0]), EvaluationData.of(*data, EVALUATION)
    guard, trainer = evaluated.guard, run.trainer
    assert guard.by_input is not None
    for side, rows in (("train", torch.arange(300)), ("validation", None)):
        own = data[1].aligned(data[0].subset(side).sample_ids)
        budgets = np.random.default_rng(0).uniform(15.0, 120.0, own.num_samples)
        mask = torch.from_numpy(guard.feasible_or_cheapest(budgets, guard.bounds_of(own)))
        budget = torch.from_numpy(budgets).float()
        if rows is None:
            bounds = run.validation.bounds_ms
            assert bounds.numpy() == pytest.approx(guard.bounds_of(own), rel=1e-4)
            made = trainer.template.allowed(trainer.template.feasible(budget, bounds))
        else:
            states = TrainingStates(rows[None], budget[None], torch.zeros(1, 300))
            made = trainer.prepare(states).offset[0] > NEVER / 2
        assert torch.equal(made, mask)


def test_predicted_cells_which_lack_spread_narrow_no_bounds(data) -> None:
    table, features = data
    shown = np.random.default_rng(0).random((600, 4)) < np.where(np.array(table.split) == "test", 1.0, 0.4)[:, None]
    latency, accuracy = (np.where(shown, x, np.nan).astype(np.float32) for x in (table.latency_ms, table.accuracy))
    table = replace(table, latency_ms=latency, accuracy=accuracy)
    measured = StaticGuard.fit_table(table.subset("train")).bounds_ms.tolist()
    for guard in (TrainingRun(table, features, QUICK, [0]).guard, EvaluationData.of(table, features, EVALUATION).guard):
        assert guard.bounds_ms.tolist() == measured


def test_policies_that_see_less_choose_among_the_same_settings(data) -> None:
    evaluated = EvaluationData.of(*data, EVALUATION)
    blind = replace(evaluated.test_features, image=np.zeros_like(evaluated.test_features.image))
    less = replace(evaluated, test_features=blind)
    for one, other in zip(evaluated.under_budgets((0.5, 0.7), 0.0), less.under_budgets((0.5, 0.7), 0.0), strict=True):
        assert np.array_equal(one.feasible, other.feasible) and len(np.unique(one.feasible, axis=0)) > 1


def test_the_bounds_travel_with_the_controller_and_are_said(data, tmp_path) -> None:
    said: list[str] = []
    result = train(*data, QUICK, tmp_path / "run", members=2, say=said.append, progress=False)
    guard = fit_guard(data[0].subset("train"), data[1].aligned(data[0].subset("train").sample_ids))
    image, language = torch.from_numpy(data[1].image), torch.from_numpy(data[1].language)
    expected = torch.from_numpy(guard.feasible(np.full(600, 60.0), guard.bounds_of(data[1])))
    load = load_controller
    result.controller.save_pretrained(tmp_path / "plain")
    members = [load(tmp_path / "run" / "members" / str(number)) for number in range(2)]
    for made in (load(tmp_path / "run"), load(tmp_path / "plain"), merge(members)):
        assert torch.equal(made(image, language, 60.0)["feasible"], expected)
    assert f"note: {guard.why}" in said


def test_evaluation_and_comparison_say_which_bounds_were_taken(data) -> None:
    why = EvaluationData.of(*data, EVALUATION).guard.why
    assert why in verdict_of(evaluate(*data, {}, EVALUATION), data[0])
    options = CompareOptions(EVALUATION, ("lookup",), (0,), ("policies",))
    assert any(why[1:] in note for note in compare(*data, options).notes)

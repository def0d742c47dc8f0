"""The price that meets a mean budget: solved on validation samples, stored with the controller, used at run time."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from planted_tables import planted, tiny
from test_training import QUICK

from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.price_curve import AtPrice, PriceCurve, load_price_curve
from budgetvlm.controller.price_sweep import price_curve_of
from budgetvlm.errors import CheckpointError, ConfigError
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import sweep_prices
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics
from budgetvlm.evaluation.outcomes import Contender
from budgetvlm.features import Features
from budgetvlm.guard.spending import Spending
from budgetvlm.knobs import KnobSpace
from budgetvlm.live.guarded_training import train
from budgetvlm.policies import States
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

PRICES = tuple(np.geomspace(0.02, 10.0, 25).tolist())
CURVE = PriceCurve(
    (AtPrice(0.01, 80.0, 2.0, 0.9, 0.02), AtPrice(0.1, 60.0, 1.0, 0.8, 0.04), AtPrice(1.0, 20.0, 0.5, 0.5, 0.05)), 100
)


@pytest.mark.parametrize(
    ("mean_ms", "price", "latency_ms", "accuracy"),
    [
        (60.0, 0.1, 60.0, 0.8),
        (70.0, 10**-1.5, 70.0, 0.85),
        (30.0, 10**-0.25, 30.0, 0.575),
        (500.0, 0.01, 80.0, 0.9),
        (5.0, 1.0, 20.0, 0.5),
    ],
    ids=["a point", "half way", "three quarters", "beyond the slowest", "below the fastest"],
)
def test_the_solved_price_lies_between_neighbours_and_at_the_ends(mean_ms, price, latency_ms, accuracy):
    solved = CURVE.solve(mean_ms)
    assert solved.price == pytest.approx(price)
    assert (solved.latency_ms, solved.accuracy) == (pytest.approx(latency_ms), pytest.approx(accuracy))


def test_the_lowest_price_that_keeps_the_budget_is_taken_where_means_wander():
    points = (AtPrice(0.1, 60.0, 0, 0.8, 0), AtPrice(0.2, 40.0, 0, 0.7, 0), AtPrice(0.4, 45.0, 0, 0.6, 0))
    assert PriceCurve(points, 9).solve(44.0).price < 0.2


def test_a_curve_is_read_as_it_was_written(tmp_path):
    assert load_price_curve(tmp_path) is None
    CURVE.save(tmp_path)
    assert load_price_curve(tmp_path / "best_checkpoint.pt") == CURVE


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 9}', '{"schema_version": 1, "points": [{}]}'])
def test_a_damaged_curve_is_named(tmp_path, text):
    (tmp_path / "price_curve.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"price_curve.json is not usable"):
        load_price_curve(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda points: points.clear(),
        lambda points: points.reverse(),
        lambda points: points[1].update(latency_ms=math.nan),
        lambda points: points[1].update(latency_ms=-5.0),
        lambda points: points[1].update(latency_ms="12"),
        lambda points: points[1].update(accuracy=None),
        lambda points: points[0].update(price=0.0),
        lambda points: points[1].update(price=points[0]["price"]),
    ],
)
def test_numbers_that_are_no_curve_are_refused(tmp_path, change):
    CURVE.save(tmp_path)
    file = tmp_path / "price_curve.json"
    document = json.loads(file.read_text())
    change(document["points"])
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"price_curve.json is not usable .*; remove it, or train again"):
        load_price_curve(tmp_path)


def two_settings(validation_ms: list[float]) -> tuple[ProfileTable, Features, GRPOController]:
    """Settings of 10 and 30 ms, of which the slower is .2 better; whatever the input, at a price of .2 it is not worth
    its time: accuracy .2 for 20 of 20 ms."""
    space = KnobSpace({"max_crops": [1, 4]})
    count = len(validation_ms) + 2
    ids = tuple(f"s{i}" for i in range(count))
    latency = np.array([[10.0, 30.0]] * 2 + [[10.0, ms] for ms in validation_ms])
    table = ProfileTable.from_arrays(
        space, ids, np.tile([0.5, 0.7], (count, 1)), latency,
        groups={"image_id": ["a", "b", *("c" if i < 2 else f"d{i}" for i in range(count - 2))]},
        split=["train"] * 2 + ["validation"] * (count - 2),
    )  # fmt: skip
    controller = GRPOController(
        1, 1, knob_values=space.to_dict(), hidden_dim=4, latency_reference_ms=20.0, latency_ms=[10, 30]
    )
    controller.start_from([0.5, 0.7])
    return table, Features(ids, np.zeros((count, 1)), np.zeros((count, 1))), controller.eval()


def test_the_curve_of_two_settings_is_a_step_at_the_price_where_both_are_worth_the_same():
    table, features, controller = two_settings([28.0, 30.0, 35.0, 31.0])
    curve = price_curve_of(controller, table, features)
    below, above = ([p for p in curve.points if (p.price < 0.2) == side] for side in (True, False))
    assert {p.latency_ms for p in below} == {31.0} and {p.latency_ms for p in above} == {10.0}
    assert curve.solve(20.0).price == pytest.approx(0.2, rel=0.02)
    assert all(p.accuracy == pytest.approx(0.7) for p in below) and all(p.latency_se == 0 for p in above)
    # groups deviate from the mean by (28 + 30) - 62, 4 and 0: sqrt((16 + 16 + 0) * 3 / 2) / 4
    assert below[0].latency_se == pytest.approx(math.sqrt(48) / 4)


def test_cells_that_were_not_measured_are_left_out():
    table, features, controller = two_settings([28.0, math.nan, 32.0, 36.0])
    assert price_curve_of(controller, table, features).most_ms == pytest.approx(32.0)


@pytest.mark.parametrize("price", [0.01, 0.2, 1.0])
def test_feedback_mixes_two_settings_where_no_price_gives_the_mean(price):
    """The curve is a step from 10 to 31 ms; the debt alone makes it 17 on average, in any 500 requests."""
    random, spending, took = np.random.default_rng(0), Spending(17.0, price, settled=price == 0.2), []
    for _ in range(1500):
        took.append((31.0 if spending.price < 0.2 else 10.0) * random.uniform(0.8, 1.2))
        spending.add(took[-1])
    windows = np.convolve(took, np.full(500, 1 / 500), mode="valid")
    assert np.abs(windows / 17.0 - 1).max() < 0.03


def test_training_writes_the_curve_and_makes_a_mean_budget_the_default_price(tmp_path):
    said: list[str] = []
    table, features = tiny()
    train(table, features, QUICK, tmp_path, mean_budget_ms=25.0, say=said.append, progress=False)
    solved = load_price_curve(tmp_path).solve(25.0)
    assert f"mean budget of 25 ms: {solved}" in said[-1] and "25.0 [" in said[-1]
    for path in (tmp_path, tmp_path / "best_checkpoint.pt"):
        assert load_controller(path).default_price.item() == pytest.approx(solved.price)
    assert json.loads((tmp_path / "config.json").read_text())["controller_config"]["default_price"] != 0.01


def test_without_a_mean_budget_training_says_nothing_of_one(tmp_path):
    said: list[str] = []
    train(*tiny(), QUICK, tmp_path, say=said.append, progress=False)
    assert load_price_curve(tmp_path) is not None and "mean budget" not in " ".join(said)
    assert load_controller(tmp_path).default_price.item() == pytest.approx(0.01)


@pytest.mark.parametrize("mean_budget_ms", [5.0, -1.0, math.nan])
def test_a_mean_budget_below_the_cheapest_setting_is_refused_before_training(tmp_path, mean_budget_ms):
    with pytest.raises(ConfigError, match=r"cannot be met: .* takes \d+(\.\d+)? ms on average|not a positive"):
        train(*tiny(), QUICK, tmp_path / "new", mean_budget_ms=mean_budget_ms)
    assert not (tmp_path / "new").exists()


def test_a_mean_budget_above_all_is_said_to_be_more_than_is_used(tmp_path):
    said: list[str] = []
    train(*tiny(), QUICK, tmp_path, mean_budget_ms=1e4, say=said.append, progress=False)
    assert "more than any price makes use of" in said[-1]


@dataclass(frozen=True)
class KnowsGroup:
    """Chooses by the planted mean accuracies of each sample's kind and difficulty."""

    means: SettingMeans
    truth: np.ndarray
    name: str = "knows the group"

    def choose(self, states: States) -> np.ndarray:
        rows = np.array([int(name[1:]) for name in states.table.sample_ids])[states.sample_index]
        return self.means.choose(self.truth[rows], states.feasible, states.price)


def test_a_mean_budget_is_met_within_one_percent_on_fresh_samples():
    """The price is solved on 40,000 planted samples; the standard error of each side's mean is .3% or less."""
    made = planted(2000, 40_000, 40_000, width=1)
    policy = KnowsGroup(SettingMeans.fit(made.table.subset("train")), made.truth)
    options = EvaluationOptions(resamples=20, labels=("none",), prices=PRICES)
    data = EvaluationData.of(made.table, made.features, options)
    sweeps = sweep_prices(data, [Contender("known", "controller", (policy,), "", priced=True)], options)
    found = MeanBudgetMetrics.measure(data, options, sweeps).at_mean_budget("known")
    missed = [at.missed.value for at in found if at.missed]
    assert len(missed) >= 4 and max(map(abs, missed)) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_running_mean_holds_when_questions_become_harder(seed):
    """The price is solved on samples of all kinds; then come easy ones, then hard ones, then all again."""
    made = planted(2000, 2000, 8000, seed=seed, width=1)
    difficulty = np.array(made.table.groups["difficulty"]).astype(int)
    means, fresh = SettingMeans.fit(made.table.subset("train")), made.table.rows_of("test")
    known = made.table.rows_of("validation")
    allowed = np.ones((len(known), made.table.num_settings), dtype=bool)
    curve = []
    for price in np.geomspace(0.01, 10.0, 30):
        chosen = means.choose(made.truth[known], allowed, price)
        curve.append(AtPrice(price, float(made.table.latency_ms[known, chosen].mean()), 0.0, 0.0, 0.0))
    solved = PriceCurve(tuple(curve), len(known)).solve(35.0)
    assert solved.latency_ms == pytest.approx(35.0)
    spending, took = Spending(35.0, solved.price, settled=True), []
    parts = [fresh[difficulty[fresh] == 0][:1000], fresh[difficulty[fresh] == 2][:1000], fresh[-1000:]]
    for row in np.concatenate(parts):
        k = int(means.choose(made.truth[row], allowed[:1], spending.price)[0])
        took.append(float(made.table.latency_ms[row, k]))
        spending.add(took[-1])
    assert np.abs(np.convolve(took, np.full(500, 1 / 500), mode="valid") / 35.0 - 1).max() < 0.03
    assert np.mean(took[1000:2000]) == pytest.approx(35.0, rel=0.01)

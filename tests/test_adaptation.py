"""A controller elsewhere: a planted machine's latencies are found from a few requests, and accuracies stay."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_latency import measured
from tiny_vlm import write_tiny_model

from budgetvlm.adaptation.new_machine import controller_here, latency_here, median_interval, table_here
from budgetvlm.cli import main
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.known_terms import KnownTerms, known_terms
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.price_curve import load_price_curve
from budgetvlm.controller.provenance import TrainedOn
from budgetvlm.controller.training_options import StatePlan
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.latency_model import LatencyModel, Sizes
from budgetvlm.guard.saved import load_guard
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

STAGE_FACTORS = {"preprocess": 1.0, "vision": 2.0, "prefill": 1.5, "decode": 3.0}


@pytest.fixture(scope="module")
def profile():
    """A table of a made-up machine, its latency model, and the same machine with other factors for its stages."""
    table = measured(samples=40, split=["train"] * 30 + ["validation"] * 10)
    latency = LatencyModel.fit(table)
    factors = np.array([STAGE_FACTORS[stage] for stage in latency.stages])
    return table, latency, factors


def test_stages_and_settings_of_a_new_machine_are_found_again(profile):
    table, latency, factors = profile
    sizes = Sizes.of_table(table)
    own = np.linspace(0.8, 1.25, table.num_settings)  # what each setting differs from its stages
    truth = sum(ms * STAGE_FACTORS[name] for name, ms in latency.predict_stages(sizes).items()) * own
    at_scales = sum(ms * STAGE_FACTORS[name] for name, ms in latency.predict_stages(sizes).items())
    found = latency_here(latency, np.log(factors), truth[:18] / at_scales[:18])
    np.testing.assert_allclose(found.predict(sizes), truth, rtol=0.03)  # 18 of 20 votes are for what was measured
    few = latency_here(latency, np.log(factors), truth[:2] / at_scales[:2])
    errors = [np.abs(model.predict(sizes) / truth - 1).max() for model in (found, few)]
    assert errors[0] < errors[1]


def test_all_settings_together_are_followed_at_once(profile):
    """Where no stage is known, everything may be twice as slow: that is not drawn towards the profile."""
    table, latency, _ = profile
    ratio = np.full((3, table.num_settings), 2.0)
    ratio[:, 1] = np.nan  # not measured, so that it goes with the others
    found = latency_here(latency, np.zeros(len(latency.stages)), ratio)
    np.testing.assert_allclose(found.correction, 2 * latency.correction)


def test_a_sample_stays_as_far_from_its_prediction_as_it_was(profile):
    table, latency, factors = profile
    slow = np.where(np.arange(table.num_samples) == 3, 1.5, 1.0)[:, None].astype(np.float32)
    table = replace(table, latency_ms=table.latency_ms * slow)
    here = latency_here(latency, np.log(factors), np.ones((1, table.num_settings)))
    moved = table_here(table, latency, here)
    sizes = Sizes.of_table(table)
    np.testing.assert_allclose(moved.latency_ms / here.predict(sizes), table.latency_ms / latency.predict(sizes), 1e-5)
    np.testing.assert_allclose(moved.stages_ms["decode"], 3 * table.stages_ms["decode"], rtol=1e-5)
    assert moved.split == table.split and (moved.accuracy == table.accuracy).all()


def random_controller(table, **options):
    torch.manual_seed(0)
    latency_ms = table.subset("train").latency_ms
    means = latency_ms.mean(axis=0)
    made = GRPOController(
        6, 5, hidden_dim=16, knob_values=table.knob_space.to_dict(), latency_ms=means.tolist(),
        bounds_ms=(1.2 * means).tolist(), latency_reference_ms=float(np.median(latency_ms[:, -1])),
        **options,
    )  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def random_features(table):
    rng = np.random.default_rng(0)
    return Features(table.sample_ids, rng.normal(size=(table.num_samples, 6)), rng.normal(size=(table.num_samples, 5)))


@pytest.mark.parametrize("bounds_by_input", [False, True])
def test_everything_twice_as_slow_is_the_same_policy_at_twice_the_budget(profile, bounds_by_input):
    table, _, _ = profile
    table = replace(table, latency_ms=table.latency_ms * np.float32(1.0))
    there, features = random_controller(table, bounds_by_input=bounds_by_input), random_features(table)
    here = controller_here(there, replace(table, latency_ms=2 * table.latency_ms), features)
    assert here.latency_reference_ms.item() == pytest.approx(2 * there.latency_reference_ms.item())
    np.testing.assert_allclose(here.latency_ms, 2 * there.latency_ms, rtol=1e-5)
    image, language = (torch.from_numpy(x[:4]) for x in (features.image, features.language))
    for share, price in ((0.3, 0.0), (0.7, 0.5)):
        budget = share * there.latency_reference_ms
        logits = [
            made.setting_logits(made(image, language, b, price)) for made, b in ((there, budget), (here, 2 * budget))
        ]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_a_price_counts_this_machines_times(profile):
    table, _, _ = profile
    there, features = random_controller(table), random_features(table)
    slow = table.latency_ms.copy()
    slow[:, 0] *= 3
    here = controller_here(there, replace(table, latency_ms=slow), features)
    image, language = (torch.from_numpy(x[:1]) for x in (features.image, features.language))
    budget = float(there.latency_reference_ms)
    a, b = (made.setting_logits(made(image, language, budget, 1.0))[0] / made.logit_scale for made in (there, here))
    lost = (2 * there.latency_ms[0] / there.latency_reference_ms).item()
    torch.testing.assert_close(a - b, torch.tensor([lost] + [0.0] * (table.num_settings - 1)), rtol=1e-4, atol=1e-4)


def test_the_interval_of_a_median_is_that_of_order_statistics():
    """Of 50 values the 18th and the 33rd, as in the tables of Conover (1999)."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, 51.0))
    assert median_interval(values) == (18.0, 33.0)
    assert median_interval(np.arange(5.0)) == (-np.inf, np.inf) and median_interval(np.arange(6.0)) == (0.0, 5.0)


# --- Budgets and prices that are not known ----------------------------------------------------------------------------

NARROW = {"budget_factors": (1.0,), "wide_share": 1.0, "wide_range": (0.5, 1.0)}


@pytest.mark.parametrize(
    ("plan", "budgets", "prices"),
    [
        ({}, (0.16, math.inf), (0.01, 1.0)),
        ({"wide_share": 0.0, "price_share": 0.0}, (0.16, 1.2), (0.01, 0.01)),
        ({**NARROW, "price_share": 0.0}, (0.5, 1.0), (0.01, 0.01)),
        ({**NARROW, "price_range": (0.1, 0.2)}, (0.5, math.inf), (0.01, 0.2)),
    ],
)
def test_what_a_plan_draws_is_known(plan, budgets, prices):
    found = KnownTerms.of_plan(StatePlan(**plan), [0.2, 1.0])
    assert found.budgets == pytest.approx(budgets) and found.prices == prices
    assert KnownTerms.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("share", "price", "known"),
    [(0.5, 0.05, True), (0.5, 0.0, True), (0.49, 0.05, False), (1.01, 0.05, False), (0.7, 0.11, False)],
)
def test_beyond_what_it_knows_a_controller_is_told_the_nearest(profile, share, price, known):
    """The values are those at the nearest; what time costs is counted at the true price."""
    table, _, _ = profile
    made, features = random_controller(table), random_features(table)
    made.trained_on = TrainedOn(terms=KnownTerms((0.5, 1.0), (0.01, 0.1)).to_dict())
    network, reference_ms = ValueNetwork(made), float(made.latency_reference_ms)
    told, told_price = min(max(share, 0.5), 1.0), min(max(price, 0.01), 0.1)
    image, language = (x[0].astype(np.float32) for x in (features.image, features.language))
    here = network.values(image, language, share * reference_ms, price)
    nearest = network.values(image, language, told * reference_ms, told_price)
    cost = (price - told_price) * made.latency_ms.numpy() / reference_ms
    np.testing.assert_allclose(here, nearest - cost, rtol=1e-4, atol=1e-5)
    logits = made.setting_logits(made(*map(torch.from_numpy, (image, language)), share * reference_ms, price))
    np.testing.assert_allclose(here, logits[0].detach() / made.logit_scale, rtol=1e-4, atol=1e-4)
    assert known_terms(made).hold(share, price) == known


# --- With a model -----------------------------------------------------------------------------------------------------

SMALL = KnobSpace({"max_crops": [1, 4], "top_k": [4], "num_active_blocks": [2, 4]})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a controller with its guard, and the table and the features that they come from."""
    place = tmp_path_factory.mktemp("adapt")
    write_tiny_model(place / "model")
    rng, count = np.random.default_rng(0), 40
    vision = np.tile([4.0, 4.0, 20.0, 20.0], (count, 1))
    tokens = {"vision": vision, "language": np.full((count, 4), 9.0), "output": rng.integers(1, 5, (count, 4))}
    stages = {name: share * (1 + 0.1 * vision) for name, share in zip(STAGE_FACTORS, (0.5, 1, 2, 3), strict=True)}
    table = ProfileTable.from_arrays(
        SMALL, range(count), rng.random((count, 4)) < 0.6, sum(stages.values()), stages_ms=stages, tokens=tokens,
        split=["train"] * 30 + ["validation"] * 10,
    )  # fmt: skip
    features = Features(table.sample_ids, rng.normal(size=(count, 64)), rng.normal(size=(count, 32)))
    train = table.subset("train")
    means = train.latency_ms.mean(axis=0).tolist()
    controller = GRPOController(
        64, 32, hidden_dim=8, knob_values=SMALL.to_dict(), latency_ms=means, bounds_ms=means,
        latency_reference_ms=means[-1],
    )  # fmt: skip
    controller.save_pretrained(place / "controller")
    (place / "controller" / "guard.json").write_text(json.dumps(AdaptiveGuard.fit(train, features).to_dict()))
    table.save(place / "table.parquet")
    features.save(place / "features.safetensors")
    return place


def adapt(place, *words, table="table.parquet"):
    data = ["--table", str(place / table), "--features", str(place / "features.safetensors")]
    asked = () if {"--requests", "--budget_ms", "--price", "--from"} & set(words) else ("--requests", "28")
    return main(["adapt", "--model_path", str(place / "model"), *data, *asked, *map(str, words)])


@pytest.mark.alone
def test_adapting_to_this_machine(place, capsys):
    out = place / "here"
    assert adapt(place, "--checkpoint", place / "controller", "--output_dir", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["answers"], len(found["settings"])) == (28, 112, 4)
    for one in found["settings"]:
        low, high = one["interval_ms"]
        assert 0 < low <= one["measured_median_ms"] <= high
    made, guard = load_controller(out), load_guard(out)
    assert guard.calibrated_on == 28 and guard.alpha == 0.05
    assert made.latency_reference_ms.item() == found["reference_ms"]["here"]
    assert load_price_curve(out).most_ms > 0
    means = ProfileTable.load(out / "profile_table.parquet").subset("train").latency_ms.mean(axis=0)
    np.testing.assert_allclose(made.latency_ms, means, rtol=1e-4)
    # A second time it goes on from its own table, and not from the old one; nothing is written over unasked.
    again = ["--checkpoint", out, "--output_dir", out]
    assert adapt(place, *again, "--overwrite") == 2
    assert "here/profile_table.parquet" in capsys.readouterr().err.replace("DIR", "here")
    assert adapt(place, *again, table="here/profile_table.parquet") == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert adapt(place, *again, "--overwrite", table="here/profile_table.parquet") == 0
    assert "from 28 requests, each at every setting" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--checkpoint DIR --data"),
        (("--checkpoint", "controller", "--requests", "5"), "--requests 5 cannot promise"),
        (("--checkpoint", "nowhere"), "does not exist"),
        (("--checkpoint", "controller", "--budget_ms", "20", "--output_dir", "out"), "--output_dir counts for nothing"),
        (("--from", "a.json", "--budget_ms", "20", "--requests", "30"), "--budget_ms, --requests counts for nothing"),
    ],
)
def test_what_cannot_be_adapted_is_said_before_anything_runs(place, monkeypatch, capsys, words, said):
    monkeypatch.chdir(place)
    assert adapt(place, *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("json_flag", [["--json"], []])
def test_other_budgets_and_prices_are_reported_and_nothing_is_trained(place, capsys, json_flag):
    words = ["--checkpoint", place / "controller", "--budget_ms", 1.0, 20.0, "--price", 2.0]
    assert adapt(place, *words, *json_flag) == 0
    out = capsys.readouterr().out
    if not json_flag:
        assert out.count("extrapolated") == 3 and "at price 2" in out  # by the usual plan it knows prices up to 1
        return
    found = json.loads(out)
    low, high = found["budgets"]
    assert (found["price"], low["allowed"], high["allowed"]) == (2.0, 0.0, 4.0)
    assert low["extrapolates"] and low["late"][0] == 1.0 and high["late"][0] == 0.0
    assert low["vs_lookup"] == [0.0, 0.0, 0.0]  # both take the fastest setting


def test_a_budget_that_is_none_is_refused(place, capsys):
    assert adapt(place, "--checkpoint", place / "controller", "--budget_ms", -1) == 2
    assert "budget_ms=-1.0 is not a positive number" in capsys.readouterr().err

"""The guard at run time, on a made-up machine whose speed is known and may change."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_latency import SPACE, machine, measured

from budgetvlm import decide
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.answer_length import LengthModel
from budgetvlm.guard.bounds import Bounds, Outcome, Request, Spent
from budgetvlm.guard.latency_model import LatencyModel
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.rule import Rule
from budgetvlm.guard.speed import StageSpeed
from budgetvlm.vlm import Deadline, Quicker
from budgetvlm.vlm.decoding import Pace

LATENCY = LatencyModel.fit(measured(noise=0.05))
TOKENS, STAGES = machine(SPACE, 2000, seed=9)
# The first feature tells how long answers are, give or take one token.
FEATURES = np.column_stack([TOKENS["output"][:, 0] + np.random.default_rng(0).integers(-1, 2, 2000), np.ones(2000)])
FEATURES = FEATURES.astype(np.float32)
LENGTHS = LengthModel.fit(FEATURES, TOKENS["output"][:, 0])
IMAGE = np.array([0.5, -1.0, 2.0], dtype=np.float32)
NOTHING = Spent()
ALL = np.ones(len(SPACE), dtype=bool)
KNOWN = np.arange(len(SPACE)) % 5 > 0


def guard(alpha=0.05, factor=None, hurries=True) -> AdaptiveGuard:
    scores = 0.08 * np.random.default_rng(3).standard_t(4, 500)
    margin = Margin.start(alpha, {"overview": scores, "image": scores}, math.log(factor) if factor else None)
    return AdaptiveGuard(LATENCY, LENGTHS, margin, own_ms=0.5, rule=Rule(hurries=hurries))


def network() -> ValueNetwork:
    """Of a controller that was trained on nothing."""
    torch.manual_seed(0)
    options = {"latency_ms": range(1, len(SPACE) + 1), "latency_reference_ms": 60.0}
    made = GRPOController(len(IMAGE), 2, knob_values=SPACE.to_dict(), hidden_dim=16, **options)
    torch.nn.init.normal_(made.heads.weight)
    return ValueNetwork(made.eval())


def bounded(made: AdaptiveGuard, request: Request, budget_ms: float, spent=NOTHING, known=ALL) -> Bounds:
    return made.bounds_at_choice(request, budget_ms, spent, known)


def revised(made: AdaptiveGuard, chosen: Bounds, index: int, spent: Spent, known=ALL) -> Bounds:
    return made.bounds_at_revision(chosen, index, spent, known)


def asked(row: int) -> Request:
    return Request(TOKENS["vision"][row], TOKENS["language"][row, 0], FEATURES[row])


def requests(made: AdaptiveGuard, speed, seed=1, noise=0.08):
    """Run requests one by one, the dearest allowed setting each; yields (violated, share of budget used, promised).

    The overview is what preprocessing and vision take at the cheapest setting.

    Args:
        speed: number of the request -> how many times as long everything takes.
    """
    rng = np.random.default_rng(seed)
    for row in range(2000):
        request = asked(row)
        budget = rng.uniform(20, 130) * speed(row)
        slow = speed(row) * math.exp(noise * rng.standard_t(4))
        overview = slow * (STAGES["preprocess"][row, 0] + STAGES["vision"][row, 0])
        looks = [bounded(made, request, budget, Spent(overview, overview))]
        k, promised = dearest(looks[0], budget), bool(looks[0].allowed(budget).any())
        if promised:
            image = slow * (STAGES["preprocess"][row, k] + STAGES["vision"][row, k])
            looks.append(revised(made, looks[0], k, Spent(image + 0.5, image)))
            k = dearest(looks[1], budget)
        stages = {name: slow * times[row, k] for name, times in STAGES.items()}
        output, saved_ms = int(TOKENS["output"][row, k]), {}
        if made.rule.hurries and promised:
            began = stages["preprocess"] + stages["vision"] + 0.5
            stages |= hurried(pace := pace_of(made, looks[-1], k, budget), k, row, slow, began, output)
            saved_ms = pace.saved_ms
        total = sum(stages.values()) + 0.5
        made.update(k, looks, Outcome(stages, output, total, total > budget, False, promised, saved_ms))
        yield total > budget, total / budget, promised


def pace_of(made, look, k, budget):
    """That of an answer whose every token is made, late or not."""
    quicker = [Quicker(SPACE.settings[q], look.step_ms[q], look.read_ms[q]) for q in made.faster_settings(k)]
    deadline = Deadline(
        budget / 1e3, look.step_ms[k], int(look.forecast.long_tokens), tuple(quicker), False, look.read_ms[k]
    )
    return Pace(deadline, [range(setting["num_active_blocks"]) for setting in (SPACE.settings[k], *deadline.settings)])


def hurried(pace, k, row, slow, now_ms, output):
    """What reading and decoding take at this pace, by stage."""
    rungs, start = [SPACE.index(s) for s in (SPACE.settings[k], *pace._deadline.settings)], now_ms
    for block in pace.blocks[0]:
        if pace.reads(now_ms / 1e3, block):
            now_ms += slow * STAGES["prefill"][row, rungs[pace.level]] / len(pace.blocks[pace.level])
    pace.has_read()
    read_ms, start = now_ms - start, now_ms
    for count in range(1, output):
        assert pace.next(now_ms / 1e3, count)
        now_ms += slow * STAGES["decode"][row, rungs[pace.level]] / (output - 1)
    return {"prefill": read_ms, "decode": now_ms - start}


def dearest(bounds, budget):
    """The dearest allowed setting, or the fastest."""
    allowed = bounds.allowed(budget)
    return int(np.where(allowed, bounds.predicted_ms, -np.inf).argmax()) if allowed.any() else bounds.fastest


def violation_rate(results) -> float:
    return float(np.mean([violated and promised for violated, _, promised in results]))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("hurries", [True, False])
def test_at_most_alpha_of_the_requests_break_their_budget(alpha, hurries):
    results = list(requests(guard(alpha=alpha, hurries=hurries), lambda row: 1.0))
    assert (0.0 if hurries else 0.3 * alpha) < violation_rate(results) <= 1.1 * alpha
    assert np.mean([promised for _, _, promised in results]) > 0.8
    assert np.median([used for _, used, _ in results]) > 0.6  # it is not kept by leaving most of the budget unused


@pytest.mark.parametrize("factor", [0.7, 1.5])
def test_a_bad_start_is_made_up_for(factor):
    results = list(requests(guard(factor=factor), lambda row: 1.0))
    assert violation_rate(results[500:]) <= 0.06
    assert np.median([used for _, used, _ in results[500:]]) > 0.7


def test_a_slow_spell_is_absorbed_and_forgotten():
    """The machine takes twice as long from request 700 to 1400; budgets are as large as before."""
    made, results = guard(), []
    for number, result in enumerate(requests(made, lambda row: 2.0 if 700 <= row < 1400 else 1.0)):
        results.append(result)
        if number == 1399:
            assert set(made.speed.drift) == set(LATENCY.stages)
            assert made.speed.drift["decode"] == pytest.approx(2.0, rel=0.15)
    assert violation_rate(results[900:1400]) <= 0.07
    assert violation_rate(results[1600:]) <= 0.07
    assert np.median([used for _, used, _ in results[1700:]]) > 0.7
    assert made.speed.drift == {}


def test_what_is_learnt_under_a_load_stays_with_it():
    """A long load with heavy noise: what it teaches does not have to be made up for afterwards."""
    made = guard()
    run = requests(made, lambda row: 4.0 if 300 <= row < 1500 else 1.0, noise=0.3)
    before = [next(run) for _ in range(300)]
    parts = dict(made.margin.group_offsets)
    for _ in range(1200 - 1):
        next(run)
    slowed = {name: part for name, part in made.margin.group_offsets.items() if name.endswith("slowed down")}
    assert min(slowed.values()) < 0
    changed = [abs(part - made.margin.group_offsets[name]) for name, part in parts.items()]
    assert max(changed) < 0.05 and np.mean([promised for *_, promised in before]) > 0.8
    after = list(run)[20:]
    assert violation_rate(after) <= 0.07
    assert np.mean([promised for *_, promised in after]) > 0.8


def test_what_requests_in_flight_add_to_each_other_is_foreseen():
    """Every other request is one of four, which take twice as long; nothing else is learnt from that."""
    made = guard().replaced(rule=Rule().for_model(False))
    for row in range(80):
        among, slow = (4, 2.0) if row % 2 else (1, 1.0)
        looks = [bounded(made.among(among), asked(row), 1e4)]
        stages = {name: slow * times[row, -1] for name, times in STAGES.items()}
        outcome = Outcome(stages, TOKENS["output"][row, -1], sum(stages.values()) + 0.5, late=False, among=among)
        made.update(len(SPACE) - 1, looks, outcome)
    assert made.speed.drift == {}
    again = AdaptiveGuard.from_dict(made.to_dict())
    again.speed.pace[:] = made.speed.pace  # which is over before it could be read
    for one in (made, again):
        alone = bounded(one, asked(0), 1e4).slowdown
        slower = [bounded(one.among(n), asked(0), 1e4).slowdown / alone for n in (1, 2, 3, 4, 5, 99)]
        assert slower == pytest.approx([1, 1, 1, 2, 2, 2], rel=0.05)


def test_a_slower_machine_is_seen_as_one():
    made = guard()
    list(requests(made, lambda row: 1.5))
    request = Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    assert bounded(made, request, 60.0).slowdown == pytest.approx(1.5, rel=0.1)
    assert StageSpeed(LATENCY.stages, made.speed.log_scale).drift == {}


def test_choosing_is_bounding_and_choosing():
    made, chooses = guard(), network()
    list(requests(made, lambda row: 1.5))
    for row, (budget, waited, price, known) in enumerate(
        itertools.product((40.0, 90.0), (0.0, 15.0), (None, 0.5), (ALL, KNOWN))
    ):
        spent = Spent(waited + 4.0, 3.5, waited_ms=waited)
        first = decide.specified_choice(made, chooses, asked(row), IMAGE, budget, spent, known, price)
        wanted = bounded(made, asked(row), budget, spent, known)
        seen = (budget - waited - made.own_ms) / wanted.slowdown
        np.testing.assert_allclose(first.values, chooses.values(IMAGE, asked(row).feature, seen, price))
        allowed = np.flatnonzero(wanted.allowed(budget))
        assert first.best == allowed[first.values[allowed].argmax()] and first.feasible
        spent = Spent(waited + 20.0, 18.0)
        again = decide.specified_revision(made, first, first.best, budget, spent, known)
        later = revised(made, wanted, first.best, spent, known)
        np.testing.assert_array_equal(again.bounds.times, later.times)
        allowed = np.flatnonzero(later.allowed(budget))
        assert again.best == (allowed[first.values[allowed].argmax()] if len(allowed) else -1)


def test_what_was_learnt_survives_json():
    made = guard()
    list(requests(made, lambda row: 1.3))
    made.speed.pace[0] = 0.0  # it is over before a document could be read
    again = AdaptiveGuard.from_dict(json.loads(json.dumps(made.to_dict())))
    for row in range(20):
        request = Request(TOKENS["vision"][row], TOKENS["language"][row, 0], FEATURES[row])
        np.testing.assert_allclose(bounded(again, request, 60.0).bounds_ms, bounded(made, request, 60.0).bounds_ms)
    with pytest.raises(DataError, match="lacks the field margin"):
        AdaptiveGuard.from_dict({k: v for k, v in made.to_dict().items() if k != "margin"})
    with pytest.raises(DataError, match="schema version 7"):
        AdaptiveGuard.from_dict({**made.to_dict(), "schema_version": 7})
    with pytest.raises(DataError, match="do not fit its latency model"):
        AdaptiveGuard.from_dict({**made.to_dict(), "speed": {"normal": [0.0], "log_scale": [0.0]}})


def test_an_overview_that_took_long_warns_of_the_rest():
    made, request = guard(hurries=False), Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    made = made.replaced(rule=Rule(revises=False, hurries=False))
    usual = STAGES["preprocess"][0, 0] + STAGES["vision"][0, 0]
    quick, slow = (bounded(made, request, 60.0, Spent(1.5 * usual, took)) for took in (usual, 1.5 * usual))
    before = bounded(made, request, 60.0)
    assert (slow.rest_ms > 1.1 * quick.rest_ms).all()
    # What is spent is known: only the rest is multiplied by the margin.
    factor = before.bounds_ms / before.rest_ms
    np.testing.assert_allclose(quick.bounds_ms, 1.5 * usual + factor * quick.rest_ms)
    np.testing.assert_allclose(quick.rest_ms, before.rest_ms - usual, rtol=0.05)


def test_what_a_large_image_takes_to_prepare_is_expected_again_where_tiles_are_cut():
    made, request = guard(hurries=False), Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    made = made.replaced(rule=Rule(revises=False, hurries=False))
    prepared, encoded = STAGES["preprocess"][0, 0], STAGES["vision"][0, 0]
    usual = bounded(made, request, 60.0, Spent(prepared + encoded, prepared + encoded, prepared))
    took = prepared + 30.0 + encoded
    large = bounded(made, request, 60.0, Spent(took, took, prepared + 30.0))
    assert large.forecast.large and not usual.forecast.large
    tiled = TOKENS["vision"][0] > TOKENS["vision"][0].min()
    assert tiled.any() and not tiled.all()
    np.testing.assert_allclose(large.rest_ms - usual.rest_ms, np.where(tiled, 30.0, 0.0), atol=1.0)
    assert large.slowdown == pytest.approx(usual.slowdown, rel=0.05)  # the machine is as fast as before
    before = made.speed.to_dict()
    stages = {name: float(times[0, -1]) for name, times in STAGES.items()} | {"preprocess": 70.0}
    made.update(len(SPACE) - 1, [large], Outcome(stages, 4, 200.0, False))
    place = made.latency.stages.index("preprocess")
    changed = np.array(made.speed.to_dict()["log_scale"]) != np.array(before["log_scale"])
    assert not changed[place] and changed.sum() == len(changed) - 1
    made.follow(large, len(SPACE) - 1, made.speed.by_stage(stages), 4)
    assert made.speed.log_scale[place] == before["log_scale"][place]
    made.update(len(SPACE) - 1, [usual], Outcome(stages, 4, 200.0, False))
    assert made.speed.log_scale[place] > before["log_scale"][place]


def test_an_answer_that_may_be_hurried_is_allowed_where_it_is_only_expected_to_be_in_time():
    request = Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    guards = [guard(factor=1.2).replaced(rule=Rule(revises=False, hurries=hurries)) for hurries in (True, False)]
    looks = [bounded(made, request, 60.0) for made in guards]
    hurried, planned = (look.bounds_ms for look in looks)
    likely = math.sqrt(1.2) * (looks[1].rest_ms - looks[1].longer_ms)
    assert (hurried <= planned + 1e-9).all() and (hurried >= likely - 1e-9).all()
    cheapest, full = SPACE.index(SPACE.cheapest), SPACE.index(SPACE.full)
    assert hurried[cheapest] == planned[cheapest]  # nothing is quicker
    assert hurried[full] < planned[full] and looks[0].saving_ms[full] > 0


def test_an_answer_that_was_hurried_teaches_what_it_would_have_taken():
    request = Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    full, learnt = SPACE.index(SPACE.full), []
    for saved_ms in ({}, {"prefill": 3.0, "decode": 8.0}):
        made = guard()
        stages = {name: float(times[0, full]) - saved_ms.get(name, 0.0) for name, times in STAGES.items()}
        looks, total = [bounded(made, request, 200.0)], sum(stages.values())
        made.update(full, looks, Outcome(stages, 5, total, False, saved_ms=saved_ms))
        learnt.append(made.to_dict())
    assert learnt[0]["speed"] == learnt[1]["speed"]
    assert learnt[0]["margin"]["scores"]["overview"] == pytest.approx(learnt[1]["margin"]["scores"]["overview"])


def test_a_setting_is_aimed_at_where_a_cheaper_one_with_its_image_is_safe():
    made, request = guard(hurries=False), Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    with_recourse = bounded(made, request, 60.0)
    made = made.replaced(rule=Rule(revises=False, hurries=False))
    without = bounded(made, request, 60.0)
    assert (with_recourse.bounds_ms <= without.bounds_ms).all()
    cheapest, full = SPACE.index(SPACE.cheapest), SPACE.index(SPACE.full)
    assert with_recourse.bounds_ms[cheapest] == without.bounds_ms[cheapest]  # it has nothing to fall back on
    assert with_recourse.bounds_ms[full] < without.bounds_ms[full]
    assert with_recourse.fastest == without.fastest == cheapest


def test_what_the_image_took_moves_the_bounds_of_the_settings_that_share_it():
    made, request = guard(), Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    bounds, full = bounded(made, request, 60.0), SPACE.index(SPACE.full)
    usual = STAGES["preprocess"][0, full] + STAGES["vision"][0, full]
    quick, slow = (revised(made, bounds, full, Spent(took, took)) for took in (usual, 1.3 * usual))
    same = np.array([setting["max_crops"] == 12 for setting in SPACE.settings])
    np.testing.assert_array_equal(np.isfinite(quick.bounds_ms), same)
    assert (slow.bounds_ms[same] > quick.bounds_ms[same] + 0.3 * usual).all()
    assert (slow.rest_ms[same] > 1.1 * quick.rest_ms[same]).all()
    known = same & (np.arange(len(SPACE)) != full)
    assert not np.isfinite(revised(made, bounds, full, Spent(usual, usual), known).bounds_ms[full])


@pytest.mark.parametrize("ms", [-1.0, math.nan, math.inf])
def test_a_clock_that_jumps_teaches_nothing(ms):
    made = guard()
    request = Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    bounds = bounded(made, request, 60.0)
    with pytest.raises(DataError, match="clock"):
        made.update(0, [bounds], Outcome({"prefill": ms}, 1, 5.0, False))
    with pytest.raises(DataError, match="clock"):
        made.update(0, [bounds], Outcome({"prefill": 5.0}, 1, ms, False))
    np.testing.assert_array_equal(bounded(made, request, 60.0).bounds_ms, bounds.bounds_ms)


@pytest.mark.parametrize("options", [{"margin": Margin(0.05, level=0.1), "own_ms": -1.0}, {"own_ms": math.nan}])
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigError):
        AdaptiveGuard(LATENCY, LENGTHS, **options)


def test_settings_that_are_not_known_are_never_allowed():
    made, known = guard(), np.arange(len(SPACE)) % 5 > 0
    request = Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    bounds = bounded(made, request, 1e6, Spent(3.0, 2.5), known)
    assert bounds.allowed(1e6).tolist() == known.tolist()
    assert not revised(made, bounds, 1, Spent(6.0, 5.5), known).allowed(1e6)[~known].any()


def test_a_size_that_comes_again_has_the_bounds_it_would_have_alone():
    """What is remembered of a size does not know the machine's speed, which changes in between."""
    made = guard()
    request = Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    before = bounded(made, request, 60.0)
    list(requests(made, lambda row: 1.5))
    again = AdaptiveGuard.from_dict(made.to_dict())
    again.speed.pace[0] = made.speed.pace[0]
    np.testing.assert_allclose(bounded(made, request, 60.0).bounds_ms, bounded(again, request, 60.0).bounds_ms)
    assert bounded(made, request, 60.0).slowdown > 1.2 * before.slowdown


def test_requests_without_a_budget_say_nothing_about_how_wide_bounds_are():
    """They are never late, which is no merit of the bounds; the machine's speed is learnt from them all the same."""
    made = guard()
    request = Request(TOKENS["vision"][0], TOKENS["language"][0, 0], FEATURES[0])
    bounds = bounded(made, request, 1e9)
    before = made.margin.group_offsets, made.credit, made.speed.slowdown
    stages = {name: 2 * times[0, 0] for name, times in STAGES.items()}
    for _ in range(5):
        made.update(0, [bounds], Outcome(stages, 4, sum(stages.values()), late=False, limited=False))
    assert (made.margin.group_offsets, made.credit) == before[:2] and made.speed.slowdown > before[2]


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_an_answer_that_is_not_whole_teaches_the_speed_and_not_how_long_answers_take(late, stopped):
    """Some of its tokens are missing: its time says nothing of a whole answer, its stages do.

    Late is late; in time counts where a stop string ended it, which is part of what was asked, and not where the caller
    did, perhaps because it would have been late.
    """
    made, row, k = guard(), 3, 5
    look = bounded(made, asked(row), 1e6, Spent(1.0, 1.0))
    stages = {name: 2 * times[row, k] for name, times in STAGES.items()}
    scores, level = [list(a) for a in made.margin.scores.arrived], made.margin.offsets.tolist()
    outcome = Outcome(
        stages, int(TOKENS["output"][row, k]), sum(stages.values()) + 1.5, late, whole=False, stopped=stopped
    )
    made.update(k, [look], outcome)
    assert [list(a) for a in made.margin.scores.arrived] == scores
    assert (made.speed.log_scale[:3] > 0).all()  # its answer is one token
    counts = late or not stopped
    assert made.credit == pytest.approx(1 + made.alpha * counts - late)
    assert (made.margin.offsets.tolist() == level) is not counts


def test_each_image_takes_what_one_takes_and_text_alone_nothing_of_it():
    """Vision tokens alike, three images take three times the fixed part of the image's stages; the rest stays."""
    made = guard()
    none, one, three = (
        bounded(made, asked(0)._replace(images=images), 1e3).forecast.profiled_ms[0] for images in (0.0, 1.0, 3.0)
    )
    image = made.state.image_stages > 0
    np.testing.assert_allclose(three[~image], one[~image])
    np.testing.assert_allclose(three[image] - one[image], 2 * (one[image] - none[image]))
    text = asked(0)._replace(images=0.0, vision=np.zeros(len(SPACE)))
    look = bounded(made, text, 1e3)
    assert not look.forecast.terms[0].any() and look.rest_ms[0] > 0
    after = revised(made, look, 0, Spent(0.5, 0.0))
    np.testing.assert_allclose(after.rest_ms, look.rest_ms - made.own_ms)  # no image says how fast the machine is

"""Calibration and evaluation on the clock, with a tiny model: what is measured, counted and said."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_vlm import write_tiny_model

from budgetvlm import decide
from budgetvlm.cli import main
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import ConfigError, DataError, InputError, KnobSpaceError
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.bounds import Spent
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.rule import Rule
from budgetvlm.guard.saved import load_guard
from budgetvlm.knobs import KnobSpace
from budgetvlm.live.calibration import calibrated, measure, requests_needed, typical
from budgetvlm.live.live_evaluation import LiveRecord, price_of_guarantee, run_live, summary
from budgetvlm.live.replay import replay
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import load_task
from budgetvlm.vlm import Deadline, Quicker, load_vlm
from budgetvlm.vlm.decoding import LONG_AGO_S, Pace

pytestmark = pytest.mark.alone

SPACE = KnobSpace({"max_crops": [1, 4], "top_k": [4], "num_active_blocks": [2, 4]})
TASK = load_task("signs")
REQUESTS = 30
ALL = np.ones(len(SPACE), dtype=bool)


def controller(reference_ms=20.0, **changes):
    """Likes the dearer setting better, and knows part of the model's space."""
    made = GRPOController(
        image_feat_dim=64, lang_feat_dim=32, hidden_dim=8, knob_values=SPACE.to_dict(),
        latency_reference_ms=reference_ms, default_price=0.0, **changes,
    )  # fmt: skip
    made.start_from([0.1, 0.3, 0.5, 0.9])
    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model that reads the words of the bundled task, for what it is worth."""
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vlm(directory):
    return load_vlm(str(directory))


@pytest.fixture(scope="module")
def measured(vlm):
    samples = list(TASK.samples("train", REQUESTS))
    return measure(AdaptiveVLM(vlm, controller()), TASK, samples, progress=False)


@pytest.fixture(scope="module")
def guard(measured):
    """A guard fitted on what was measured, as training does it."""
    shape = measured.latency_ms.shape
    language = np.broadcast_to([[r.language] for r in measured.requests], shape)
    tokens = {"vision": [r.vision for r in measured.requests], "language": language, "output": measured.output}
    table = ProfileTable.from_arrays(
        SPACE, range(REQUESTS), np.zeros(shape), measured.latency_ms, stages_ms=measured.stages_ms, tokens=tokens
    )
    features = Features(table.sample_ids, measured.image, np.stack([r.feature for r in measured.requests]))
    return AdaptiveGuard.fit(table, features)


def bounded(guard, request, budget_ms):
    """Bounds before anything has run."""
    return guard.bounds_at_choice(request, budget_ms, Spent(), ALL)


@pytest.fixture
def system(vlm, guard, measured):
    reference_ms = float(np.median(measured.latency_ms[:, -1]))
    return AdaptiveVLM(vlm, controller(reference_ms), AdaptiveGuard.from_dict(guard.to_dict()))


def test_measured_is_what_the_requests_are(measured):
    assert measured.latency_ms.shape == (REQUESTS, 4) and (measured.latency_ms > 0).all()
    np.testing.assert_allclose(sum(measured.stages_ms.values()), measured.latency_ms)
    assert ((measured.prepared_ms > 0) & (measured.prepared_ms < measured.overview_ms)).all()
    assert measured.requests[0].vision.tolist() == [4, 4, 20, 20]
    assert ((measured.output >= 1) & (measured.output <= 4)).all()


def test_calibration_refits_this_machines_speed_and_needs_enough_requests(system, guard, measured):
    twice = {name: 2 * getattr(measured, name) for name in ("latency_ms", "overview_ms", "prepared_ms")}
    slower = replace(measured, **twice, stages_ms={name: 2 * ms for name, ms in measured.stages_ms.items()})
    here, found = calibrated(system, guard, measured, 0.05), calibrated(system, guard, slower, 0.05)
    np.testing.assert_allclose(np.exp(found.speed.normal - here.speed.normal), 2.0)
    request = measured.requests[0]
    assert bounded(found, request, 50.0).slowdown == pytest.approx(2 * bounded(here, request, 50.0).slowdown)
    assert found.speed.drift == {} and found.calibrated_on == REQUESTS
    assert (requests_needed(0.05), requests_needed(0.01)) == (28, 148)
    with pytest.raises(DataError, match=r"30 requests cannot calibrate a violation rate of 0\.01: that takes 148"):
        calibrated(system, guard, measured, 0.01)


def test_typical_times_are_the_medians_of_repeats(measured):
    def slower(factor):
        stages = {name: factor * ms for name, ms in measured.stages_ms.items()}
        overview_ms, prepared_ms = (factor * ms for ms in (measured.overview_ms, measured.prepared_ms))
        return replace(measured, overview_ms=overview_ms, prepared_ms=prepared_ms, stages_ms=stages)

    found = typical([slower(9.0), slower(2.0), measured])
    np.testing.assert_allclose(found.latency_ms, 2 * measured.latency_ms)
    np.testing.assert_allclose(found.image_ms, 2 * measured.image_ms)
    np.testing.assert_allclose(found.overview_ms, 2 * measured.overview_ms)
    np.testing.assert_allclose(found.prepared_ms, 2 * measured.prepared_ms)


def test_requests_are_bounded_and_learnt_from(system, measured):
    sample = next(TASK.samples("train", 2))
    ample = system.generate(sample.load_image(), sample.question, budget_ms=1e5, max_new_tokens=4)
    assert ample.feasible and ample.budget_met and ample.setting == SPACE.full
    assert 0 < ample.predicted_ms < 1e5
    assert len(system.guard.margin.group_offsets) == 4  # that of all, its image's, its length's and its budget's
    before = bounded(system.guard, measured.requests[0], 1e5).bounds_ms
    system.generate(sample.load_image(), sample.question, budget_ms=1e5, max_new_tokens=4)
    assert (bounded(system.guard, measured.requests[0], 1e5).bounds_ms != before).any()


@pytest.mark.parametrize("rehearsals", [2, 0])
def test_a_guard_keeps_nothing_of_a_rehearsal_but_what_was_added_to_it(system, rehearsals):
    guard = system.guard.copy()
    guard.own_ms, before = 0.0, {**guard.to_dict(), "other_ms": 0.0}
    made = AdaptiveVLM(system.vlm, system.controller, guard, rehearsals=rehearsals)
    assert made.guard is guard and (made.own_ms > 0) == (rehearsals > 0)
    assert guard.to_dict() == {**before, "other_ms": made.own_ms}


def test_what_was_learnt_is_saved_beside_the_controller(system, tmp_path):
    sample = next(TASK.samples("train", 2))
    system.generate(sample.load_image(), sample.question, budget_ms=1e5, max_new_tokens=4)
    assert load_guard(system.save_guard(tmp_path).parent).to_dict() == system.guard.to_dict()
    with pytest.raises(ConfigError, match="no guard"):
        AdaptiveVLM(system.vlm, system.controller, rehearsals=0).save_guard(tmp_path)


def test_a_setting_that_the_controller_never_learnt_is_never_chosen(vlm, guard):
    """The latency model has an opinion of it; the controller, which likes it best, does not know how good it is."""
    made = controller(bounds_ms=[10.0, 10.0, 10.0, None])
    system = AdaptiveVLM(vlm, made, AdaptiveGuard.from_dict(guard.to_dict()))
    sample = next(TASK.samples("train", 2))
    answer = system.generate(sample.load_image(), sample.question, budget_ms=1e5, max_new_tokens=2)
    assert answer.setting == SPACE.settings[2]


def test_what_is_done_where_nothing_fits(system, monkeypatch):
    sample = next(TASK.samples("train", 2))
    request = sample.load_image(), sample.question
    fastest = system.generate(*request, budget_ms=0.5)
    assert fastest.best_effort and not fastest.budget_met and fastest.setting == SPACE.cheapest
    monkeypatch.setattr(system.vlm, "encode_overview", lambda image: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=r"budget_ms=0.5 cannot be kept.*fastest setting is expected"):
        system.generate(*request, budget_ms=0.5, when_infeasible="reject")
    with pytest.raises(InputError, match=r"when_infeasible='never' is unknown.*cut='no' is unknown"):
        system.generate(*request, budget_ms=50, when_infeasible="never", cut="no")


def test_best_effort_takes_what_keeps_the_budget_on_average(system):
    """Bounds are far above what is expected, so nothing is promised; every setting is still likely to fit."""
    sample = next(TASK.samples("train", 2))
    request = sample.load_image(), sample.question
    budget = 12 * system.bounds(*request).predicted_ms.min()  # a margin is a factor of 20 at most
    for when, setting in (("best_effort", SPACE.full), ("fastest", SPACE.cheapest)):
        system.guard = system.guard.replaced(margin=flat(0.05, np.log(1e4)))
        answer = system.generate(*request, budget_ms=budget, max_new_tokens=2, when_infeasible=when)
        assert not answer.feasible and answer.setting == setting


def test_a_choice_is_revised_once_the_image_is_encoded(system, monkeypatch):
    """The image takes long: of the settings that share it only the cheaper one still keeps the budget."""
    sample = next(TASK.samples("train", 2))
    request, asked = (sample.load_image(), sample.question), []
    choose_again = decide.choose_again

    def after_a_slow_image(guard, chosen, index, budget_ms, spent, known):
        asked.append(index)
        found = choose_again(guard, chosen, index, budget_ms, spent, known)
        found.bounds.bounds_ms[index] = np.inf
        best = decide.best_allowed(found.values, found.bounds.bounds_ms, budget_ms)
        return decide.Decision(found.bounds, found.values, int(best))

    monkeypatch.setattr(decide, "choose_again", after_a_slow_image)
    answer = system.generate(*request, budget_ms=1e5, max_new_tokens=2)
    assert asked == [SPACE.index(SPACE.full)]
    assert answer.setting != SPACE.full and answer.setting["max_crops"] == SPACE.full["max_crops"]
    alone = system.vlm.generate(*request, answer.setting, max_new_tokens=2)
    assert answer.answer == alone.text and answer.feasible
    system.guard = system.guard.replaced(rule=Rule(revises=False))
    assert system.generate(*request, budget_ms=1e5, max_new_tokens=2).setting == SPACE.full and len(asked) == 1


def test_threads_may_share_a_model(system):
    """Four threads ask at once: each gets the answer to its own question, and the guard learns from all of them."""
    samples = list(TASK.samples("train", 8))
    alone = {
        s.sample_id: system.vlm.generate(s.load_image(), s.question, SPACE.full, max_new_tokens=3) for s in samples
    }

    def ask(sample):
        answer = system.generate(sample.load_image(), sample.question, budget_ms=1e6, max_new_tokens=3)
        return sample.sample_id, answer

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, samples * 3))
    assert len(answers) == 24
    for sample_id, answer in answers:
        assert answer.setting == SPACE.full and answer.feasible
        assert answer.answer == alone[sample_id].text and answer.num_hurried_tokens == 0
    assert system.guard.credit == pytest.approx(1 + 0.05 * len(answers))  # it has learnt from each of them


def test_the_image_cannot_be_revised(system):
    sample = next(TASK.samples("train", 2))
    with pytest.raises(KnobSpaceError, match="encoded at max_crops=4 already"):
        system.vlm.generate(
            sample.load_image(), sample.question, SPACE.full, revise=lambda image_ms: (SPACE.cheapest, None)
        )


def test_waiting_counts(system):
    sample = next(TASK.samples("train", 2))
    answer = system.generate(
        sample.load_image(), sample.question, budget_ms=300.0, max_new_tokens=2, arrived_s=time.perf_counter() - 10
    )
    assert answer.latency_ms > 10_000 and not answer.budget_met and answer.best_effort


def test_an_answer_that_would_be_late_goes_on_in_a_hurry(system):
    """Its own setting would take too long from the second token on: the rest is made as if that were the setting."""
    sample, quicker = next(TASK.samples("train", 2)), SPACE.setting(max_crops=4, top_k=4, num_active_blocks=2)
    image, vlm = sample.load_image(), system.vlm
    planned = vlm.generate(image, sample.question, SPACE.full, max_new_tokens=4)
    hurry = Deadline(at_s=time.perf_counter() + 100.0, step_ms=1e9, tokens=4, hurried=(Quicker(quicker, 1.0),))
    made = vlm.generate(image, sample.question, SPACE.full, max_new_tokens=4, deadline=hurry)
    ids = list(made.token_ids)
    assert ids[0] == planned.token_ids[0] and made.hurried == (quicker,) * (len(ids) - 1)
    layout = vlm.images.layout_of(image, 4)
    inputs = vlm.decoder_inputs(
        [vlm.embed_prompt(vlm.images.visual_tokens(image, 4), vlm.prompt.question_ids(sample.question), layout)]
    )
    with torch.inference_mode():
        with vlm.apply(SPACE.full):
            cache, first = vlm.decoder.prefill(inputs.prompts[0].embeddings[None])
        with vlm.apply(quicker):
            assert vlm.decoder.decode(cache, first, 4, None, inputs) == ids
    assert vlm.generate(image, sample.question, SPACE.full, max_new_tokens=4).token_ids == planned.token_ids


def test_a_pace_slows_down_for_nothing_and_stops_before_what_is_late():
    """Five tokens of 10 ms, or of 6 or 2 in a hurry; each may take a tenth more."""
    cheap, cheapest = SPACE.settings[1], SPACE.settings[0]
    steps = Quicker(cheap, 6.0), Quicker(cheapest, 2.0)
    pace = Pace(Deadline(at_s=0.1, step_ms=10.0, tokens=5, hurried=steps))
    assert pace.next(0.05, made=1) and pace.setting is None  # 4 x 11 ms in 50
    assert pace.next(0.06, made=2) and pace.setting is None  # 3 x 11 ms in 40
    assert pace.next(0.075, made=3) and pace.setting == cheap  # 1.5 times as long: 2 x 16.5 ms in 25 no longer, 2 x 9.9
    assert pace.next(0.076, made=4) and pace.setting == cheap  # 16.5 ms would do, but blocks that slept stay asleep
    assert pace.next(0.09, made=5) and pace.setting == cheapest  # 2.3 times: 15.4 ms in 10 no longer, 5.1 do
    assert not pace.next(0.097, made=6)  # 3.5 times: 7.7 ms in 3
    assert pace.hurried == [cheap, cheap, cheapest]
    assert Pace(Deadline(at_s=0.1, step_ms=10.0, cut=False)).next(0.2, made=1)


def test_a_prompt_that_would_be_read_too_late_is_read_in_a_hurry(system):
    """From its first block on: as at the quicker setting. From a later one on: what the others read stays."""
    sample, quicker = next(TASK.samples("train", 2)), SPACE.setting(max_crops=4, top_k=4, num_active_blocks=2)
    image, vlm = sample.load_image(), system.vlm
    planned, quick = (
        vlm.generate(image, sample.question, setting, max_new_tokens=4) for setting in (SPACE.full, quicker)
    )
    made = vlm.generate(image, sample.question, SPACE.full, max_new_tokens=4, deadline=Deadline.over(quicker))
    assert made.token_ids == quick.token_ids and made.hurried == (quicker,) * made.num_output_tokens
    assert made.saved_ms["prefill"] == pytest.approx(0.5)
    blocks = vlm.active_blocks(SPACE.full["num_active_blocks"])
    ample = Deadline(time.perf_counter() + 1e6, 1.0, 4, (Quicker(quicker, 0.5, 0.5),), read_ms=1.0)
    unhurried = vlm.generate(image, sample.question, SPACE.full, max_new_tokens=4, deadline=ample)
    assert (unhurried.token_ids, unhurried.hurried, unhurried.saved_ms) == (planned.token_ids, (), {})
    layout = vlm.images.layout_of(image, 4)
    inputs = vlm.decoder_inputs(
        [vlm.embed_prompt(vlm.images.visual_tokens(image, 4), vlm.prompt.question_ids(sample.question), layout)]
    )
    with torch.inference_mode(), vlm.apply(SPACE.full):
        whole = vlm.decoder.logits(inputs.prompts[0].embeddings[None])
        with vlm.paced(SPACE.full, vlm.pace(SPACE.full, ample)):
            assert torch.equal(vlm.decoder.logits(inputs.prompts[0].embeddings[None]), whole)
        pace = vlm.pace(SPACE.full, Deadline.over(quicker))
        pace.reads = lambda now_s, block: block not in blocks[1:-1]
        with vlm.paced(SPACE.full, pace):
            skipped = vlm.decoder.logits(inputs.prompts[0].embeddings[None])
        with vlm.only_blocks([blocks[0], blocks[-1]]):
            assert torch.equal(vlm.decoder.logits(inputs.prompts[0].embeddings[None]), skipped)
    assert vlm.generate(image, sample.question, SPACE.full, max_new_tokens=4).token_ids == planned.token_ids


def test_a_pace_reads_with_what_is_needed_and_no_less():
    """Four blocks of 10 ms, of 6 with fewer experts, two of them in the greatest hurry; then two tokens of 2 ms."""
    cheap, cheapest = SPACE.settings[1], SPACE.settings[0]
    quicker = Quicker(cheap, 6.0, 24.0), Quicker(cheapest, 2.0, 12.0)
    deadline = Deadline(at_s=0.1, step_ms=10.0, tokens=3, hurried=quicker, read_ms=40.0)
    blocks = (0, 1, 2, 3), (0, 1, 2, 3), (0, 3)
    pace = Pace(deadline, blocks)
    assert pace.reads(0.05, 0) and pace.level == 0  # 40 + 2 x 2 ms in 45
    assert pace.reads(0.062, 1) and pace.setting == cheap  # it took 1.2 times as long: 30 in 29 - 4 no longer, 18 do
    assert not pace.reads(0.085, 2) and pace.setting == cheapest  # 2.2 times: 12 in 6 - 4 no longer, 6 will have to do
    assert pace.reads(0.086, 3)
    pace.has_read()
    assert pace.hurried == [cheapest] and pace.saved_ms == {"prefill": pytest.approx(4 + 10 + 4)}
    assert pace.next(0.092, made=1) and pace.hurried == [cheapest] * 2 and pace.saved_ms["decode"] == 10 - 2


@pytest.mark.parametrize("seed", range(20))
def test_a_look_at_the_clock_says_when_reading_need_not_be_asked(seed):
    """Asked before each block, or only when ``in_time_s`` is over: the same blocks read with as much."""
    random = np.random.default_rng(seed)
    blocks = (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (0, 2, 5)
    for _ in range(50):
        read_ms, at_s = random.uniform(10, 60), 1 + random.uniform(0.02, 0.1)
        quicker = [Quicker(SPACE.settings[1], 3.0, read_ms / 2), Quicker(SPACE.settings[0], 1.0, read_ms / 4)]
        deadline = Deadline(at_s, 5.0, 3, tuple(quicker[: random.integers(3)]), read_ms=read_ms)
        always, seldom, now_s = Pace(deadline, blocks), Pace(deadline, blocks), 1.0
        for block in blocks[0]:
            wanted = always.reads(now_s, block)
            assert (now_s <= seldom.in_time_s.get(block, LONG_AGO_S) or seldom.reads(now_s, block)) == wanted
            assert seldom.level == always.level
            now_s += wanted * random.choice([0.7, 1.0, 1.5, 4.0]) * always.block_ms[always.level] / 1e3
        assert seldom.saved_ms == pytest.approx(always.saved_ms)


def test_an_answer_stops_before_the_token_that_would_be_late(system):
    """Every step is expected to take longer than there is left after the first token."""
    sample = next(TASK.samples("train", 2))
    full = system.vlm.generate(sample.load_image(), sample.question, SPACE.full, max_new_tokens=4)
    late = Deadline(at_s=0.0, step_ms=1.0)
    cut = system.vlm.generate(sample.load_image(), sample.question, SPACE.full, max_new_tokens=4, deadline=late)
    if full.num_output_tokens == 1:
        assert cut.token_ids == full.token_ids and cut.finish_reason == "stop"
    else:
        assert cut.token_ids == full.token_ids[:1] and cut.finish_reason == "budget"
    ample = Deadline(at_s=1e12, step_ms=1.0)
    again = system.vlm.generate(sample.load_image(), sample.question, SPACE.full, max_new_tokens=4, deadline=ample)
    assert (again.token_ids, again.finish_reason) == (full.token_ids, full.finish_reason)


def test_both_systems_get_the_same_requests(system, measured):
    samples = list(TASK.samples("validation", 12))
    reference_ms = float(np.median(measured.latency_ms[:, -1]))
    records = run_live(system, TASK, samples, num_requests=20, reference_ms=reference_ms, load=1, progress=False)
    assert len(records) == 40
    by_number = {n: {r.system: r for r in records if r.number == n} for n in range(20)}
    for pair in by_number.values():
        assert pair["guarded"].sample_id == pair["unguarded"].sample_id
        assert pair["guarded"].budget_ms == pair["unguarded"].budget_ms
    assert [pair["guarded"].phase for pair in by_number.values()] == ["before"] * 6 + ["loaded"] * 7 + ["after"] * 7
    found = summary(records, 0.05)
    assert found["requests"] == 20 and set(found["systems"]) == {"guarded", "unguarded"}
    json.dumps(found, allow_nan=False)


def test_the_price_of_the_guarantee_by_hand(system, measured):
    """Only the dearest setting is right. It takes 30 ms of the budget's 40, which the guard's bound does not allow."""
    system.guard = system.guard.replaced(margin=flat(0.05, np.log(10.0)))
    right = np.tile([0.0, 0.0, 0.0, 1.0], (REQUESTS, 1))
    scale = 30.0 / measured.latency_ms[:, -1:]
    known = replace(measured, accuracy=right, latency_ms=measured.latency_ms * 0 + scale * measured.latency_ms[:, -1:])
    found = price_of_guarantee(system, TASK, known, 40.0, (1.0,))
    assert found["true latencies"] == 1.0 and found["guard"] < 1.0 and found["late"] == 0.0


def flat(alpha, score):
    """A margin that has seen one score only, at both moments."""
    return Margin(alpha, {"overview": [score] * 100, "image": [score] * 100})


def of_one_length(measured, total_ms, output, step_ms=10.0):
    """As measured, but every answer has as many tokens, and each takes as long."""
    shape = measured.latency_ms.shape
    stages = {name: np.zeros(shape) for name in measured.stages_ms}
    stages["prefill"], stages["decode"] = np.full(shape, step_ms), np.full(shape, step_ms * (output - 1))
    latency = np.full(shape, float(total_ms))
    right, tokens = np.ones(shape), np.full(shape, float(output))
    return replace(
        measured,
        accuracy=right,
        output=tokens,
        latency_ms=latency,
        overview_ms=np.zeros(shape),
        prepared_ms=np.zeros(shape),
        stages_ms=stages,
        steps_ms=None,
    )


class Asked:
    """A task that finds every answer a quarter right, and what a model was asked on its behalf."""

    max_new_tokens = 5

    def __init__(self, system, monkeypatch) -> None:
        self.answers, generate = [], system.vlm.generate
        monkeypatch.setattr(
            system.vlm, "generate", lambda *a, **k: self.answers.append(generate(*a, **k)) or self.answers[-1]
        )

    def score(self, text, sample):
        return 0.25


@pytest.mark.parametrize(("budget_ms", "made"), [(60.0, None), (45.0, 4), (35.0, 3), (5.0, 1)])
def test_a_replayed_answer_is_cut_where_its_deadline_would_cut_it(system, measured, monkeypatch, budget_ms, made):
    """Five tokens in 50 ms. One that is cut is made by the model, to see whether it is right."""
    system.own_ms, asked = 0.0, Asked(system, monkeypatch)
    system.guard = system.guard.replaced(margin=flat(0.05, np.log(0.8)), rule=Rule(hurries=False))
    given = of_one_length(measured, 50.0, 5)
    (found,) = replay(system, asked, given, reference_ms=budget_ms, budget_shares=(1.0,), num_requests=1)
    assert (found.accuracy, found.cut, found.hurried) == ((0.25, True, False) if made else (1.0, False, False))
    assert [answer.num_output_tokens for answer in asked.answers] == ([made] if made else [])
    assert found.late == (budget_ms < 10 and found.promised)


@pytest.mark.parametrize(
    ("budget_ms", "read_ms", "hurried", "made"),
    [(6000.0, 0.0, False, 5), (3200.0, 0.0, True, 5), (2000.0, 0.0, True, 3), (2100.0, 1000.0, True, 5)],
)
def test_a_replayed_answer_is_hurried_where_its_deadline_would_hurry_it(
    system, measured, monkeypatch, budget_ms, read_ms, hurried, made
):
    """A second for each of five tokens, or, in a hurry, .4 for each after the first: 2.6 in all. In 2 there are three.

    Where the prompt may be read in a hurry, in .4 s in place of 1, all five are there in 2.
    The tiny model is expected to take milliseconds, so the full setting is chosen whatever else runs here.
    """
    system.own_ms, quicker = 0.0, SPACE.setting(max_crops=4, top_k=4, num_active_blocks=2)
    system.guard = system.guard.replaced(margin=flat(0.05, np.log(0.8)))
    steps = (Quicker(quicker, 400.0, 400.0),)
    monkeypatch.setattr(
        "budgetvlm.live.replay.deadline_of",
        lambda guard, setting, look, index, at_s, cut: Deadline(at_s, 1000.0, 5, steps, cut, read_ms),
    )
    given = of_one_length(measured, 5000.0, 5, 1000.0)
    given.stages_ms["decode"][:, SPACE.index(quicker)] = 1600.0
    asked = Asked(system, monkeypatch)
    (found,) = replay(system, asked, given, reference_ms=budget_ms, budget_shares=(1.0,), num_requests=1)
    expected = (0.25, True, made < 5) if hurried else (1.0, False, False)
    assert (found.accuracy, found.hurried, found.cut, found.late) == (*expected, False)
    sample = given.samples[0]
    at_once = Deadline.over(quicker) if read_ms else Deadline.at_once(quicker)
    alone = system.vlm.generate(sample.load_image(), sample.question, SPACE.full, max_new_tokens=made, deadline=at_once)
    assert [answer.token_ids for answer in asked.answers[:-1]] == ([alone.token_ids] if hurried else [])
    assert all(answer.hurried == alone.hurried for answer in asked.answers[:-1])


def as_predicted(measured, latency):
    """As measured, but every stage takes what the latency model says."""
    shape = measured.latency_ms.shape
    times = np.zeros((len(latency.stages), *shape))
    for (row, k), tokens in np.ndenumerate(measured.output):
        request = measured.requests[row]
        times[:, row, k] = latency.stages_of(k, request.vision, request.language, tokens)
    stages = {name: np.zeros(shape) for name in measured.stages_ms} | dict(zip(latency.stages, times, strict=True))
    nothing = np.zeros(shape)
    return replace(
        measured,
        latency_ms=times.sum(axis=0),
        overview_ms=nothing,
        prepared_ms=nothing,
        stages_ms=stages,
        steps_ms=None,
    )


def test_a_replay_learns_as_it_would_live(system, measured):
    """Twice as slow from the first request on: in the end the guard has seen it."""
    given = as_predicted(measured, system.guard.latency)
    options = {"budget_shares": (0.5, 1.0), "num_requests": 90, "reference_ms": float(np.median(given.latency_ms))}
    replay(system, TASK, given, speed=lambda number: 2.0, **options)
    assert bounded(system.guard, measured.requests[0], 1e5).slowdown == pytest.approx(2.0, rel=0.02)
    replay(system, TASK, given, **options)
    assert bounded(system.guard, measured.requests[0], 1e5).slowdown == pytest.approx(1.0, rel=0.02)


def test_a_replay_follows_the_speed_of_all_runs_of_a_request(system, measured):
    """Eight settings were run one after the other: more than it takes to see that all of them were slow."""
    given = as_predicted(measured, system.guard.latency)
    replay(system, TASK, given, speed=lambda number: 2.0, budget_shares=(1.0,), num_requests=1, reference_ms=1e5)
    assert bounded(system.guard, measured.requests[0], 1e5).slowdown == pytest.approx(2.0, rel=0.02)


def record(number, violated, promised=True, **changes):
    return LiveRecord(
        **{
            "system": "guarded", "number": number, "phase": "before", "sample_id": str(number),
            "groups": {"kind": "a" if number % 2 else "b"}, "budget_share": 0.5, "budget_ms": 50.0,
            "latency_ms": 60.0 if violated else 40.0, "controller_ms": 0.5, "promised": promised,
            "violated": violated, "accuracy": 1.0, "finish_reason": "stop", "setting": {}, **changes,
        }
    )  # fmt: skip


def test_violations_are_of_promises_alone():
    records = [record(n, violated=n < 10, promised=n >= 5) for n in range(100)]
    figures = summary(records, 0.05)["systems"]["guarded"]["all"]
    assert (figures["violations"], figures["violation_rate"]) == (5, 0.05)
    assert (figures["infeasible"], figures["infeasible_over"]) == (5, 5)
    low, high = figures["interval"]
    assert low == pytest.approx(0.0215, abs=1e-3) and high == pytest.approx(0.1118, abs=1e-3)  # Wilson 1927
    assert figures["used_median"] == pytest.approx(0.8)


def test_the_worst_group_is_one_that_is_large_enough():
    records = [record(n, violated=n % 2 == 1 and n < 100) for n in range(500)]
    records += [record(n, violated=True, groups={"kind": "rare"}) for n in range(500, 510)]
    worst = summary(records, 0.05)["systems"]["guarded"]["worst_group"]
    assert (worst["label"], worst["name"], worst["violations"], worst["requests"]) == ("kind", "a", 50, 250)


def test_the_commands(system, directory, tmp_path, capsys):
    system.controller.save_pretrained(tmp_path / "controller")
    where = ["--model_path", str(directory), "--checkpoint", str(tmp_path / "controller")]
    assert main(["calibrate", *where, "--samples", "28"]) == 2
    assert "no guard.json lies beside the controller" in capsys.readouterr().err
    (tmp_path / "controller" / "guard.json").write_text(json.dumps(system.guard.to_dict()))
    assert main(["calibrate", *where, "--samples", "20"]) == 2
    assert "--samples 20 cannot promise a violation rate of 0.05: that takes 28" in capsys.readouterr().err
    assert main(["calibrate", *where, "--samples", "28", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["stages"]) == {"preprocess", "vision", "prefill", "decode"} and document["alpha"] == 0.05
    assert document["hurries"]
    assert main(["calibrate", *where, "--samples", "28", "--no_hurry"]) == 0
    assert not load_guard(tmp_path / "controller").rule.hurries
    capsys.readouterr()
    live = ["evaluate", "--live", *where, "--num_requests", "10", "--output_dir", str(tmp_path / "out")]
    assert main([*live, "--truth", "3", "--truth_repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "10 requests on the real clock" in out and "guarded" in out and "unguarded" in out
    assert "replayed on the times of 3 requests" in out and "replayed on the medians of times of 3 requests" in out
    assert len(json.loads((tmp_path / "out" / "live.json").read_text())["records"]) == 20
    assert main(live) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*live, "--overwrite", "--mean_budget_ms", "50"]) == 2
    assert "--mean_budget_ms is of an evaluation on a table" in capsys.readouterr().err
    assert main(["evaluate", "--live"]) == 2
    assert "needs a trained controller" in capsys.readouterr().err


def test_busy_processes_end_with_a_run_that_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal\n"
        "from multiprocessing import active_children\n"
        "from budgetvlm.live.live_evaluation import busy_processes\n"
        "if __name__ == '__main__':\n"
        "    with busy_processes(1) as busy:\n"
        "        busy.set()\n"
        "        print(active_children()[0].pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # All of them hold the pipe, so it is closed when the last of them has ended.
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL and done.stdout.strip()

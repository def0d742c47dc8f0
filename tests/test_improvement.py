"""Learning from served requests: what is read, what is learnt, who is promoted; on worlds whose answers are known."""

import json
import math
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from budgetvlm.cli import main
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.versions import versions_of
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.feedback.candidate import doubly_robust_outcomes, train_candidate
from budgetvlm.feedback.improvement import OnTrial, look
from budgetvlm.feedback.judge import judge
from budgetvlm.feedback.outcome_model import OutcomeModel
from budgetvlm.feedback.request_store import Decided, RequestStore
from budgetvlm.feedback.served_log import ServedLog

KNOBS = {"top_k": [1, 2, 4]}
EXPECTED = (0.9, 0.7, 0.6)  # what the present controller thinks of its settings, whatever is asked
ALL = np.ones(3, dtype=bool)


def controller(values=EXPECTED):
    torch.manual_seed(0)
    made = GRPOController(
        4, 2, budget_dim=4, hidden_dim=16, knob_values=KNOBS, latency_reference_ms=30.0,
        latency_ms=[10.0, 20.0, 30.0], bounds_ms=[12.0, 24.0, 36.0], default_price=0.0,
    )  # fmt: skip
    made.start_from(values)
    return made.eval()


PRESENT = controller()


def served(count, truth, explored=0.1, trial=None, share=0.0, seed=0, start_s=0.0):
    """Requests of two kinds, told by the sign of their first feature; ``truth``: mean scores of both, ``[2, K]``."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=count)
    image = rng.normal(size=(count, 4)) * 0.3
    image[:, 0] += np.where(kind, 3.0, -3.0)
    asked = ServedLog.unserved(Features([str(i) for i in range(count)], image, rng.normal(size=(count, 2))), PRESENT)
    probabilities = (1 - explored - share) * asked.choices_by(PRESENT) + explored / 3
    probabilities += share * (asked.choices_by(trial) if trial else 0)
    chosen = (probabilities.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    scores = (rng.random(count) < np.array(truth)[kind, chosen]).astype(float)
    at_s = start_s + np.arange(count) / count
    return replace(asked, chosen=chosen, probabilities=probabilities, scores=scores, at_s=at_s), kind


AS_EXPECTED = (EXPECTED, EXPECTED)
SHIFTED = (EXPECTED, (0.1, 0.2, 0.9))  # the second kind now needs the last setting


@pytest.fixture(scope="module")
def shifted():
    """A log of a shift, the kinds of its requests, what was learnt from it, and the candidate."""
    log, kind = served(300, SHIFTED)
    model = OutcomeModel.fit(log, PRESENT)
    return log, kind, model, train_candidate(PRESENT, log, model)


# ---- what is read


def stored(store, name, image=4, knobs=KNOBS, allowed=0b11000000, probabilities=(0.25, 0.75, 0.0), first=0.0):
    seen = np.append(first, np.arange(1, image)).astype(np.float16)
    features = seen.tobytes(), np.array([0.5, -0.5], np.float16).tobytes()
    bits, of = bytes([allowed]), np.array(probabilities, np.float32).tobytes()
    store.add(partial(Decided, name, f"by {name}", json.dumps(knobs), *features, 20.0, 0.1, bits, 1, of, 2, 50.0, 30.0))


@pytest.fixture
def store(tmp_path):
    made = RequestStore(tmp_path / "requests.sqlite", 16)
    yield made
    made.close()


def test_requests_are_read_as_they_were_decided_with_the_scores_of_what_was_chosen(store, tmp_path):
    for name in ("a", "b", "c"):
        stored(store, name)
    stored(store, "nothing allowed", allowed=0)
    stored(store, "no number", first=np.nan)
    stored(store, "others", knobs={"top_k": [1, 8]})
    assert store.feedback("b", 0.5).result() and store.shadow("c", "drawn", 0, 1.0).result()
    log = ServedLog.read(tmp_path / "requests.sqlite", PRESENT)
    assert log.ids.tolist() == ["a", "b", "c"] and log.controllers.tolist() == ["by a", "by b", "by c"]
    assert log.image[0].tolist() == [0, 1, 2, 3] and log.language[0].tolist() == [0.5, -0.5]
    assert (log.seen_ms == 20).all() and (log.price == 0.1).all() and log.allowed[0].tolist() == [True, True, False]
    assert log.chosen.tolist() == [1, 1, 1] and log.probabilities[0].tolist() == [0.25, 0.75, 0.0]
    assert log.is_scored.tolist() == [False, True, False] and log.scored.scores.tolist() == [0.5]
    drawn = ServedLog.read(tmp_path / "requests.sqlite", PRESENT, "shadow").scored
    assert (drawn.ids.tolist(), drawn.chosen.tolist(), drawn.scores.tolist()) == (["c"], [0], [1.0])
    assert drawn.probabilities.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("fill", "error", "said"),
    [
        (lambda store: None, DataError, "it is empty"),
        (lambda store: stored(store, "a", knobs={"top_k": [1, 8]}), DataError, "controllers of other knobs"),
        (lambda store: stored(store, "a", image=5), DataError, "1 of 1 requests .* have other features than the 4"),
        (lambda store: stored(store, "a", probabilities=(0.25, 0.75)), DataError, "1 of 1 requests .* are damaged"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(store, tmp_path, fill, error, said):
    fill(store)
    store.close()
    with pytest.raises(error, match=said):
        ServedLog.read(tmp_path / "requests.sqlite", PRESENT)


def test_what_cannot_be_learnt_from_is_left_out_and_counted(store, tmp_path):
    stored(store, "good")
    stored(store, "nothing fits", allowed=0)
    store.close()
    said = []
    log = ServedLog.read(tmp_path / "requests.sqlite", PRESENT, say=said.append)
    assert log.ids.tolist() == ["good"]
    assert said == ["1 of 2 requests are left out: no setting was sure to keep their budget, so nothing was chosen"]


def test_a_file_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        ServedLog.read(tmp_path, PRESENT)
    with pytest.raises(ConfigError, match="does not exist"):
        ServedLog.read(tmp_path / "none.sqlite", PRESENT)
    (tmp_path / "text").write_text("text " * 1000)
    with pytest.raises(ConfigError, match="cannot be read"):
        ServedLog.read(tmp_path / "text", PRESENT)


def test_a_controller_chooses_by_value_less_price_among_what_was_allowed():
    log, _ = served(1, AS_EXPECTED)
    assert log.values_by(PRESENT)[0] == pytest.approx(EXPECTED, abs=1e-6)
    assert log.choices_by(controller((0.6, 0.9, 0.95)))[0].tolist() == [0, 0, 1]
    priced = replace(log, price=np.array([0.5]))  # a third of it for each further setting: 0.43, 0.57, 0.45
    assert priced.choices_by(controller((0.6, 0.9, 0.95)))[0].tolist() == [0, 1, 0]
    held = replace(log, allowed=np.array([[True, False, True]]))
    assert held.choices_by(controller((0.6, 0.99, 0.7)))[0].tolist() == [0, 0, 1]


# ---- what is learnt


def test_nothing_is_learnt_from_scores_that_are_as_expected():
    log, _ = served(300, AS_EXPECTED)
    model = OutcomeModel.fit(log, PRESENT)
    assert not model.learnt and model.predict(log) == pytest.approx(log.values_by(PRESENT))


def test_what_is_learnt_holds_for_like_requests_and_the_settings_that_were_tried(shifted):
    _, _, model, _ = shifted
    fresh, kind = served(100, SHIFTED, seed=5)
    first, last = model.predict(fresh)[:, [0, 2]].T
    assert model.learnt
    assert abs(first[kind == 0].mean() - 0.9) < 0.1 and abs(first[kind == 1].mean() - 0.1) < 0.15
    assert last[kind == 1].mean() > first[kind == 1].mean() + 0.3


def test_a_known_score_corrects_what_is_expected_by_its_clipped_weight():
    log, _ = served(40, AS_EXPECTED)
    model = OutcomeModel.fit(log, PRESENT)  # learns nothing: it expects 0.9, 0.7, 0.6
    one = replace(log.rows(np.arange(2)), chosen=np.array([0, 2]), scores=np.array([0.0, np.nan]))
    made = doubly_robust_outcomes(replace(one, probabilities=np.tile([0.75, 0.05, 0.2], (2, 1))), model)
    assert made == pytest.approx(np.array([[0.9 - 0.9 / 0.75, 0.7, 0.6], EXPECTED]), abs=1e-6)
    made = doubly_robust_outcomes(replace(one, probabilities=np.tile([0.05, 0.75, 0.2], (2, 1))), model)
    assert made[0, 0] == pytest.approx(0.9 - 2 * 0.9, abs=1e-6)


def test_a_candidate_chooses_what_the_shift_asks_for_and_keeps_everything_else(shifted):
    _, _, _, candidate = shifted
    fresh, kind = served(200, SHIFTED, seed=6)
    choices = fresh.choices_by(candidate).argmax(axis=1)
    assert (choices[kind == 1] == 2).mean() > 0.9 and (choices[kind == 0] == 0).mean() > 0.9
    assert candidate.config == PRESENT.config
    assert torch.equal(candidate.image_input.mean, PRESENT.image_input.mean)


# ---- who is promoted


@pytest.mark.parametrize(
    ("values", "truth", "decision"),
    [
        ((0.1, 0.2, 0.9), (SHIFTED[1], SHIFTED[1]), "promote"),
        ((0.1, 0.2, 0.9), (EXPECTED, (0.9, 0.5, 0.1)), "refuse"),
        ((0.1, 0.9, 0.2), (EXPECTED, (0.6, 0.7, 0.6)), "wait"),  # -0.2 and +0.1: too close for so few
        (EXPECTED, SHIFTED, "refuse"),  # chooses alike: its gain is surely nothing
    ],
)
def test_a_candidate_is_judged_by_the_requests_of_its_trial(values, truth, decision):
    candidate = controller(values)
    log, _ = served(300, truth, trial=candidate, share=0.4, seed=3)
    verdict = judge(log, candidate, PRESENT, log.values_by(PRESENT))
    assert verdict.decision == decision and verdict.scores == 300
    assert verdict.low <= verdict.gain <= verdict.high
    assert (verdict.differ == 0) == (values == EXPECTED) == (verdict.gain == 0)


def test_a_later_candidate_has_to_be_surer_and_without_scores_there_is_no_verdict():
    log = served(1, AS_EXPECTED)[0].rows(np.zeros(0, dtype=int))
    verdicts = [judge(log, PRESENT, PRESENT, np.empty((0, 3)), n) for n in (1, 2, 3)]
    assert {verdict.decision for verdict in verdicts} == {"wait"}
    assert [v.alpha for v in verdicts] == pytest.approx([0.05 * 6 / math.pi**2 / n**2 for n in (1, 2, 3)])
    assert sum(0.05 * 6 / math.pi**2 / n**2 for n in range(1, 10_000)) < 0.05


def test_a_candidate_that_is_not_tried_is_not_judged():
    log, _ = served(300, (SHIFTED[1], SHIFTED[1]), explored=0.0)
    verdict = judge(log, controller((0.1, 0.2, 0.9)), PRESENT, log.values_by(PRESENT))
    assert verdict.decision == "wait" and "--trial" in verdict.why


def test_a_look_trains_a_candidate_judges_it_and_changes_nothing_without_reason(shifted):
    log, _, _, _ = shifted
    assert "too few" in look(log.rows(np.arange(10)), PRESENT).why
    assert "nothing to learn" in look(served(300, AS_EXPECTED)[0], PRESENT).why
    found = look(log, PRESENT)
    assert found.verdict is None and found.expected > 0.2
    later, _ = served(300, SHIFTED, trial=found.fresh, share=0.4, seed=4, start_s=10.0)
    both = ServedLog(*(np.concatenate(pair) for pair in zip(vars(log).values(), vars(later).values(), strict=True)))
    judged = look(both, PRESENT, OnTrial(found.fresh, 2, since_s=5.0))
    assert judged.verdict.decision == "promote" and judged.verdict.scores == 300 and judged.fresh is None


# ---- the command


def kept_in(store, log):
    for row in range(len(log)):
        one = log.rows(np.array([row]))
        name = f"{one.at_s[0]}"
        blobs = [part[0].astype(kind).tobytes() for part, kind in ((one.image, "f2"), (one.language, "f2"))]
        of = np.packbits(one.allowed[0]).tobytes(), int(one.chosen[0]), one.probabilities[0].astype("f4").tobytes()
        store.add(partial(Decided, name, "d", json.dumps(KNOBS), *blobs, 100.0, 0.0, *of, 0, None, 30.0))
        assert store.feedback(name, float(one.scores[0])).result()


def test_update_puts_a_candidate_on_trial_and_lets_it_serve_once_it_is_proven(store, tmp_path, shifted, capsys):
    directory, file = tmp_path / "controller", tmp_path / "requests.sqlite"
    PRESENT.save_pretrained(directory)
    words = ["update", "--requests", str(file), "--checkpoint", str(directory), "--json"]

    def update(*more):
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    kept_in(store, shifted[0].rows(np.arange(150)))
    assert update("--dry_run")["new_candidate"] is None and versions_of(directory) == []
    first = update()
    assert (first["scores"], first["verdict"], first["new_candidate"]) == (150, None, 2)
    candidate = load_controller(directory / "versions" / "0002")
    assert load_controller(directory).heads.bias.tolist() == PRESENT.heads.bias.tolist()
    time.sleep(0.01)
    kept_in(store, served(150, SHIFTED, trial=candidate, share=0.5, seed=4, start_s=10.0)[0])
    second = update()
    assert second["on_trial"] == 2 and second["verdict"]["decision"] == "promote"
    assert [version.status for version in versions_of(directory)] == ["replaced", "serving"]
    assert load_controller(directory).heads.bias.tolist() == candidate.heads.bias.tolist()
    assert versions_of(directory)[1].trained_on["scores"] == 150


def test_a_candidate_is_not_judged_by_what_it_learnt_though_the_clock_was_set_back(store, tmp_path, shifted, capsys):
    """The server's clock was ahead when these were served, so that they seem to be of the trial."""
    PRESENT.save_pretrained(tmp_path / "controller")
    words = ["update", "--requests", str(tmp_path / "requests.sqlite"), "--checkpoint", str(tmp_path / "controller")]
    kept_in(store, shifted[0].rows(np.arange(150)))
    with closing(sqlite3.connect(tmp_path / "requests.sqlite")) as connection, connection:
        connection.execute("UPDATE requests SET at_s = at_s + 36000 - number")  # and it was set back while they came
    assert main([*words, "--json"]) == main([*words, "--json"]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (second["on_trial"], second["verdict"]["scores"], second["action"]) == (2, 0, "trial")


def test_update_says_what_is_wrong(tmp_path, capsys):
    PRESENT.save_pretrained(tmp_path / "controller")
    assert main(["update", "--requests", str(tmp_path / "none"), "--checkpoint", str(tmp_path / "controller")]) == 2
    GRPOController(4, 2, knob_values=KNOBS).save_pretrained(tmp_path / "untrained")
    assert main(["update", "--requests", str(tmp_path / "none"), "--checkpoint", str(tmp_path / "untrained")]) == 2
    assert "knows no setting's latency" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["update", "--requests", "r", "--checkpoint", str(tmp_path / "controller"), "--seed", str(10**22)])
    assert "is no seed" in capsys.readouterr().err

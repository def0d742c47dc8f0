"""What clients may say of an answer, and which settings are tried to learn from."""

import math
import random
import sqlite3

import numpy as np
import pytest

from budgetvlm import decide
from budgetvlm.answer import InFlight
from budgetvlm.decide import CLEARLY_WORSE, Decision, Terms, Trial, check_request
from budgetvlm.errors import ConfigError, InputError
from budgetvlm.guard.bounds import Bounds
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.shadows import agreement
from tests.fake_replicas import served, until


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "requests.sqlite"


@pytest.fixture(scope="module")
def server(file):
    with served(log_requests=file, word_s=0.001, store_questions=True) as running:
        yield running


def say(server, **body):
    return server.ask(body, path="/v1/feedback")


def kept(file, sql):
    connection = sqlite3.connect(file)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_feedback_is_kept_and_may_be_said_again(server, file):
    _, _, document = server.chat(latency_budget_ms=5000)
    name = document["id"]
    for score in (0, 1.0, 1.0):
        assert say(server, id=name, score=score)[::2] == (200, {"object": "feedback", "id": name, "score": score})
        assert kept(file, f"SELECT score FROM scores WHERE id = '{name}'") == [(score,)]
    found = kept(file, f"SELECT budget_ms, question, chosen, probabilities FROM requests WHERE id = '{name}'")
    assert found == [(5000.0, "read the sign in red", 1, b"probable")]


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"id": "chatcmpl-nobody", "score": 1}, 404, "answer_not_found", "no answer of this id is kept"),
        ({"id": "chatcmpl-nobody", "score": 1.5}, 400, "invalid_request", "score"),
        ({"id": "chatcmpl-nobody", "score": -0.1}, 400, "invalid_request", "score"),
        ({"id": "chatcmpl-nobody", "score": math.nan}, 400, "invalid_request", "score"),
        ({"id": "chatcmpl-nobody"}, 400, "invalid_request", "score"),
        ({"score": 1}, 400, "invalid_request", "id"),
        ({"id": "x" * 201, "score": 1}, 400, "invalid_request", "id"),
    ],
)
def test_what_is_wrong_with_feedback_is_said(server, body, status, code, says):
    found, _, document = say(server, **body)
    assert (found, document["error"]["code"]) == (status, code)
    assert says in document["error"]["message"]


def test_the_route_stands_in_the_description_and_counts(server):
    described = server.get("/openapi.json")["paths"]["/v1/feedback"]["post"]
    assert "worth" in described["description"]
    say(server, id="chatcmpl-nobody", score=1)
    assert 'path="/v1/feedback",status="404"' in server.get("/metrics")
    assert "budgetvlm_requests_not_kept_total 0.0" in server.get("/metrics")


def test_without_a_store_the_answer_says_how_to_get_one():
    with served() as server:
        status, _, document = say(server, id="chatcmpl-1", score=1)
    assert (status, document["error"]["code"]) == (404, "feedback_off")
    assert "--log_requests" in document["error"]["message"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"explore": 1.5, "log_requests": "f"}, "explore=1.5"),
        ({"shadow": -0.5, "log_requests": "f"}, "shadow=-0.5"),
        ({"shadow": 0.1}, "shadow is for learning.*log_requests"),
        ({"trial": 1.5}, "trial=1.5"),
        ({"trial": 0.6, "explore": 0.5, "log_requests": "f"}, "explore=0.5 and trial=0.6 are more than all"),
        ({"update_every": 60.0, "checkpoint": "c"}, "update_every is for learning.*log_requests"),
        ({"update_every": 60.0, "log_requests": "f"}, "update_every changes the controller.*copy it"),
        ({"update_every": 0.0, "log_requests": "f", "checkpoint": "c"}, "update_every=0.0 is not a positive"),
        ({"update_data": "d"}, "update_data is for updates.*update_every"),
        ({"update_data": "d"}, "update_data=d is no file"),
        ({"update_every": 60.0, "log_requests": "f", "checkpoint": __file__}, "directory; give .*tests"),
        ({"explore": 0.1}, "explore is for learning.*log_requests"),
        ({"store_questions": True}, "store_questions is for learning"),
        ({"log_requests": "f", "store_mb": 1}, "store_mb=1 is less than 16"),
    ],
)
def test_options_that_cannot_work_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        ServeOptions(**options)


# ---- shadow answers


def test_in_idle_time_a_request_is_answered_again_and_the_agreement_is_its_score(tmp_path):
    file = tmp_path / "requests.sqlite"
    with served(log_requests=file, shadow=1.0, word_s=0.001) as server:
        name = server.chat()[2]["id"]
        until(lambda: len(kept(file, "SELECT * FROM scores")) == 2)
        found = kept(file, "SELECT id, source, setting, score FROM scores ORDER BY source")
        begun, requests = server.replicas[0].begun, kept(file, "SELECT id FROM requests")
    assert requests == [(name,)], "a shadow answer is no request"
    assert found[0] == (name, "agreement", 1, 1.0)
    assert found[1][:2] == (name, "drawn") and found[1][2] in (0, 1) and found[1][3] == 1.0  # 2 and 3 were not allowed
    settings = [{"max_crops": 1, "top_k": 1}, {"max_crops": 1, "top_k": 2}]
    assert [job.setting for job in begun] == [None, {"max_crops": 4, "top_k": 2}, settings[found[1][2]]]
    assert {job.budget_ms for job in begun[1:]} == {math.inf}


def test_a_shadow_answer_ends_when_somebody_comes_and_is_not_kept(tmp_path):
    file = tmp_path / "requests.sqlite"
    with served(log_requests=file, shadow=1.0, word_s=0.5) as server:
        server.chat()
        replica = server.replicas[0]
        until(lambda: len(replica.begun) == 2)
        status, _, document = server.chat()
        assert status == 200 and document["choices"][0]["message"]["content"] == "red blue green"
        shadow, real = replica.begun[1:3]
        assert shadow.id in replica.stopped and real.kind == "answer" and real.setting is None
        assert len(replica.said[shadow.id]) < 3
        assert kept(file, "SELECT * FROM scores") == []


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("Red.", "red", 1.0),
        (" a  red sign", "A red sign!", 1.0),
        ("red", "blue", 0.0),
        ("", "red", 0.0),
        ("3", "3.", 1.0),
    ],
)
def test_answers_agree_whatever_their_case_punctuation_and_space(text, right, score):
    assert agreement(text, right) == score


# ---- exploration

VALUES = np.array([0.5, 0.7, 0.65, 0.7 - CLEARLY_WORSE - 0.01, 0.72])
BUDGET_MS = 40.0


def decision(bounds=(10.0, 20.0, 30.0, 15.0, 50.0), best=1):
    times = np.zeros((8, len(VALUES)))
    times[0] = bounds
    return Decision(Bounds(times, 0), VALUES, best)


RIVAL = decision(best=3)._replace(values=np.array([0.1, 0.1, 0.1, 0.9, 0.1]))


@pytest.mark.parametrize(
    ("share", "rival", "trial", "expected"),
    [
        (0.4, None, 0.0, [0, 0.8, 0.2, 0, 0]),
        (0.0, None, 0.0, [0, 1, 0, 0, 0]),
        (0.0, RIVAL, 0.3, [0, 0.7, 0, 0.3, 0]),
        (0.4, RIVAL, 0.5, [0, 0.3, 0.2, 0.5, 0]),
        (0.4, decision(best=2), 0.5, [0, 0.3, 0.7, 0, 0]),
        (0.4, decision(best=1), 0.5, [0, 0.8, 0.2, 0, 0]),
    ],
)
def test_settings_are_drawn_as_often_as_it_is_said(share, rival, trial, expected):
    """Evenly among those that are allowed and not clearly worse, and the rival's own choice."""
    random.seed(0)
    drawn = [decide.explored(decision(), BUDGET_MS, share, rival, trial) for _ in range(10_000)]
    assert np.unique([said for _, _, said in drawn], axis=0).round(12).tolist() == [expected]
    counts = np.bincount([index for _, index, _ in drawn], minlength=5)
    assert counts / 10_000 == pytest.approx(np.array(expected), abs=0.02)
    assert not counts[np.array(expected) == 0].any()


def test_a_candidate_decides_its_share_with_its_own_values():
    random.seed(0)
    drawn = [decide.explored(decision(), BUDGET_MS, 0.2, RIVAL, 0.5) for _ in range(100)]
    assert {index for by, index, _ in drawn if by is RIVAL} == {3}
    assert {index for by, index, _ in drawn if by is not RIVAL} == {1, 2}


class Model:
    """Says what the moment's bounds are, and revises."""

    settings = tuple({"k": k} for k in range(len(VALUES)))
    guard = vlm = None


def under_way(first, later, share=1.0, rival=None):
    """A request whose decisions are planted; the numbers of its settings, and whether it could be drawn."""
    trial = Trial(None, 1.0 - share) if rival else None
    flight = InFlight(Model(), Terms(budget_ms=BUDGET_MS, explore=share, trial=trial))
    first = flight._explore(first, rival)
    flight._take(first, first.feasible)
    chosen = flight.choice.index
    flight._take(later, True)
    return chosen, flight.choice.index, flight.probabilities is not None


def test_a_drawn_setting_stays_as_long_as_it_keeps_the_budget():
    random.seed(1)
    later = decision(bounds=(12.0, 25.0, 35.0, 15.0, 50.0), best=0)  # who was not drawn is revised
    assert {under_way(decision(), later) for _ in range(50)} == {(1, 0, True), (2, 2, True)}


def test_a_drawn_setting_gives_way_where_it_would_be_late():
    random.seed(2)
    later = decision(bounds=(12.0, 25.0, 41.0, 15.0, 50.0), best=0)
    assert {under_way(decision(), later) for _ in range(50)} == {(1, 0, True), (2, 0, True)}


def test_a_candidates_choice_is_revised_as_the_candidate_says():
    random.seed(3)
    later = decision(bounds=(12.0, 25.0, 35.0, 15.0, 50.0), best=0)
    assert {under_way(decision(), later, 0.0, RIVAL) for _ in range(50)} == {(3, 0, True)}


def test_nothing_is_tried_where_no_setting_is_sure_to_keep_the_budget():
    impossible = decision(bounds=(50.0,) * 5, best=-1)
    assert under_way(impossible, impossible) == (0, 0, False)


def test_a_share_that_is_none_is_refused():
    for share in (-0.1, 1.1, math.nan, "0.1"):
        with pytest.raises(InputError, match="explore"):
            check_request("what", Terms(explore=share))
    for share in (-0.1, 0.9):
        with pytest.raises(InputError, match="trial"):
            check_request("what", Terms(explore=0.2, trial=Trial(None, share)))

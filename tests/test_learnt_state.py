"""What a guard learns in service is kept, and counts only where it belongs."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest

from budgetvlm.guard.saved import load_guard
from budgetvlm.serving import learnt_state
from budgetvlm.serving.learnt_state import EVERY_REQUESTS, EVERY_S, LearntState
from budgetvlm.vlm.loading import bundled_controller


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(learnt_state.time, "monotonic", lambda: made.now)
    return made


@pytest.fixture
def controller(tmp_path):
    directory = tmp_path / "controller"
    directory.mkdir()
    shutil.copy(bundled_controller("reference") / "guard.json", directory)
    return directory


@pytest.fixture
def model(controller):
    """Something with a guard that has learnt."""
    guard = load_guard(controller)
    guard.credit = 7.0
    return SimpleNamespace(guard=guard)


@pytest.fixture
def state(controller, clock):
    return LearntState(controller)


def test_it_is_saved_after_some_requests(state, model):
    for _ in range(EVERY_REQUESTS - 1):
        state.answered(model)
    assert not state.path.exists()
    state.answered(model)
    assert json.loads(state.path.read_text())["guard"]["credit"] == 7.0
    assert state.due_s() is None


def test_it_is_saved_after_some_time(state, model, clock):
    assert state.due_s() is None
    state.answered(model)
    assert state.due_s() == EVERY_S and not state.path.exists()
    clock.now += EVERY_S - 1
    assert state.due_s() == pytest.approx(1.0)
    clock.now += 1
    assert state.due_s() == 0
    state.answered(model)
    assert state.path.exists()


def test_another_replica_goes_on_where_it_was(state, model, controller):
    assert LearntState(controller).restored() is None
    state.answered(model)
    state.save(model)
    assert LearntState(controller).restored().to_dict() == model.guard.to_dict()
    assert load_guard(controller).credit != 7.0, "the calibrated guard is not changed"


def test_a_new_calibration_starts_anew_and_is_not_written_over(state, model, controller):
    state.answered(model)
    state.save(model)
    calibrated = json.loads((controller / "guard.json").read_text())
    (controller / "guard.json").write_text(json.dumps({**calibrated, "alpha": 0.1}))
    assert LearntState(controller).restored() is None
    before = state.path.read_text()
    model.guard.credit = 8.0
    state.answered(model)
    state.save(model)
    assert state.path.read_text() == before, "a replica of the calibration before saves no more"


def test_a_state_of_another_machine_does_not_count(state, model, controller, monkeypatch):
    state.answered(model)
    state.save(model)
    monkeypatch.setattr(learnt_state, "this_machine", lambda: "another")
    assert LearntState(controller).restored() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}', "\x00" * 50])
def test_a_damaged_state_starts_anew(state, controller, text):
    state.path.write_text(text)
    assert state.restored() is None


def test_a_state_whose_guard_is_damaged_starts_anew(state, model, controller, caplog):
    state.answered(model)
    state.save(model)
    document = json.loads(state.path.read_text())
    del document["guard"]["margin"]
    state.path.write_text(json.dumps(document))
    assert state.restored() is None
    assert "not usable" in caplog.text


def test_a_disk_that_takes_nothing_stops_no_service(controller, model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    state = LearntState(controller, tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            state.answered(model)
            state.save(model)
    assert caplog.text.count("is not kept") == 1


def test_a_guard_that_learns_nothing_is_not_saved(state):
    state.answered(SimpleNamespace(guard=SimpleNamespace(to_dict=dict)))
    state.save(SimpleNamespace(guard=SimpleNamespace(to_dict=dict)))
    assert not state.path.exists()

"""The controller, the guard and the example image that come with the bundled model: `ask` works without training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from budgetvlm.commands.ask import notice_of_calibration
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.price_curve import load_price_curve
from budgetvlm.guard import saved
from budgetvlm.guard.saved import load_guard
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.vlm.loading import model_directory

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "signs.png"


def test_ask_answers_without_a_checkpoint(run_cli):
    words = ("--image", EXAMPLE, "--question", "read the sign in red", "--budget_ms", "100000", "--json")
    done = run_cli("ask", *words)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["answer"], answer["budget_met"], answer["feasible"]) == ("X85", True, True)


def test_the_guard_is_calibrated_and_the_controller_is_small():
    directory = model_directory("reference") / "controller"
    guard = load_guard(directory)
    assert guard is not None and guard.calibrated_on >= 28
    assert sum(path.stat().st_size for path in directory.iterdir()) < 5e6
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}  # what the package's data names


def test_its_prices_are_known_from_the_cheapest_setting_to_the_best():
    """So a mean budget is held from the first request on."""
    directory = model_directory("reference") / "controller"
    curve, controller = load_price_curve(directory), load_controller(directory)
    assert curve.least_ms == pytest.approx(controller.latency_ms.min().item(), rel=0.05)
    assert [p.price for p in curve.points] == sorted(p.price for p in curve.points)
    assert curve.points[0].accuracy > curve.points[-1].accuracy + 0.3
    assert curve.solve(50.0).latency_ms == pytest.approx(50.0) and 0.1 < curve.solve(50.0).price < 1


def calibrated():
    """As much of a model as a notice looks at."""
    return SimpleNamespace(guard=load_guard(model_directory("reference") / "controller"))


def test_a_guard_that_was_never_calibrated_promises_nothing():
    model, args = calibrated(), SimpleNamespace(checkpoint="c", model_path="reference")
    model.guard.calibrated_on = 0
    assert "never calibrated, so nothing is promised" in notice_of_calibration(args, model)
    model.guard = None
    assert "no guard lies beside this controller" in notice_of_calibration(args, model)


@pytest.mark.parametrize("here", [True, False])
def test_a_guard_of_another_machine_says_so_until_it_is_calibrated(tmp_path, monkeypatch, here):
    saved.save_guard({"schema_version": 0}, tmp_path)
    if not here:
        monkeypatch.setattr(saved, "this_machine", lambda: "another")
    notice = notice_of_calibration(SimpleNamespace(checkpoint=str(tmp_path), model_path="reference"), calibrated())
    assert (notice is None) == here
    if notice is not None:
        assert f"`budgetvlm calibrate --checkpoint {tmp_path}` fits it to this one" in notice


@pytest.mark.parametrize("variable", ["XDG_DATA_HOME", "HOME"])
def test_the_guard_of_the_bundled_controller_is_kept_among_the_users_data(tmp_path, monkeypatch, variable):
    """Nothing is written into the package, and the bundled controller takes the user's own guard from then on."""
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv(variable, str(tmp_path))
    bundled = model_directory("reference") / "controller"
    shipped, before = (bundled / "guard.json").read_bytes(), AdaptiveVLM.from_pretrained(rehearsals=0, compiled=False)
    before.guard.calibrated_on = 1234
    data = tmp_path if variable == "XDG_DATA_HOME" else tmp_path / ".local" / "share"
    assert before.save_guard(bundled) == data / "budgetvlm" / "reference" / "guard.json"
    assert (bundled / "guard.json").read_bytes() == shipped
    after = AdaptiveVLM.from_pretrained(rehearsals=0, compiled=False)
    assert after.guard.to_dict() == before.guard.to_dict() and after.guard.calibrated_on == 1234
    assert notice_of_calibration(SimpleNamespace(checkpoint=None, model_path="reference"), after) is None


def test_machines_are_told_apart_by_their_processors(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("model name : A\nflags : x\nmodel name : A\n")
    other.write_text("model name : B\n")
    assert saved.this_machine(one) == saved.this_machine(one) != saved.this_machine(other)
    assert len(saved.this_machine(tmp_path / "none")) == 16

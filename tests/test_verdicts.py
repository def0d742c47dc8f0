"""A result that is of no use says so in one plain sentence."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from planted_tables import tiny

from budgetvlm._io import time_text
from budgetvlm.answer import Answer
from budgetvlm.cli import main
from budgetvlm.commands import ask, calibrate, live, train
from budgetvlm.commands.verdicts import one_choice, useless_accuracies
from budgetvlm.controller import training
from budgetvlm.controller.run_files import figures_line
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.knobs import Setting

CHEAP, FULL = Setting((("max_crops", 1),)), Setting((("max_crops", 4),))
SOME, NAN = np.array([[0.0, 1.0], [0.0, 0.0]]), np.nan


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (SOME, None),
        (np.zeros((3, 2)), "every answer at every setting scores 0"),
        (np.array([[0.0, NAN], [NAN, 0.0]]), "every answer at every setting scores 0"),
        (np.array([[1.0, 1.0], [0.0, 0.0]]), "each sample scores the same at all settings"),
        (np.array([[1.0, NAN], [0.5, 1.0]]), None),
    ],
)
def test_accuracies_from_which_nothing_can_be_learnt(accuracy, said):
    found = useless_accuracies(accuracy)
    assert (found is None) == (said is None) and (said or "") in (found or "")


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((60.0,), "60 ms"),
        ((47.42,), "47.4 ms"),
        ((0.0123,), "0.012 ms"),
        ((999.94,), "999.9 ms"),
        ((999.96,), "1.00 s"),
        ((1500.0,), "1.50 s"),
        ((8812.3, 120.0), "8.81 ±0.12 s"),
        ((19_940.0,), "19.9 s"),
        ((1_180_000.0,), "1180 s"),
        ((512.14, 30.0), "512.1 ±30.0 ms"),
    ],
)
def test_times_are_ms_below_a_second_and_seconds_above_without_exponents(times, said):
    assert time_text(*times) == said


def test_a_controller_with_one_choice():
    assert one_choice([CHEAP, FULL, CHEAP], CHEAP) is None
    assert "always takes the cheapest setting (max_crops=1)" in one_choice([CHEAP, CHEAP], CHEAP)
    assert "always takes the same setting (max_crops=4)" in one_choice([FULL], CHEAP)


def trained_on(tmp_path, capsys, accuracy, *more):
    """What `train` says, and the words that name data and checkpoint."""
    table, features = tiny()
    replace(table, accuracy=np.broadcast_to(accuracy, table.accuracy.shape).astype(np.float32)).save(
        tmp_path / "t.parquet"
    )
    features.save(tmp_path / "f.safetensors")
    where = ["--table", str(tmp_path / "t.parquet"), "--features", str(tmp_path / "f.safetensors")]
    words = ["--num_epochs", "1", "--hidden_dim", "8", "--output_dir", str(tmp_path / "c")]
    assert main(["train", *where, *words, *more]) == 0
    return capsys.readouterr().out, where


def test_training_and_evaluation_say_what_is_useless_and_how_to_go_on(tmp_path, capsys):
    out, where = trained_on(tmp_path, capsys, 0.0)
    assert "note: every answer at every setting scores 0" in out
    command = f"budgetvlm evaluate {' '.join(where)} --checkpoint {tmp_path / 'c'}"
    assert out.splitlines()[-1].startswith(f"next: {command}")
    assert (
        main([*command.split()[1:], *(["--split", "validation"] if "validation" in out.splitlines()[-1] else [])]) == 0
    )
    assert "note: every answer at every setting scores 0" in capsys.readouterr().err


def test_a_controller_that_learns_to_take_the_cheapest_says_so(tmp_path, capsys):
    table, _ = tiny()
    falling = np.linspace(1.0, 0.0, table.num_settings)  # the cheapest setting is always the best
    out, where = trained_on(tmp_path, capsys, falling, "--teachers", "1")
    assert "note: the controller always takes the cheapest setting (max_crops=1, top_k=2)" in out
    assert main(["evaluate", *where, "--checkpoint", str(tmp_path / "c"), "--split", "validation", "--json"]) == 0
    done = capsys.readouterr()
    assert json.loads(done.out) and "always takes the cheapest setting" in done.err


def test_a_price_that_a_mean_budget_wants_is_not_called_a_fault_of_the_controller(tmp_path, capsys):
    rising = np.linspace(0.2, 1.0, tiny()[0].num_settings)  # at 11 ms on average nearly every request gets the cheapest
    out, _ = trained_on(tmp_path, capsys, rising, "--mean_budget_ms", "11")
    assert "mean budget of 11 ms: price" in out and "always takes" not in out


def test_means_over_different_contexts_say_over_which():
    figures = {
        "reward_mean": 0.5,
        "accuracy_mean": 0.25,
        "latency_mean": 12.0,
        "violation_rate": 0.0,
        "room_closed": None,
    }
    line = figures_line(figures)
    assert line.index("over all budgets and prices") < line.index("over the budgets:") < line.index("accuracy_mean")


def found_live(calibrated_on):
    figures = {
        "violation_rate": 0.0, "interval": [0.0, 0.1], "accuracy": 0.5, "latency_ms": 10.0, "used_median": 0.5,
        "hurried": 0, "cut": 0, "infeasible": 0, "controller_ms": 1.0,
    }  # fmt: skip
    by_group = {"dataset": {"pope": figures | {"accuracy": 0.25}}, "kind": {"read": figures}}
    system = {"all": figures, "by_phase": {}, "by_budget": {}, "by_group": by_group, "worst_group": None}
    return {
        "requests": 3, "reference_ms": 20.0, "alpha": 0.05, "calibrated_on": calibrated_on, "drift": {},
        "systems": {"guarded": system},
    }  # fmt: skip


def test_a_guard_that_was_never_calibrated_promises_nothing_live():
    assert "at most 5.0% may be late" in live.describe(found_live(40))
    text = live.describe(found_live(0))
    assert "at most" not in text and "never calibrated, so nothing is promised" in text


def test_each_data_set_has_a_line_of_its_own_live():
    (line,) = [line for line in live.describe(found_live(40)).splitlines() if line.startswith("  pope")]
    assert "25.0%" in line and "read" not in live.describe(found_live(40))


def test_a_calibration_says_its_spread_and_what_is_usual():
    found = {
        "guard": "g.json", "alpha": 0.05, "factor": 1.2, "stages": {"decode": 1.0}, "samples": 40, "other_ms": 1.0,
        "hurries": True, "spread": [0.8, 1.15],
    }  # fmt: skip
    text = calibrate.describe(found)
    assert "took 0.80 to 1.15 x the predicted time" in text and "1.20 x that time (usual: 1.1 to 1.5)" in text
    assert "repeat it on another machine" in text and "wide bound" not in text
    assert "wide bound" in calibrate.describe({**found, "factor": 2.9})


@pytest.mark.parametrize(
    ("answer", "best_effort", "predicted_ms", "said"),
    [
        (
            "",
            True,
            12.0,
            "not even this setting, which may take 12 ms, fits into the budget, so the answer was cut before",
        ),
        (
            "",
            True,
            None,
            "no setting fits into the budget, so the answer was cut before it said anything; give more time",
        ),
        ("a b", True, 12.0, "so the answer was cut after 2 tokens"),
        ("", False, 12.0, "the answer was cut before it said anything, where the budget would not have held another"),
        ("a b", False, 12.0, "the answer was cut after 2 tokens, where the budget would not"),
    ],
)
def test_a_cut_answer_says_why(answer, best_effort, predicted_ms, said):
    made = Answer(
        answer=answer, setting=CHEAP, latency_ms=5.0, stages_ms={"preprocess": 1.0}, predicted_ms=predicted_ms,
        budget_ms=1.0, budget_met=False, feasible=not best_effort, finish_reason="budget", num_vision_tokens=1,
        num_language_tokens=1, num_output_tokens=2,
    )  # fmt: skip
    assert said in ask.describe(made)
    assert "cut" not in ask.describe(made._replace(finish_reason="stop"))


def test_the_next_command_is_of_the_data_that_was_trained_on():
    table, _ = tiny()
    args = SimpleNamespace(data="my data.json", table=None, features=None, output_dir="c")
    assert train.next_command(args, replace(table, split=None)).startswith("budgetvlm evaluate --data 'my data.json'")


def test_training_says_where_budgets_leave_no_choice_and_which_setting_is_best(tmp_path):
    """Answers are short or long, so that bounds are 8 times the full setting's median; the last setting is useless."""
    table, features = tiny()
    long = (np.arange(60) % 4 == 0)[:, None]
    latency = np.where(long, [[320.0, 340, 360, 400]], [[20.0, 30, 40, 50]]).astype(np.float32)
    accuracy = table.accuracy.copy()
    accuracy[:, -1], accuracy[:, 1] = 0, 1
    said = []
    quick = TrainingConfig(grpo=GRPOConfig(num_epochs=1), hidden_dim=16, budget_dim=4, teachers=0)
    changed = replace(table, latency_ms=latency, accuracy=accuracy)
    training.train(changed, features, quick, tmp_path, say=said.append, progress=False)
    notes = [line for line in said if line.startswith("note: ") and "latency bounds" not in line]
    assert "no setting's bound is within the budget" in notes[0] and "no budget leaves a choice" in notes[0]
    assert notes[1].startswith("note: Budgets from the bounds are taken instead: 6.8, ")
    assert "max_crops=4, top_k=8: 0.0%) is not the most accurate" in notes[2] and "=1, top_k=8 is (100.0%)" in notes[2]

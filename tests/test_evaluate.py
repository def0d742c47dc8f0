"""Evaluation on a table worked out by hand, and the command line around it.

Settings take 10, 20, 20 and 40 ms. Kind "a" is right with setting 2 or 3, kind "b" with 1 or 3. A policy that sees the
kind is right at 20 ms; one setting for all is right half of the time there, and needs 40 ms to be always right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from budgetvlm.cli import main
from budgetvlm.controller.checkpoint import save_pretrained
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import ConfigError, DataError, OutputError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluate
from budgetvlm.evaluation.outcomes import Contender, outcomes
from budgetvlm.evaluation.records import AtBudget, EvaluationReport, PolicyResult
from budgetvlm.evaluation.text_tables import plain_text, room_table, tables
from budgetvlm.features import Features
from budgetvlm.html_report.picture_files import save_side_by_side
from budgetvlm.html_report.result_charts import evaluation_charts
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import States
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"tiles": [1, 4], "depth": [2, 8]})
TEST_ROWS = 40


def two_kinds(samples: int = 120) -> ProfileTable:
    """A third each of train, validation and test; two samples share an image."""
    accuracy = np.tile(np.array([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=np.float32), (samples // 2, 1))
    return ProfileTable.from_arrays(
        SPACE,
        [f"s{i}" for i in range(samples)],
        accuracy,
        np.tile(np.array([10.0, 20.0, 20.0, 40.0]), (samples, 1)),
        groups={
            "kind": ("a", "b") * (samples // 2),
            "difficulty": ("easy",) * samples,
            "image_id": [f"i{i // 2}" for i in range(samples)],
        },
        split=np.repeat(["train", "validation", "test"], samples // 3).tolist(),
    )


def features_of(table: ProfileTable) -> Features:
    noise = np.random.default_rng(0).normal(size=(table.num_samples, 2))
    return Features(table.sample_ids, noise, noise[:, :1])


@dataclass(frozen=True)
class KnowsKind:
    """Right at 20 ms wherever that is allowed and worth it; a fixed setting otherwise."""

    name: str = "knows the kind"

    def choose(self, states: States) -> np.ndarray:
        kind = np.array(states.table.groups["kind"])[states.sample_index]
        wanted = np.where(kind == "a", 2, 1)
        worth = states.feasible[:, 1] & (states.price * 10 / 40 < 1)
        return np.where(worth, wanted, 0)


QUICK = EvaluationOptions(resamples=50)


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    table = two_kinds()
    return evaluate(table, features_of(table), {"one": KnowsKind(), "two": KnowsKind()}, QUICK)


def at(report: EvaluationReport, name: str, share: float) -> AtBudget:
    return next(record for record in result(report, name).at_budget if record.budget_share == share)


def result(report: EvaluationReport, name: str) -> PolicyResult:
    found = report.policy(name)
    assert found is not None, name
    return found


def test_all_policies_are_there(report: EvaluationReport) -> None:
    assert [result.name for result in report.policies] == [
        "controller",
        "controller one",
        "controller two",
        "predict + argmax",
        "lookup table",
        "full setting",
        "cheapest",
        "random feasible",
        "group lookup",
        "oracle",
        "best blind mix",
        "best single setting",
    ]
    assert report.counts["evaluated_samples"] == TEST_ROWS and report.counts["evaluated_units"] == TEST_ROWS // 2


def test_accuracy_latency_and_violations_of_the_chosen_settings(report: EvaluationReport) -> None:
    controller = at(report, "controller", 0.5)
    assert controller.budget_ms == 20.0
    assert controller.accuracy.value == 1.0 and controller.mean_ms.value == controller.p95_ms == 20.0
    assert controller.vs_lookup.value == 0.5 and controller.violation_rate.value == 0.0
    assert {tuple(chosen.setting.values()): chosen.share for chosen in controller.settings} == {
        (1, 8): 0.5,
        (4, 2): 0.5,
    }
    assert at(report, "lookup table", 0.5).accuracy.value == 0.5
    assert at(report, "full setting", 0.85).violation_rate.value == 1.0
    assert at(report, "full setting", 1.0).violation_rate.value == 0.0
    assert at(report, "cheapest", 1.0).accuracy.value == 0.0


def test_a_budget_below_everything_is_a_violation_and_no_crash(report: EvaluationReport) -> None:
    table = two_kinds()
    tight = evaluate(table, features_of(table), {}, replace(QUICK, budget_shares=(0.1,)))
    lookup = at(tight, "lookup table", 0.1)
    assert lookup.mean_ms.value == 10.0 and lookup.violation_rate.value == 1.0


def test_room_is_the_mean_over_the_named_budgets(report: EvaluationReport) -> None:
    assert report.room_budget_shares == (0.5, 0.6, 0.7, 0.85)
    room = result(report, "controller").room
    assert room is not None and room.visible_room_closed is not None and room.room_closed is not None
    assert room.accuracy_gain.value == room.visible_room_closed.value * 0.5 == room.room_closed.value * 0.5 == 0.5
    lookup = result(report, "lookup table").room
    assert lookup is not None and lookup.room_closed is not None and lookup.room_closed.value == 0.0


def test_no_room_is_closed_by_breaking_budgets(report: EvaluationReport) -> None:
    full = result(report, "full setting").room
    assert full is not None and full.accuracy_gain.value == 0.5
    assert full.room_closed is None and full.visible_room_closed is None


def test_latency_at_equal_accuracy(report: EvaluationReport) -> None:
    # Blind: .98 lies 24/25 of the way from (20, .5) to (40, 1). With the kind: from (10, 0) to (20, 1).
    blind, mine = result(report, "best blind mix").at_accuracy[0], result(report, "controller").at_accuracy[0]
    assert blind.latency_ms is not None and mine.latency_ms is not None and mine.saved is not None
    assert blind.latency_ms.value == pytest.approx(39.2) and mine.latency_ms.value == pytest.approx(19.8)
    assert mine.saved.value == pytest.approx(1 - 19.8 / 39.2)
    assert mine.visible_saving_closed is not None and mine.visible_saving_closed.value == pytest.approx(1.0)
    assert mine.reached_share == 1.0


def test_accuracy_at_a_mean_budget(report: EvaluationReport) -> None:
    """Means go from 10 to 40 ms. Blind: (10, 0), (20, .5), (40, 1). With the kind: from (10, 0) to (20, 1)."""
    figures = {
        name: result(report, name).at_mean_budget
        for name in ("controller", "best blind mix", "best single setting", "predict + argmax", "lookup table")
    }
    assert [at.budget_ms for at in figures["controller"]] == pytest.approx([13, 19, 25, 31, 37])
    accuracy = {name: [at.accuracy and at.accuracy.value for at in found] for name, found in figures.items()}
    assert accuracy["controller"] == pytest.approx([0.3, 0.9, 1, 1, 1])
    assert accuracy["best blind mix"] == pytest.approx([0.15, 0.45, 0.625, 0.775, 0.925])
    assert accuracy["best single setting"] == [0, 0, 0.5, 0.5, 0.5]
    over = [at.vs_blind.value for at in figures["controller"] if at.vs_blind]
    assert over == pytest.approx([0.15, 0.45, 0.375, 0.225, 0.075])
    spent = [at.spent_ms.value for at in figures["controller"] if at.spent_ms]
    assert spent == pytest.approx([13, 19, 20, 20, 20])  # more than 20 ms would buy nothing
    assert accuracy["lookup table"] == []  # it takes no price


def test_mean_budgets_in_ms_and_what_the_price_that_was_solved_elsewhere_gives() -> None:
    """Test samples take half as long again as those that prices are solved on, so without feedback the mean is off."""
    table = two_kinds()
    slow = np.where(np.array(table.split)[:, None] == "test", 1.5, 1.0) * table.latency_ms
    options = replace(QUICK, mean_budget_ms=(15.0, 90.0))
    found = evaluate(
        replace(table, latency_ms=slow.astype(np.float32)), features_of(table), {"c": KnowsKind()}, options
    )
    at, beyond = result(found, "controller").at_mean_budget
    assert (at.budget_ms, at.budget_share, beyond.budget_share) == (15, pytest.approx(1 / 6), pytest.approx(80 / 30))
    assert at.spent_ms and at.spent_ms.value == pytest.approx(22.5) and at.missed and at.missed.value == 0.5
    assert at.solved_accuracy and at.solved_accuracy.value == pytest.approx(0.5)
    assert at.accuracy and at.accuracy.value == 0.0  # with feedback it takes 15 ms, as the cheapest setting does
    assert beyond.accuracy and beyond.accuracy.value == 1.0
    assert [each and each.value for each in (beyond.vs_setting, beyond.vs_blind, beyond.vs_oracle)] == [0, 0, 0]
    text = " ".join(plain_text(tables(found)).split())
    assert "buys the best setting for every request" in text and "+50.0 ±0.0, 50.0" in text


def test_under_a_ceiling_the_blind_mix_is_of_the_settings_that_it_allows() -> None:
    """At half of the full setting's 40 ms it is (10, 0) to (20, .5); with the kind (10, 0) to (20, 1)."""
    table, options = two_kinds(), replace(QUICK, mean_budget_ms=(15.0, 30.0), ceiling=0.5)
    found = evaluate(table, features_of(table), {"c": KnowsKind()}, options)
    accuracy = {
        name: [at.accuracy.value for at in result(found, name).at_mean_budget if at.accuracy]
        for name in ("controller", "best blind mix", "best single setting")
    }
    assert accuracy["controller"] == pytest.approx([0.5, 1.0])
    assert accuracy["best blind mix"] == pytest.approx([0.25, 0.5])
    assert accuracy["best single setting"] == pytest.approx([0.0, 0.5])


def test_a_mean_budget_below_the_cheapest_setting_names_the_least() -> None:
    table, options = two_kinds(), replace(QUICK, mean_budget_ms=(9.0,))
    with pytest.raises(ConfigError, match="mean budget of 9 ms cannot be met: even the cheapest setting takes 10 ms"):
        evaluate(table, features_of(table), None, options)


def test_an_accuracy_that_is_not_reached_is_none() -> None:
    @dataclass(frozen=True)
    class Stuck:
        name: str = "stuck"

        def choose(self, states: States) -> np.ndarray:
            return np.ones(len(states.price), dtype=np.int64)

    table = two_kinds()
    report = evaluate(table, features_of(table), {"stuck": Stuck()}, QUICK)
    target = result(report, "controller").at_accuracy[0]
    assert target.latency_ms is None and target.saved is None and target.reached_share == 0.0
    assert "not reached" in plain_text(tables(report))


def test_runs_are_averaged() -> None:
    @dataclass(frozen=True)
    class Fixed:
        column: int
        name: str = "fixed"

        def choose(self, states: States) -> np.ndarray:
            return np.full(len(states.price), self.column)

    table = two_kinds()
    report = evaluate(table, features_of(table), {"low": Fixed(0), "high": Fixed(3)}, QUICK)
    mean = at(report, "controller", 0.5)
    assert mean.accuracy.value == 0.5 and mean.mean_ms.value == 25.0 and mean.violation_rate.value == 0.5


def test_hindsight_pays_expected_latency() -> None:
    table = two_kinds(6).subset(np.arange(4))
    latency = table.latency_ms.copy()
    latency[:, 1] = [10, 20, 30, 40]
    noisy = replace(table, latency_ms=latency)
    always_one = type("One", (), {"name": "one", "choose": lambda self, s: np.ones(len(s.price), dtype=np.int64)})()
    request = States(noisy, None, np.arange(4), np.full(4, 99.0), np.ones((4, 4), dtype=bool), np.zeros(4))
    paid = outcomes(Contender("x", "bound", (always_one,), "", charged_expected=True), [request])
    measured = outcomes(Contender("x", "policy", (always_one,), ""), [request])
    assert paid.latency_ms[0, 0].tolist() == [25.0] * 4
    assert measured.latency_ms[0, 0].tolist() == [10.0, 20.0, 30.0, 40.0]
    for found in (paid, measured):  # it is late where the chosen cell is, like everybody
        assert found.sample_violations(np.array([20.0]))[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_settings_and_prices_are_not_picked_on_the_evaluated_split() -> None:
    # On the test split alone the cheapest setting is always right; the lookup table must not know that.
    table = two_kinds()
    accuracy = table.accuracy.copy()
    accuracy[80:] = [1, 0, 0, 0]
    report = evaluate(replace(table, accuracy=accuracy), features_of(table), {}, QUICK)
    assert at(report, "lookup table", 1.0).accuracy.value == 0.0
    assert at(report, "oracle", 1.0).accuracy.value == 1.0


def test_samples_with_holes_are_left_out_and_counted() -> None:
    table = two_kinds()
    latency = table.latency_ms.copy()
    latency[100:105, 0] = np.nan
    report = evaluate(replace(table, latency_ms=latency), features_of(table), {}, QUICK)
    assert report.counts["evaluated_samples"] == TEST_ROWS - 5 and report.counts["left_out_incomplete"] == 5


def test_violations_are_counted_over_timed_samples() -> None:
    table = two_kinds()
    latency = table.latency_ms.copy()
    latency[80:90] = 100.0
    source = ["measured"] * 100 + ["predicted"] * 20
    table = replace(table, latency_ms=latency, groups={**table.groups, "latency_source": tuple(source)})
    report = evaluate(table, features_of(table), {}, QUICK)
    assert report.counts["evaluated_timed"] == 20
    assert at(report, "lookup table", 1.0).violation_rate.value == 0.5  # ten of the twenty
    assert "Latency of 20 samples is predicted" in plain_text(tables(report))


def test_a_setting_that_was_never_measured_is_never_chosen() -> None:
    table = two_kinds()
    accuracy = table.accuracy.copy()
    accuracy[:, 1] = np.nan
    report = evaluate(replace(table, accuracy=accuracy), features_of(table), {}, QUICK)
    chosen = [s.setting for r in report.policies for a in r.at_budget for s in a.settings]
    assert report.counts["settings"] == 3 and {"tiles": 1, "depth": 8} not in chosen


def test_validation_can_be_reported_without_a_test_split() -> None:
    table = two_kinds()
    table = replace(table, split=tuple("train" if s == "test" else s for s in table.split or ()))
    report = evaluate(table, features_of(table), {}, replace(QUICK, split="validation"))
    assert report.tuning_split == "train" and report.counts["evaluated_samples"] == TEST_ROWS
    with pytest.raises(DataError, match="no test samples to evaluate on; this table has: train, validation"):
        evaluate(table, features_of(table), {}, QUICK)


def test_without_labels_there_is_no_group_lookup() -> None:
    table = replace(two_kinds(), groups={})
    report = evaluate(table, features_of(table), {"one": KnowsNothing()}, QUICK)
    room = result(report, "controller").room
    assert report.policy("group lookup") is None and room is not None and room.visible_room_closed is None


def test_a_group_is_named_by_the_labels_that_the_table_has() -> None:
    table = two_kinds()
    table = replace(table, groups={name: table.groups[name] for name in ("kind", "image_id")})
    group = result(evaluate(table, features_of(table), {}, QUICK), "group lookup")
    assert "each group (kind) of" in group.note


@dataclass(frozen=True)
class KnowsNothing:
    name: str = "nothing"

    def choose(self, states: States) -> np.ndarray:
        return np.zeros(len(states.price), dtype=np.int64)


def test_equal_seeds_give_equal_reports() -> None:
    table = two_kinds()
    reports = [evaluate(table, features_of(table), {}, replace(QUICK, seed=3)).to_dict() for _ in range(2)]
    assert reports[0] == reports[1]


def test_document_and_text(report: EvaluationReport) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["schema_version"] == 2 and document["knobs"] == SPACE.to_dict()
    assert {"budgetvlm", "numpy", "torch", "python"} <= set(document["versions"])
    text = plain_text(tables(report))
    assert "100.0 ±0.0" in text and "19.8 ms" in text and "…" not in text and "\x1b" not in text


def test_picture_is_written_whole_or_not_at_all(report: EvaluationReport, tmp_path: Path) -> None:
    save_side_by_side(evaluation_charts(report), tmp_path / "deep" / "evaluation.png")
    assert (tmp_path / "deep" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_side_by_side(evaluation_charts(report), tmp_path / "file" / "evaluation.png")


def test_options_say_all_that_is_wrong_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"split='train'.*budgets.*prices.*accuracy shares.*guard_quantile.*resamples"
    ):
        EvaluationOptions(
            split="train", budget_shares=(-1.0,), price=-1.0, accuracy_shares=(2.0,), guard_quantile=0.0, resamples=0
        )


def test_features_of_other_samples_are_refused() -> None:
    table = two_kinds()
    with pytest.raises(DataError, match="have no features"):
        evaluate(table, features_of(table.subset("train")), {}, QUICK)


# The command line.


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    table = two_kinds()
    table.save(tmp_path / "table.parquet")
    features_of(table).save(tmp_path / "features.safetensors")
    for seed in range(2):
        torch.manual_seed(seed)
        save_pretrained(controller(), tmp_path / f"seed{seed}")
    return {
        "table": str(tmp_path / "table.parquet"),
        "features": str(tmp_path / "features.safetensors"),
        "directory": str(tmp_path),
    }


def controller(space: KnobSpace = SPACE, width: int = 2) -> GRPOController:
    return GRPOController(width, 1, hidden_dim=8, knob_values=space.to_dict(), latency_reference_ms=40.0)


def words(files: dict[str, str], *more: str) -> list[str]:
    return ["evaluate", "--table", files["table"], "--features", files["features"], "--resamples", "20", *more]


def test_json_is_all_there_is_on_standard_output(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = [f"{files['directory']}/seed{seed}" for seed in range(2)]
    assert main(words(files, "--json", "--budgets", "1", "0.5", "--checkpoint", *checkpoints)) == 0
    document = json.loads(capsys.readouterr().out)
    names = [policy["name"] for policy in document["policies"]]
    assert names[:3] == ["controller", "controller seed0", "controller seed1"]
    assert document["options"]["budget_shares"] == [0.5, 1.0]


def test_output_directory_holds_document_and_picture(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output_dir", str(tmp_path / "out"), "--checkpoint", f"{files['directory']}/seed0"]
    assert main(words(files, *out)) == 0
    printed = capsys.readouterr().out
    assert "Accuracy under a budget" in printed and "evaluation.png" in printed
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["split"] == "test"
    assert main(words(files, *out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(words(files, *out, "--overwrite")) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: controller(KnobSpace({"tiles": [1, 4], "depth": [2, 9]})), "another knob space"),
        (lambda: controller(width=5), "reads 5 image and 1 language features"),
    ],
)
def test_checkpoints_that_do_not_fit(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], make: Callable[[], GRPOController], message: str
) -> None:
    save_pretrained(make(), Path(files["directory"]) / "other")
    assert main(words(files, "--checkpoint", f"{files['directory']}/other")) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--data", "data.json"], "either --table and --features, or --data"),
        (["--budgets", "0"], "not positive shares"),
        (["--checkpoint", "same", "same"], "given twice"),
    ],
)
def test_mistakes_are_messages(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(words(files, *more)) == 2
    assert message in capsys.readouterr().err


def test_the_largest_setting_is_not_taken_for_the_best_where_it_is_not() -> None:
    """All are right with setting 2, and the full setting 3 is right on kind "b" alone."""
    table = two_kinds()
    accuracy = np.tile(np.array([[0, 0, 1, 0], [0, 1, 1, 1]], dtype=np.float32), (table.num_samples // 2, 1))
    table = replace(table, accuracy=accuracy)
    report = evaluate(table, features_of(table), {"knows": KnowsKind()}, EvaluationOptions(resamples=20))
    assert report.best_setting == {"tiles": 4, "depth": 2} and (report.best_accuracy, report.full_accuracy) == (1, 0.5)
    blind = report.policy("best blind mix")
    assert blind.at_accuracy[0].target_accuracy == pytest.approx(0.98)
    assert blind.first_latency.value == pytest.approx(19.8)
    note = "The largest setting (tiles=4, depth=8: 50.0%) is not the most accurate on the training samples: tiles=4, "
    assert any(sentence.startswith(note + "depth=2 is (100.0%)") for sentence in report.notes)
    text = plain_text(tables(report))
    assert "98% of the best" in text and "98% of full" not in text
    assert evaluate(two_kinds(), features_of(two_kinds())).best_setting is None


def test_no_share_is_given_of_a_room_that_is_not_clearly_above_nothing() -> None:
    """Labels that say nothing: their lookup table is fitted to noise and gains nothing over the single one."""
    rng, table = np.random.default_rng(1), two_kinds(240)
    accuracy = (rng.random(table.accuracy.shape) < [0.3, 0.5, 0.5, 0.7]).astype(np.float32)
    noise = tuple(str(label) for label in rng.integers(0, 12, table.num_samples))
    table = replace(table, accuracy=accuracy, groups={**table.groups, "kind": noise})
    report = evaluate(table, features_of(table), None, EvaluationOptions(resamples=100))
    lookup, group = report.policy("lookup table"), report.policy("group lookup")
    assert group.full_name == "group lookup (true labels)" and group.room.accuracy_gain.low < 0
    assert {result.room.visible_room_closed for result in report.policies if result.room} == {None}
    assert lookup.room.room_closed is not None  # hindsight is clearly above
    assert sum("No share of the visible room is given" in note for note in report.notes) == 1
    document = json.loads(json.dumps(report.to_dict()))
    assert {p["room"]["visible_room_closed"] for p in document["policies"] if p["room"]} == {None}
    row = next(line for line in plain_text(room_table(report)).splitlines() if "lookup table" in line)
    assert row.split()[:5] == ["lookup", "table", "–", "–", "0%"]  # no points over itself, no share of the visible room


def test_tables_are_as_wide_as_their_digits_need() -> None:
    shares = tuple(np.linspace(0.1, 0.9, 9))
    report = evaluate(
        two_kinds(), features_of(two_kinds()), None, EvaluationOptions(budget_shares=shares, mean_budgets=shares)
    )
    text = plain_text(tables(report))
    assert "…" not in text and max(map(len, text.splitlines())) > 136

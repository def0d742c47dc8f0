"""The comparison: what its figures mean, that it goes on where it stopped, and that no odd table breaks it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from planted_tables import planted, tiny
from test_hand_out import LocalCrew

from benchmarks import compare_all
from benchmarks.rivals.entries import RIVALS
from budgetvlm import _extras as extras
from budgetvlm import cli
from budgetvlm.comparison import CompareOptions, compare
from budgetvlm.comparison.comparison_records import ComparisonRow
from budgetvlm.comparison.comparison_tables import tables
from budgetvlm.comparison.fits import Cell, CellSpec
from budgetvlm.comparison.fitting_data import viewed
from budgetvlm.comparison.roster import ROSTER, Entry
from budgetvlm.comparison.runner import ORIGIN
from budgetvlm.controller.training import with_splits
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.evaluation.evaluation_data import learning_part
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.records import AtBudget, Estimate
from budgetvlm.evaluation.text_tables import plain_text
from budgetvlm.features import Features
from budgetvlm.html_report.picture_files import save_side_by_side
from budgetvlm.html_report.result_charts import comparison_charts
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.budget_grid import BUDGET_SHARES
from budgetvlm.table import ProfileTable

FEW = EvaluationOptions(budget_shares=(0.5, 0.85), prices=(0.0, 0.1, 1.0), resamples=50, accuracy_shares=(0.8,))
QUICK = CompareOptions(
    FEW, policies=("lookup", "full", "grpo"), seeds=(0,), sections=("policies",), num_epochs=1, members=2
)
FEATURE_FREE = replace(QUICK, policies=("lookup", "full"))
NAMED = {entry.key: entry for entry in RIVALS}
BLIND = [NAMED[key] for key in ("cheapest", "static", "random", "greedy")]


@pytest.fixture(scope="module")
def data():
    made = planted(150, 50, 100, width=8)
    return made.table, made.features


@pytest.fixture(scope="module")
def report(data):
    sections = ("policies", "knobs", "features", "samples")
    return compare(*data, replace(QUICK, sections=sections, sizes=(40,)), entries=BLIND)


def test_competitors_are_ranked_by_their_gain_and_bounds_come_last(report) -> None:
    rows = report.section("policies")
    roles = [row.role for row in rows]
    assert set(roles[-2:]) == {"bound", "labels"} and not {"bound", "labels"} & set(roles[:-2])
    gains = [row.gain for row in rows if row.competes]
    assert gains == sorted(gains, reverse=True)
    assert "lookup" in report.ranks and "oracle" not in report.ranks


def test_figures_are_those_of_the_chosen_cells(report, data) -> None:
    test = data[0].subset("test")
    full = report.row("full")
    assert full.at_budget[0].accuracy.value == pytest.approx(test.accuracy[:, -1].mean(), abs=1e-6)
    assert full.at_budget[0].violation_rate.value == 1.0 and not full.competes
    oracle, lookup = report.row("oracle"), report.row("lookup")
    gained = np.mean(
        [o.accuracy.value - k.accuracy.value for o, k in zip(oracle.at_budget, lookup.at_budget, strict=True)]
    )
    assert lookup.regret == pytest.approx(gained) and oracle.regret == pytest.approx(0.0)
    assert oracle.room.room_closed.value == pytest.approx(1.0)


def test_the_best_is_compared_with_the_second_and_all_others_with_the_best(report) -> None:
    rows = [row for row in report.section("policies") if row.competes]
    assert rows[0].best_other == rows[1].name
    assert {row.best_other for row in rows[1:]} == {rows[0].name}
    assert rows[1].vs_best_other.value == pytest.approx(rows[1].gain - rows[0].gain)


def text_of(report) -> str:
    return plain_text(tables(report))


def test_the_blind_mix_has_a_mean_latency_and_no_rank(report) -> None:
    mix = report.row("mix")
    assert mix.room is None and not mix.competes and mix.at_accuracy[0].saved.value == 0.0
    assert "best blind mix" in text_of(report)


def test_further_entries_take_part(data) -> None:
    second = Entry("second", "always the second", lambda fitting, seed: Second(), "", features=False, priced=False)
    report = compare(*data, FEATURE_FREE, entries=[second])
    assert report.row("second").at_budget[0].settings[0].share == 1.0
    with pytest.raises(ConfigError, match="two policies of the comparison are called full"):
        compare(*data, FEATURE_FREE, entries=[replace(second, key="full")])


class Second:
    name = "second"

    def choose(self, states) -> np.ndarray:
        return np.ones(len(states.price), dtype=np.int64)


def test_every_rival_can_be_compared_with_one_command(files, capsys) -> None:
    assert compare_all.main(["--policies", "help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*ROSTER, *NAMED]
    words = [*files, "--quick", "--policies", "greedy", "lookup", "--resamples", "20", "--json"]
    assert compare_all.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["key"] for row in rows} == {"greedy", "lookup", "group", "oracle", "mix"}


def test_every_section_has_its_rows(report, data) -> None:
    knobs = data[0].knob_space.names
    assert {row.variant for row in report.section("knobs")} == {*knobs} | {
        "max_crops+top_k", "max_crops+num_active_blocks", "top_k+num_active_blocks",
    }  # fmt: skip
    assert {row.variant for row in report.section("features")} == {"image", "question", "neither", "labels"}
    assert {(row.key, row.variant) for row in report.section("samples")} == {
        ("lookup", "40"), ("grpo", "40"), ("grpo_ensemble", "40"), ("predict", "40"),
    }  # fmt: skip
    assert all(row.status == "ok" for row in report.rows)


def test_the_printed_tables_name_every_policy_and_lose_nothing(report) -> None:
    text = text_of(report)
    assert all(row.name in text for row in report.section("policies"))
    assert "…" not in text


def test_the_document_is_json_and_the_picture_is_drawn(report, tmp_path) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {row["key"] for row in document["rows"]} >= {"grpo", "oracle"}
    save_side_by_side(comparison_charts(report), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_comparison_goes_on_where_it_stopped(data, tmp_path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(*data, FEATURE_FREE, tmp_path, stop, BLIND)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(kept) == 4
    resumed = compare(*data, FEATURE_FREE, tmp_path, entries=BLIND)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}.items()
    undisturbed = compare(*data, FEATURE_FREE, entries=BLIND)
    for one, two in zip(resumed.rows, undisturbed.rows, strict=True):
        assert (one.key, one.room, one.at_budget) == (two.key, two.room, two.at_budget)


def test_other_processes_fit_what_this_one_would(data, tmp_path) -> None:
    @contextmanager
    def crew(build, say):
        yield LocalCrew(lambda: build(say), 3, lambda worker, message, pieces: next(deaths, False))

    deaths = iter([False] * 5 + [True])
    shared = compare(*data, FEATURE_FREE, tmp_path, entries=BLIND, crew=crew)
    alone = compare(*data, FEATURE_FREE, entries=BLIND)
    for one, two in zip(shared.rows, alone.rows, strict=True):
        assert (one.key, one.room, one.at_budget) == (two.key, two.room, two.at_budget)
    assert list(deaths) == []


def test_more_policies_and_seeds_may_be_added_to_what_is_finished(data, tmp_path) -> None:
    compare(*data, FEATURE_FREE, tmp_path, entries=[NAMED["random"]])
    entries = [NAMED["random"], NAMED["greedy"]]
    report = compare(*data, replace(FEATURE_FREE, seeds=(0, 1)), tmp_path, entries=entries)
    assert report.row("random").runs == 2 and report.row("greedy").runs == 1


def test_cells_of_other_data_or_options_are_refused(data, tmp_path) -> None:
    compare(*data, FEATURE_FREE, tmp_path)
    other = replace(FEATURE_FREE, evaluation=replace(FEW, guard_quantile=0.5))
    with pytest.raises(ConfigError, match="another guard_quantile"):
        compare(*data, other, tmp_path)
    table = data[0]
    changed = replace(table, accuracy=1 - table.accuracy)
    with pytest.raises(ConfigError, match="another data"):
        compare(changed, data[1], FEATURE_FREE, tmp_path)
    assert (tmp_path / ORIGIN).exists()


def test_a_damaged_cell_is_named(data, tmp_path) -> None:
    compare(*data, FEATURE_FREE, tmp_path)
    (tmp_path / CellSpec(ROSTER["full"]).file).write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"full\.0\.safetensors is damaged"):
        compare(*data, FEATURE_FREE, tmp_path)


def test_cells_come_back_as_they_were_saved(tmp_path) -> None:
    spec = CellSpec(ROSTER["grpo"], 3, knobs=("top_k",))
    choices = np.arange(6, dtype=np.int16).reshape(2, 3)
    Cell(spec, "ok", "a note", 1.5, 20.0, choices, choices + 1, choices[:, :0]).save(tmp_path)
    loaded = Cell.load(spec, tmp_path)
    assert loaded.note == "a note" and loaded.fit_seconds == 1.5
    assert np.array_equal(loaded.prices, choices + 1) and loaded.tuning_prices.shape == (2, 0)
    assert Cell.load(CellSpec(ROSTER["grpo"], 4), tmp_path) is None


def test_what_is_not_installed_is_a_row_and_no_crash(data, monkeypatch) -> None:
    monkeypatch.setattr(extras, "installed", lambda module: False)
    report = compare(*data, FEATURE_FREE, entries=[NAMED["bandit"]])
    assert report.row("bandit").status == "not installed"
    assert "not installed" in text_of(report) and "pip install vowpalwabbit" in text_of(report).replace("\n", " ")


def test_without_features_only_blind_policies_are_compared(data) -> None:
    report = compare(data[0], None, replace(QUICK, sections=("policies", "features", "samples"), sizes=(40,)))
    assert report.row("grpo").status == "needs features" and report.row("full").status == "ok"
    assert "no features" in text_of(report)


def test_without_labels_there_is_no_group_lookup(data) -> None:
    report = compare(replace(data[0], groups={}), data[1], FEATURE_FREE)
    assert report.row("group").status == "needs labels"
    assert report.row("lookup").room.visible_room_closed is None


def test_a_table_without_splits_gets_some_and_one_without_validation_too(data) -> None:
    table = replace(data[0], split=None)
    assert set(with_splits(table).split) == {"train", "validation", "test"}
    assert compare(table, None, FEATURE_FREE).row("lookup").status == "ok"
    no_validation = replace(data[0], split=tuple("train" if s == "validation" else s for s in data[0].split))
    assert set(learning_part(no_validation).split) == {"train", "validation"}


def test_views_leave_a_part_of_the_features_out(data) -> None:
    table, features = data
    image = viewed(features, "image", table, ("kind",))
    assert np.array_equal(image.image, features.image) and not image.language.any()
    labels = viewed(features, "labels", table, ("kind", "difficulty"))
    assert labels.language.sum(axis=1).tolist() == [1.0] * len(table) and labels.language.shape[1] == 18
    assert not viewed(features, "neither", table, ()).image.any()


# Tables that offer nothing, or hardly anything.


def table_of(accuracy, latency, space=None, split=None) -> tuple[ProfileTable, Features]:
    count, settings = np.shape(accuracy)
    space = space or KnobSpace({"tiles": list(range(1, settings + 1))})
    split = split or ["train"] * (count // 2) + ["validation"] * (count // 4) + ["test"] * (count - count * 3 // 4)
    ids = [f"s{i}" for i in range(count)]
    features = Features(tuple(ids), np.random.default_rng(0).normal(size=(count, 3)), np.ones((count, 2)))
    return ProfileTable.from_arrays(space, ids, accuracy, latency, split=split), features


EVERY = replace(QUICK, policies=tuple(ROSTER))


def compare_every(table, features, options=EVERY):
    return compare(table, features, options, entries=RIVALS)


def checked(report) -> None:
    """Every row has figures or a reason, and all of it can be written and printed."""
    json.dumps(report.to_dict(), allow_nan=False)
    assert "…" not in text_of(report)
    assert {row.status for row in report.rows} <= {"ok", "needs labels", "not installed"}


def test_a_table_with_one_setting() -> None:
    rng = np.random.default_rng(0)
    report = compare_every(*table_of(rng.random((80, 1)) < 0.5, np.full((80, 1), 20.0)))
    checked(report)
    assert {row.gain for row in report.rows if row.room is not None} == {0.0}
    assert report.row("grpo").room.room_closed is None


def test_columns_without_any_measurement() -> None:
    rng = np.random.default_rng(0)
    accuracy, latency = rng.random((80, 4)) < 0.5, np.tile([10.0, 20, 30, 40], (80, 1))
    accuracy = accuracy.astype(float)
    accuracy[:, 1] = np.nan
    latency[:, 2] = np.nan
    report = compare_every(*table_of(accuracy, latency))
    checked(report)
    for row in report.rows:
        chosen = {entry.setting["tiles"] for at in row.at_budget for entry in at.settings}
        assert chosen <= {1, 4}, row.name


def test_a_table_without_the_full_setting_or_without_anything() -> None:
    latency = np.tile([10.0, 20], (40, 1))
    report = compare(*table_of(np.ones((40, 2)), np.where([True, False], latency, np.nan)), FEATURE_FREE)
    assert report.latency_reference_ms == 10.0 and report.full_accuracy == 1.0  # of the largest that was measured
    with pytest.raises(DataError, match="no latency was measured"):
        compare(*table_of(np.full((40, 2), np.nan), np.full((40, 2), np.nan)), FEATURE_FREE)
    with pytest.raises(DataError, match=r"no accuracy|measured"):
        compare(*table_of(np.full((40, 2), np.nan), latency), FEATURE_FREE)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_accuracy(value: float) -> None:
    report = compare_every(*table_of(np.full((80, 3), value), np.tile([10.0, 20, 40], (80, 1))))
    checked(report)
    assert {row.gain for row in report.rows if row.room is not None} == {0.0}
    assert report.row("oracle").room.room_closed is None


def test_fewer_samples_than_anything_needs() -> None:
    split = ["train", "train", "validation", "test", "test"]
    report = compare_every(*table_of(np.eye(5)[:, :3], np.tile([10.0, 20, 40], (5, 1)), split=split))
    checked(report)


def test_two_samples_cannot_be_split() -> None:
    table, _ = table_of(np.ones((2, 2)), np.tile([10.0, 20], (2, 1)), split=["train", "test"])
    with pytest.raises(DataError, match="cannot be drawn"):
        compare(replace(table, split=None), None, FEATURE_FREE)


def test_one_image_cannot_be_held_out_from() -> None:
    table, _ = table_of(np.ones((3, 2)), np.tile([10.0, 20], (3, 1)), split=["train", "test", "test"])
    with pytest.raises(DataError, match="none can be held out"):
        compare(table, None, FEATURE_FREE)


def test_budgets_below_every_latency() -> None:
    rng = np.random.default_rng(0)
    options = replace(EVERY, evaluation=replace(FEW, budget_shares=(0.001, 0.01)))
    report = compare_every(*table_of(rng.random((80, 3)) < [0.2, 0.5, 0.8], np.tile([10.0, 20, 40], (80, 1))), options)
    checked(report)
    guarded = [row for row in report.rows if row.status == "ok" and row.key not in ("full", "static")]
    assert {at.settings[0].setting["tiles"] for row in guarded for at in row.at_budget} == {1}
    assert {at.violation_rate.value for row in guarded if row.key != "oracle" for at in row.at_budget} == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": ("magic",)}, "no policy magic"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "different"),
        ({"sections": ("poems",)}, "sections"),
        ({"sizes": (3,)}, "at least 10"),
        ({"members": 0}, "members=0"),
    ],
)
def test_options_that_cannot_work(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(QUICK, **change)


# The command.


@pytest.fixture
def files(data, tmp_path):
    data[0].save(tmp_path / "t.parquet")
    data[1].save(tmp_path / "f.safetensors")
    return ["--table", str(tmp_path / "t.parquet"), "--features", str(tmp_path / "f.safetensors")]


def test_the_command_writes_and_resumes_and_refuses(files, tmp_path, capsys) -> None:
    words = ["compare", *files, "--quick", "--policies", "full", "lookup", "--resamples", "20"]
    words += ["--output_dir", str(tmp_path / "o")]
    assert cli.main(words) == 0
    assert "full setting" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"comparison.json", "comparison.png", "cells"}
    assert cli.main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == 2
    assert cli.main([*words, "--overwrite"]) == 0


def test_the_command_reads_a_table_alone(files, capsys) -> None:
    assert cli.main(["compare", *files[:2], "--quick", "--resamples", "20"]) == 0
    assert "no features" in capsys.readouterr().out


def test_the_command_lists_policies_and_refuses_mistakes(files, capsys) -> None:
    assert cli.main(["compare", "--policies", "help"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ROSTER)
    for words in (["--features", "x"], [*files, "--resume"], [*files, "--policies", "magic"]):
        assert cli.main(["compare", *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_the_tiny_table_has_no_test_split_and_that_is_said() -> None:
    with pytest.raises(DataError, match="no test samples"):
        compare(*tiny(), FEATURE_FREE)


def two_humps(count: int = 80) -> tuple[ProfileTable, Features]:
    """Answers are short or long, so that the bound of each setting is far above the full setting's median."""
    long = (np.arange(count) % 4 == 0)[:, None]
    latency = np.where(long, [[300.0, 400, 500]], [[80.0, 90, 100]])
    return table_of(np.random.default_rng(0).random((count, 3)) < [0.2, 0.5, 0.8], latency)


def test_budgets_without_a_choice_are_said_and_nobody_is_ranked() -> None:
    own = replace(EVERY, evaluation=replace(FEW, budget_shares=(0.5, 1.0)), policies=("lookup", "predict", "knn"))
    report = compare(*two_humps(), own)
    assert report.options["evaluation"]["budget_shares"] == (0.5, 1.0)  # the user's own budgets are kept
    assert report.ranks == {"lookup": 1, "predict": 1, "knn": 1}
    first, second, *_ = text_of(report).splitlines()
    assert first == "Nothing is ranked under a budget: all 3 policies that keep the budgets choose alike at each."
    assert "at 0.5, 1 no setting's bound is within the budget" in second
    assert report.notes[0] == first and report.row("lookup").room.room_closed is None


def test_the_usual_budgets_make_way_for_those_that_leave_a_choice() -> None:
    usual = replace(EVERY, evaluation=replace(FEW, budget_shares=BUDGET_SHARES), policies=("lookup",))
    report = compare(*two_humps(), usual)
    # bounds are 300, 400 and 500 ms, the full setting's median is 100 ms
    assert report.options["evaluation"]["budget_shares"] == (4.0, 4.2, 4.4, 4.6, 4.8, 5.0)
    assert report.room_budget_shares == (4.0, 4.2, 4.4, 4.6, 4.8, 5.0)
    assert any("Budgets from the bounds are taken instead: 4, 4.2" in note for note in report.notes)
    lookup = report.row("lookup")
    assert [at.settings[0].setting["tiles"] for at in lookup.at_budget] == [2, 2, 2, 2, 2, 3]


def test_policies_that_do_alike_share_a_rank_and_others_follow_at_their_place() -> None:
    at = {name: (figures_at(value),) for name, value in {"a": 0.9, "b": 0.9, "c": 0.5}.items()}
    rows = [
        ComparisonRow(
            key=name, name=name, role="baseline", section="policies", variant="", status="ok", note="", runs=1,
            comparable=True, at_budget=at[name],
        )
        for name in at
    ]  # fmt: skip
    assert replace(compare(*two_humps(), FEATURE_FREE), rows=tuple(rows)).ranks == {"a": 1, "b": 1, "c": 3}


def figures_at(accuracy: float) -> AtBudget:
    number = Estimate(accuracy, accuracy, accuracy)
    return AtBudget(1.0, 10.0, number, number, number, 1.0, 1.0, number, ())

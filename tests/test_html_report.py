"""The report: what it reads, what it says, that it stands alone, and what is refused."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import numpy as np
import pytest
from planted_tables import SPACE, planted

from budgetvlm import _extras as extras
from budgetvlm.cli import main
from budgetvlm.controller.ensembling import train_ensemble
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import train
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import DataError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluate
from budgetvlm.features import Features
from budgetvlm.html_report.blocks import BarChart, Bars, HeatMap, LineChart, Series
from budgetvlm.html_report.chapters import sections, write_page
from budgetvlm.html_report.choices import Choices, pick_examples
from budgetvlm.html_report.interactive import figure
from budgetvlm.html_report.looks import Look
from budgetvlm.html_report.report_data import Material, Shown
from budgetvlm.html_report.saved_results import read_comparison, read_evaluation, read_live, read_run
from budgetvlm.knobs import KnobSpace
from budgetvlm.live.live_evaluation import LiveRecord, summary
from budgetvlm.table import ProfileTable

OPTIONS = EvaluationOptions(budget_shares=(0.5, 0.8, 1.0), resamples=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table, its features, a briefly trained controller, its evaluation, a live run, a comparison: all on disk."""
    root = tmp_path_factory.mktemp("report")
    made = planted(120, 40, 60, width=8)
    made.table.save(root / "T.parquet")
    made.features.save(root / "F.safetensors")
    config = TrainingConfig(hidden_dim=8, grpo=replace(TrainingConfig().grpo, num_epochs=2))
    train(made.table, made.features, config, root / "controller", say=lambda text: None, progress=False)
    controller = GRPOController.from_pretrained(root / "controller")
    found = evaluate(made.table, made.features, {"controller": ControllerPolicy(controller)}, OPTIONS)
    (root / "evaluation.json").write_text(json.dumps(found.to_dict()))
    (root / "live.json").write_text(json.dumps(live()))
    rows = [{"name": r.name, "role": r.role, "room": asdict(r.room)} for r in found.policies if r.room]
    (root / "comparison.json").write_text(json.dumps({"schema_version": 1, "rows": rows}))
    return root


def live(requests=40):
    """What `budgetvlm evaluate --live` writes; every fifth request without the guard is late."""
    records = [
        LiveRecord(
            system=system, number=n, phase="before", sample_id=f"s{n}", groups={"kind": str(n % 3)},
            budget_share=(0.5, 1.0)[n % 2], budget_ms=50.0, latency_ms=40.0, controller_ms=0.2 + 0.01 * (n % 7),
            promised=True, violated=system == "unguarded" and n % 5 == 0, accuracy=1.0, finish_reason="",
            setting={},
        )
        for n in range(requests)
        for system in ("guarded", "unguarded")
    ]  # fmt: skip
    return summary(records, 0.05) | {"reference_ms": 50.0, "records": [asdict(record) for record in records]}


def words(folder, *more):
    data = ["--table", str(folder / "T.parquet"), "--features", str(folder / "F.safetensors")]
    return ["report", *data, *map(str, more)]


@pytest.fixture(scope="module")
def page(folder):
    """The page of everything that lies on disk, and the plots."""
    given = [f"--{name}={folder / file}" for name, file in
             (("evaluation", "evaluation.json"), ("live", "live.json"), ("compare", "comparison.json"))]  # fmt: skip
    out = ["--output", folder / "report.html"]
    assert main(words(folder, "--checkpoint", folder / "controller", *given, *out)) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def own_part(page):
    """The page without Plotly's code."""
    start = page.index("<script>", page.index("</noscript>"))
    return page[:start] + page[page.index("</script>", start) :]


def test_the_page_has_every_chapter_and_what_was_found(page, folder):
    text = own_part(page)
    for title in (
        "At a glance",
        "Accuracy against time",
        "Requests over their budget",
        "Which settings for which inputs",
        "How the knobs act together",
        "Comparison with everything simple",
        "Learning curves",
        "What deciding costs",
        "What was measured, and how",
    ):
        assert f"<h2>{title}</h2>" in text
    found = read_evaluation(folder / "evaluation.json")
    gain = found.policy("controller").room.accuracy_gain
    assert f"<b>{100 * gain.value:+.1f} points</b>" in text
    assert "20.0%" in text  # of the unguarded requests are late


def test_the_page_stands_alone(page):
    text = own_part(page)
    assert page.count("/**\n* plotly.js") == 1
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    assert "@import" not in text and "url(" not in text


def test_every_chart_has_a_place_a_figure_and_its_numbers(page):
    text = own_part(page)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    places = re.findall(r'class="plot" id="([^"]+)"', text)
    assert len(places) == len(set(places)) == len(figures) > 15
    assert text.count("<summary>Show the figures</summary>") == len(places)


def test_an_evaluation_is_read_back_as_it_was(folder):
    document = json.loads((folder / "evaluation.json").read_text())
    assert json.loads(json.dumps(read_evaluation(folder / "evaluation.json").to_dict())) == document


def test_a_comparison_of_any_shape_is_shown_or_left_out(folder, tmp_path):
    assert read_comparison(folder / "comparison.json")[0]["name"] == "controller"
    path = tmp_path / "c.json"
    for document, shown in (
        ([1, 2], None),
        ({"policies": 3}, None),
        ({"policies": [{"name": "x"}, "y"]}, None),
        ({"policies": {"x": {"room": {}}}}, ({"name": "x", "room": {}},)),
    ):
        path.write_text(json.dumps(document))
        assert read_comparison(path) == shown


def material(folder, **changes):
    made = planted(120, 40, 60, width=8)
    return replace(Material(made.table, read_evaluation(folder / "evaluation.json")), **changes)


def test_what_is_not_given_is_named_and_not_made_up(folder, tmp_path):
    chapters = sections(material(folder))
    write_page(chapters, "<b>mine</b>", tmp_path / "p.html")
    text = own_part((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "No controller was given" in text and "Not measured on the real clock" in text
    assert "&lt;b&gt;mine&lt;/b&gt;" in text and "<b>mine" not in text


def test_pictures_and_choices_of_easy_and_hard_samples_are_shown(folder, tmp_path):
    made = planted(120, 40, 60, width=8)
    controller = GRPOController.from_pretrained(folder / "controller")
    found = Choices.of(made.table, made.features, {"c": ControllerPolicy(controller)}, OPTIONS)
    picked = pick_examples(found.table)
    shown = {
        found.table.sample_ids[p.row]: Shown("data:image/jpeg;base64,AA==", f"what <{p.row}>", ("1",)) for p in picked
    }
    write_page(sections(material(folder, choices=found, shown=shown)), "t", tmp_path / "p.html")
    text = own_part((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert text.count('<img src="data:image/jpeg') == len(picked) >= 6
    assert f"what &lt;{picked[0].row}&gt;" in text


def test_easy_is_right_at_the_cheapest_setting_and_hard_is_not():
    accuracy = np.array([[1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=float)
    table = ProfileTable.from_arrays(KnobSpace({"k": [1, 2, 3]}), range(5), accuracy, np.tile([1.0, 2.0, 3.0], (5, 1)))
    picked = {(p.why, p.row) for p in pick_examples(table, each=2)}
    assert picked == {("easy", 0), ("easy", 4), ("hard", 1), ("hard", 2), ("never right", 3)}


def test_late_requests_of_a_group_are_counted_over_its_timed_samples(folder):
    made = planted(120, 40, 60, width=8)
    controller = GRPOController.from_pretrained(folder / "controller")
    found = Choices.of(made.table, made.features, {"c": ControllerPolicy(controller)}, OPTIONS)
    rows = found.groups["kind: 0"]
    chosen = found.found.chosen[0, 1, rows]
    late = found.table.latency_ms[rows, chosen] > found.budgets_ms[1]
    assert found.late(rows)[1] == pytest.approx(late.mean())
    assert found.late(np.zeros_like(rows)) == [None] * 3
    assert sum(found.values("top_k", rows, 1)) == pytest.approx(1.0)


CHARTS = [
    LineChart("l", "t", "n", "x", "y",
              (Series("a", (1.0, None), (2.0, 3.0), Look("#112233"), (1.0, 2.0), (3.0, 4.0)),), 2.0, "z"),
    BarChart("b", "t", "", "x", "y", ("p", "q"),
             (Bars("a", (1.0, None), "#112233", (0.5, None), (2.0, None)),), flat=True),
    HeatMap("h", "t", "", "x", "y", ("p", "q"), ("r",), ((1.0, None),), "ms"),
]  # fmt: skip


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.key)
def test_unknown_numbers_leave_gaps_in_both_renderings(chart, tmp_path):
    from budgetvlm.html_report.still import save

    text = json.dumps(figure(chart), allow_nan=False)
    assert "null" in text and "template" not in json.loads(text)["layout"]
    first = [path.read_bytes() for path in save(chart, tmp_path)]
    assert [path.read_bytes() for path in save(chart, tmp_path)] == first  # equal charts, equal files


def test_a_missing_extra_names_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    assert main(words(folder, "--output", folder / "never.html")) == 2
    assert "pip install 'budgetvlm[report]'" in capsys.readouterr().err
    assert not (folder / "never.html").exists()


def test_bad_input_is_refused_with_what_to_do(folder, tmp_path, capsys):
    def refused(*more):
        assert main(words(folder, *more)) == 2
        return capsys.readouterr().err

    (tmp_path / "there.html").write_text("mine")
    assert "--overwrite" in refused("--output", tmp_path / "there.html")
    assert "is a directory" in refused("--output", tmp_path)
    out = ("--output", tmp_path / "r.html")
    assert "does not exist" in refused("--evaluation", tmp_path / "none.json", *out)
    assert "does not exist" in refused("--checkpoint", tmp_path / "none", *out)
    assert main(["report", *map(str, out)]) == 2
    assert "give either --table and --features, or --data" in capsys.readouterr().err
    old = json.loads((folder / "evaluation.json").read_text()) | {"schema_version": 99}
    (tmp_path / "e.json").write_text(json.dumps(old))
    assert "schema_version is 99" in refused("--evaluation", tmp_path / "e.json", *out)
    other = KnobSpace({"max_crops": [1, 2], "top_k": [1, 2]})
    GRPOController(8, 8, knob_values=other.to_dict(), hidden_dim=4).save_pretrained(tmp_path / "other")
    assert "another knob space" in refused("--checkpoint", tmp_path / "other", *out)
    assert (tmp_path / "there.html").read_text() == "mine" and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("damage", ["alpha", "systems", "by_group", "controller_ms"])
def test_a_live_run_of_another_version_is_refused(damage, tmp_path):
    document = live()
    if damage in document:
        del document[damage]
    elif damage == "by_group":
        del document["systems"]["guarded"][damage]
    else:
        del document["systems"]["guarded"]["all"][damage]
    (tmp_path / "live.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=damage):
        read_live(tmp_path / "live.json")


def test_an_evaluation_of_other_knobs_is_refused(folder):
    table = ProfileTable.from_arrays(KnobSpace({"k": [1, 2]}), ["a"], [[1, 1]], [[1.0, 2.0]], split=["test"])
    with pytest.raises(ValueError, match="the evaluation is of other knobs"):
        Material(table, read_evaluation(folder / "evaluation.json"))


def test_an_evaluation_of_other_samples_is_refused(folder):
    with pytest.raises(DataError, match="the evaluation is of 60 test samples, and the data has 50"):
        Material(planted(120, 40, 50, width=8).table, read_evaluation(folder / "evaluation.json"))


def test_a_damaged_history_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"history": [{"loss": 1}]}))
    with pytest.raises(DataError, match="its history is no list of epochs"):
        read_run(tmp_path, "x")


def small(space, accuracy, latency, samples=60):
    rng = np.random.default_rng(0)
    table = ProfileTable.from_arrays(
        space, range(samples), np.tile(accuracy, (samples, 1)), np.tile(latency, (samples, 1)),
        split=["train"] * 30 + ["validation"] * 15 + ["test"] * 15,
    )  # fmt: skip
    return table, Features(table.sample_ids, rng.normal(size=(samples, 2)), rng.normal(size=(samples, 2)))


@pytest.mark.parametrize(
    ("space", "accuracy", "latency"),
    [
        (KnobSpace({"k": [1]}), [1.0], [10.0]),
        (KnobSpace({"k": [1, 2]}), [0.0, 1.0], [10.0, 20.0]),
        (KnobSpace({"k": [1, 2], "m": [1, 2]}), [0.0, np.nan, 1.0, 1.0], [10.0, np.nan, 20.0, 30.0]),
    ],
    ids=["one setting", "one knob", "a column that was not measured"],
)
def test_small_and_gappy_tables_give_a_report(space, accuracy, latency, tmp_path):
    table, features = small(space, accuracy, latency)
    controller = GRPOController(2, 2, knob_values=space.to_dict(), hidden_dim=4, latency_reference_ms=20.0)
    policies = {"c": ControllerPolicy(controller)}
    found = evaluate(table, features, policies, OPTIONS)
    chapters = sections(Material(table, found, Choices.of(table, features, policies, OPTIONS)))
    write_page(chapters, "t", tmp_path / "p.html")
    assert "NaN" not in own_part((tmp_path / "p.html").read_text(encoding="utf-8"))


def test_every_plot_is_a_png_and_an_svg_too(tmp_path, capsys):
    table, features = small(KnobSpace({"k": [1, 2]}), [0.0, 1.0], [10.0, 20.0])
    table.save(tmp_path / "T.parquet")
    features.save(tmp_path / "F.safetensors")
    assert main(words(tmp_path, "--output", tmp_path / "r.html", "--plots", tmp_path / "plots")) == 0
    places = re.findall(r'class="plot" id="([^"]+)"', own_part((tmp_path / "r.html").read_text(encoding="utf-8")))
    files = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(files) == {f"{key}.{kind}" for key in places for kind in ("png", "svg")}
    assert f"plots: {len(files)} files" in capsys.readouterr().out
    assert files[f"{places[0]}.png"].startswith(b"\x89PNG") and b"<svg" in files[f"{places[0]}.svg"]


def test_a_table_without_any_latency_is_refused():
    table, features = small(SPACE, np.ones(27), np.full(27, np.nan))
    with pytest.raises(DataError, match="was not measured"):
        evaluate(table, features, {}, OPTIONS)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium here")
def test_a_browser_draws_every_plot_and_reports_no_error(page, folder):
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=10000", "--enable-logging=stderr", "--v=0", "--dump-dom",
         f"file://{folder / 'report.html'}"],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    drawn = done.stdout.count('class="main-svg" xmlns')
    assert drawn >= page.count('class="plot" id=')


def test_an_ensemble_has_a_learning_curve_for_each_member(folder, tmp_path):
    table, features = ProfileTable.load(folder / "T.parquet"), Features.load(folder / "F.safetensors")
    config = TrainingConfig(hidden_dim=8, grpo=replace(TrainingConfig().grpo, num_epochs=2))
    train_ensemble(table, features, config, tmp_path / "five", 11, say=lambda text: None, progress=False)
    run = read_run(tmp_path / "five", "five")
    assert [one.name for one in run.members] == [f"five, member {n}" for n in range(1, 12)]
    assert [one.training["seed"] for one in run.members] == list(range(11))  # the tenth does not come second
    (learning,) = (section for section in sections(material(folder, runs=(run,))) if section.key == "learning")
    assert [series.name for series in learning.charts[0].series] == [one.name for one in run.members]

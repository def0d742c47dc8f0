"""The report: what it reads, what it says, that it stands alone, and what is refused."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import numpy as np
import pytest
from planted_tables import SPACE, planted

from budgetvlm.cli import main
from budgetvlm.comparison import CompareOptions, compare
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import train
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import DataError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import evaluate
from budgetvlm.evaluation.policy_styles import PolicyStyle
from budgetvlm.evaluation.records import Estimate
from budgetvlm.features import Features
from budgetvlm.html_report.controller_choices import choices_of, late_share, value_shares
from budgetvlm.html_report.page import charts_of, figure_document, report_sections, write_page
from budgetvlm.html_report.picture_files import save_pictures
from budgetvlm.html_report.report_chart import (
    ReportChart,
    bar_figure,
    bars,
    chart_table,
    curve,
    heat_figure,
    line_figure,
)
from budgetvlm.html_report.report_inputs import ReportInputs, SamplePicture
from budgetvlm.html_report.saved_results import read_comparison, read_evaluation, read_live, read_run
from budgetvlm.html_report.section_choices import pick_samples
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
    compared = compare(made.table, made.features, CompareOptions(OPTIONS, ("lookup", "full"), sections=("policies",)))
    (root / "comparison.json").write_text(json.dumps(compared.to_dict()))
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
    assert text.count("<summary>Show the numbers</summary>") == len(places)


def test_an_evaluation_is_read_back_as_it_was(folder):
    document = json.loads((folder / "evaluation.json").read_text())
    assert json.loads(json.dumps(read_evaluation(folder / "evaluation.json").to_dict())) == document


def test_a_damaged_evaluation_names_what_is_missing(folder, tmp_path):
    document = json.loads((folder / "evaluation.json").read_text())
    del document["policies"][0]["at_budget"][0]["budget_ms"]
    (tmp_path / "e.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="is damaged: AtBudget lacks budget_ms"):
        read_evaluation(tmp_path / "e.json")


def test_a_comparison_is_read_back_and_its_tables_and_gains_are_shown(page, folder):
    document = json.loads((folder / "comparison.json").read_text())
    found = read_comparison(folder / "comparison.json")
    assert json.loads(json.dumps(found.to_dict())) == document
    assert 'id="comparison_gain"' in page
    row = found.row("full")
    assert f"<td>{100 * row.regret:.1f}</td>" in page and "points over\nlookup table</th>" in page


@pytest.mark.parametrize("document", [[1, 2], {"rows": []}, {"policies": {}}, {"rows": [1], "notes": []}])
def test_what_is_no_comparison_is_refused(document, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="comparison"):
        read_comparison(tmp_path / "c.json")


def inputs(folder, **changes):
    made = planted(120, 40, 60, width=8)
    return replace(ReportInputs(made.table, read_evaluation(folder / "evaluation.json")), **changes)


def test_what_is_not_given_is_named_and_not_made_up(folder, tmp_path):
    chapters = report_sections(inputs(folder))
    write_page(chapters, "<b>mine</b>", tmp_path / "p.html")
    text = own_part((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "No controller was given" in text and "Not measured on the real clock" in text
    assert "&lt;b&gt;mine&lt;/b&gt;" in text and "<b>mine" not in text


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (Estimate(0.18, -0.08, 0.34), ("<b>18%</b>", "[-8% to 34%]", "less time at")),
        (Estimate(-0.18, -0.34, 0.08), ("<b>18%</b>", "[-8% to 34%]", "more time at")),
    ],
)
def test_time_is_saved_or_lost_in_words(saved, words, folder, tmp_path):
    given = inputs(folder)
    policies = [
        replace(p, at_accuracy=(replace(p.at_accuracy[0], saved=saved),)) if p.name == "controller" else p
        for p in given.evaluation.policies
    ]
    chapters = report_sections(replace(given, evaluation=replace(given.evaluation, policies=tuple(policies))))
    write_page(chapters, "t", tmp_path / "p")
    text = own_part((tmp_path / "p").read_text(encoding="utf-8"))
    assert all(word in text for word in words)


def test_mean_budgets_have_a_section_and_so_has_an_evaluation_without_them(folder, tmp_path):
    given = inputs(folder)
    (chapter,) = (section for section in report_sections(given) if section.key == "mean")
    lines, over = chapter.charts[0]
    blind = next(trace for trace in lines.figure.data if trace.name == "best blind mix")
    found = given.evaluation.policy("best blind mix").at_mean_budget
    assert list(blind.x) == [at.budget_ms for at in found]
    assert list(blind.y) == [100 * at.accuracy.value for at in found]
    assert {trace.name for trace in over.figure.data} == {"controller", "predict + argmax"}
    bare = tuple(replace(result, at_mean_budget=()) for result in given.evaluation.policies)
    write_page(
        report_sections(replace(given, evaluation=replace(given.evaluation, policies=bare))), "t", tmp_path / "p"
    )
    assert "This evaluation has no mean budgets" in (tmp_path / "p").read_text(encoding="utf-8")


def test_pictures_and_choices_of_easy_and_hard_samples_are_shown(folder, tmp_path):
    made = planted(120, 40, 60, width=8)
    controller = GRPOController.from_pretrained(folder / "controller")
    found = choices_of(made.table, made.features, {"c": ControllerPolicy(controller)}, OPTIONS)
    picked = pick_samples(found.table)
    shown = {
        found.table.sample_ids[p.row]: SamplePicture("data:image/jpeg;base64,AA==", f"what <{p.row}>", ("1",))
        for p in picked
    }
    write_page(report_sections(inputs(folder, choices=found, pictures=shown)), "t", tmp_path / "p.html")
    text = own_part((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert text.count('<img src="data:image/jpeg') == len(picked) >= 6
    assert f"what &lt;{picked[0].row}&gt;" in text


def test_easy_is_right_at_the_cheapest_setting_and_hard_is_not():
    accuracy = np.array([[1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=float)
    table = ProfileTable.from_arrays(KnobSpace({"k": [1, 2, 3]}), range(5), accuracy, np.tile([1.0, 2.0, 3.0], (5, 1)))
    picked = {(p.kind, p.row) for p in pick_samples(table, each=2)}
    assert picked == {("easy", 0), ("easy", 4), ("hard", 1), ("hard", 2), ("never right", 3)}


def test_late_requests_of_a_group_are_counted_over_its_timed_samples(folder):
    made = planted(120, 40, 60, width=8)
    controller = GRPOController.from_pretrained(folder / "controller")
    found = choices_of(made.table, made.features, {"c": ControllerPolicy(controller)}, OPTIONS)
    rows = found.groups["kind: 0"]
    chosen = found.outcomes.chosen[0, 1, rows]
    late = found.table.latency_ms[rows, chosen] > found.budgets_ms[1]
    assert late_share(found, rows)[1] == pytest.approx(late.mean())
    assert late_share(found, np.zeros_like(rows)) == [None] * 3
    assert sum(value_shares(found, "top_k", rows, 1)) == pytest.approx(1.0)


CHARTS = [
    ReportChart(
        "lines", "t",
        line_figure(
            curve("a", (1.0, None), (2.0, 3.0), PolicyStyle("#112233"), [(1.0, 3.0), (2.0, 4.0)]), "x", "y", (2.0, "z")
        ),
    ),
    ReportChart(
        "bars", "t",
        bar_figure([bars("a", "pq", (1.0, None), "#112233", [(0.5, 2.5), (None, None)], flat=True)], "x", "y"),
    ),
    ReportChart("stacked", "t", bar_figure([bars("a", "pq", (1.0, None), "#112233")], "x", "y", stacked=True)),
    ReportChart("heat", "t", heat_figure("pq", "r", [(1.0, None)], "ms", ("x", "y"))),
]  # fmt: skip


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.key)
def test_unknown_numbers_leave_gaps_in_page_and_pictures(chart, tmp_path):
    document = figure_document(chart)
    assert "null" in json.dumps(document, allow_nan=False) and "template" not in document["layout"]
    first = [path.read_bytes() for path in save_pictures(chart, tmp_path)]
    assert [path.read_bytes() for path in save_pictures(chart, tmp_path)] == first  # equal charts, equal files


@pytest.mark.parametrize(
    ("chart", "header", "rows"),
    [
        (CHARTS[0], ("line", "x", "y", "from", "to"), [("a", "1", "2", "1", "3"), ("a", "–", "3", "2", "4")]),
        (CHARTS[1], ("y", "a"), [("p", "1"), ("q", "–")]),
        (CHARTS[3], ("y", "p", "q"), [("r", "1", "–")]),
    ],
    ids=["lines", "bars", "heat"],
)
def test_the_table_of_a_chart_has_every_number_that_is_drawn(chart, header, rows):
    assert chart_table(chart.figure) == (list(header), rows)


def test_whiskers_reach_from_the_lower_to_the_upper_end():
    error = CHARTS[1].figure.data[0].error_x
    assert (error.arrayminus[0], error.array[0]) == (0.5, 1.5)


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
        ReportInputs(table, read_evaluation(folder / "evaluation.json"))


def test_an_evaluation_of_other_samples_is_refused(folder):
    with pytest.raises(DataError, match="the evaluation is of 60 test samples, and the data has 50"):
        ReportInputs(planted(120, 40, 50, width=8).table, read_evaluation(folder / "evaluation.json"))


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
    chapters = report_sections(ReportInputs(table, found, choices_of(table, features, policies, OPTIONS)))
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
    with pytest.raises(DataError, match="no latency was measured"):
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
    train(table, features, config, tmp_path / "five", members=11, say=lambda text: None, progress=False)
    run = read_run(tmp_path / "five", "five")
    assert [one.name for one in run.members] == [f"five, member {n}" for n in range(1, 12)]
    assert [one.training["seed"] for one in run.members] == list(range(11))  # the tenth does not come second
    (learning,) = (section for section in report_sections(inputs(folder, runs=(run,))) if section.key == "learning")
    assert [trace.name for trace in charts_of((learning,))[0].figure.data] == [one.name for one in run.members]

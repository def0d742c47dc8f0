"""`budgetvlm bench`: what it compares is the same thing on both sides, and it says what it should."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_vlm import write_tiny_model

from benchmarks.speed import decision, memory, overhead, sections, sweeps
from benchmarks.speed import training_speed as training
from benchmarks.speed.bench_data import BenchOptions, Material, fresh_controller, made_up
from benchmarks.speed.figures import Figure
from benchmarks.speed.naive import NaiveTrainer, write_rows
from budgetvlm import cli
from budgetvlm.commands.bench import NAMES
from budgetvlm.controller.trainer import DrawnGroups
from budgetvlm.controller.training_states import TrainingStates
from budgetvlm.errors import DataError, OutputError
from budgetvlm.profiling.prepare import fill


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny model with 8 settings, a made-up profile and an untrained controller."""
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    knobs = json.loads((directory / "knobs.json").read_text())
    knobs["knob_space"] = {"max_crops": [1, 4], "top_k": [1, 4], "num_active_blocks": [2, 4]}
    (directory / "knobs.json").write_text(json.dumps(knobs))
    return Material(BenchOptions(quick=True, model_path=str(directory)))


@pytest.fixture
def tiny(monkeypatch):
    """Sizes of seconds."""
    monkeypatch.setattr(decision, "QUICK", (2, 10))
    monkeypatch.setattr(overhead, "QUICK", (2, 2))
    monkeypatch.setattr(overhead, "CHANGES", 20)
    monkeypatch.setattr(training, "QUICK", (2, 60, 3))
    monkeypatch.setattr(memory, "QUICK_SAMPLES", 200)
    monkeypatch.setattr(memory, "_process", in_this_process)
    monkeypatch.setattr(sweeps, "ACCURACY_QUICK", (1, 3))
    monkeypatch.setattr(sweeps, "LATENCY_QUICK", (6, 1))
    monkeypatch.setattr(fill, "MIN_CELLS", 4)
    monkeypatch.setattr(sweeps, "MODEL_QUICK", (2, 50))


def in_this_process(step, directory, *words):
    if step == "write":
        memory.write(Path(directory), int(words[0]))
        return ""
    memory.train_once(Path(directory))
    return json.dumps({"peak_gb": memory.peak_gb(), "seconds": 1.0})


def judged(figures) -> int:
    for figure in figures:
        assert figure.low <= figure.median <= figure.high and all(map(math.isfinite, (figure.low, figure.high)))
    return sum(figure.met is not None for figure in figures)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("decision", 2), ("overhead", 3), ("training", 3), ("memory", 1), ("accuracy", 1), ("latency", 3)],
)
def test_each_section_gives_its_figures_and_judges_its_targets(name, targets, material, tiny):
    title, measure = sections.SECTIONS[name]
    assert title and judged(measure(material)) == targets


def test_the_command_knows_every_section():
    assert tuple(sections.SECTIONS) == NAMES


@pytest.mark.parametrize(("limit", "code"), [(1e9, 0), (0.0, 1)])
def test_a_missed_target_is_exit_code_1_in_one_json_document(limit, code, material, tiny, monkeypatch, capsys):
    monkeypatch.setattr(decision, "P50_US", limit)
    monkeypatch.setattr(decision, "P99_US", 1e9)
    words = ["bench", "--sections", "decision", "--quick", "--model_path", material.options.model_path]
    assert cli.main([*words, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"schema_version", "quick", "sections", "missed", "hardware", "versions"}
    first = document["sections"][0]["figures"][0]
    assert set(first) == {"name", "unit", "median", "low", "high", "runs", "at_most", "at_least", "met"}
    assert (first["met"], first["runs"], document["missed"]) == (code == 0, 2, [first["name"]] * code)
    assert cli.main(words) == code
    page = capsys.readouterr().out
    assert ("MISS" in page, "pass" in page) == (code == 1, True)
    assert page.splitlines()[-1].startswith(f"{2 - code} of 2 targets met")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sections", "speed"], "choose from"),
        (["--num_threads", "0"], "num_threads=0 has to be 1 at least"),
        (["--seed", "-1"], "-1 is no seed; give a whole number from 0"),
        (["--data", "no.json", "--sections", "decision"], "no.json"),
        (["--checkpoint", "nowhere", "--sections", "decision"], "nowhere"),
    ],
)
def test_what_cannot_work_is_said_at_once(words, message, capsys):
    try:
        code = cli.main(["bench", *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


def test_both_ways_to_decide_choose_alike(material):
    """They differ in who computes the values; the bounds and the choice are the runtime's."""
    quick, eager = decision.decisions(Material(material.options), 40)  # with a guard that has learnt nothing yet
    chosen = [one() for one in quick]
    assert chosen == [one() for one in eager] and len(set(chosen)) > 1


@pytest.mark.parametrize("same", [True, False])
def test_the_plain_trainer_makes_the_updates_of_ours(same, tmp_path):
    """One batch of rows: the gradient of its loss is that of ours for the same states and settings."""
    table, features = made_up(20, widths=(6, 5))
    samples, budgets, group = 20, 3, table.num_settings
    assert write_rows(table, features, tmp_path / "rows.json") == samples * budgets * group
    ours = _trainer(table, features, group)
    plain = NaiveTrainer(ours.template, tmp_path / "rows.json", groups=samples * budgets)
    batch = next(iter(plain.loader))
    shape = (-1, group)
    settings = batch["setting"].reshape(shape)
    assert torch.equal(settings, torch.arange(group).expand_as(settings))  # an update covers all settings of each state
    if not same:
        settings[:, 1] = settings[:, 0]
    names = batch["sample_id"][::group]
    states = TrainingStates(
        torch.tensor([[table.sample_ids.index(name) for name in names]]),
        batch["budget_ms"].reshape(shape)[None, :, 0],
        torch.full((1, len(names)), plain.price),
    )
    prepared = ours.prepare(states)
    log_policy = ours.log_policy(prepared)
    groups = DrawnGroups(settings[None], log_policy.detach().gather(-1, settings[None]))
    ours.loss(prepared, log_policy, groups, ours.advantages(prepared, log_policy, groups)).sum().backward()
    found = torch.autograd.grad(plain.loss(batch), list(ours.template.parameters()))
    for parameter in ours.stack.parameters():
        parameter.data = parameter.grad  # so that the gradients can be read in the controller's own layout
    ours.stack.copy_to(0, ours.template)
    pairs = list(zip(ours.template.parameters(), found, strict=True))
    assert len(pairs) > 5 and max(float(w.detach().abs().max()) for w, _ in pairs) > 1e-4
    assert all(torch.allclose(w, f, rtol=1e-3, atol=1e-6) for w, f in pairs) == same


def _trainer(table, features, group):
    """Ours without dropout and without an entropy bonus, which the plain one lacks, on all samples."""
    from budgetvlm.controller.trainer import GRPOTrainer
    from budgetvlm.controller.training_options import GRPOConfig
    from budgetvlm.controller.training_states import MeasuredOutcomes, TrainingData

    torch.manual_seed(0)
    made = fresh_controller(table, features, bounded=False).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = GRPOConfig(num_generations=group, entropy_coef=0.0)
    tensors = torch.from_numpy(features.image), torch.from_numpy(features.language)
    outcomes = MeasuredOutcomes.from_arrays(table.accuracy, table.latency_ms)
    return GRPOTrainer(config, [made], TrainingData(outcomes, *tensors))


def test_a_sweep_with_another_answer_is_no_result(material, tiny, monkeypatch):
    swept = sweeps._swept

    def with_a_mistake(*args):
        answers = swept(*args)
        return {**answers, next(iter(answers)): "something else"}

    monkeypatch.setattr(sweeps, "_swept", with_a_mistake)
    with pytest.raises(DataError, match="1 of 24 answers of the sweep differ"):
        sweeps.measure_accuracy(material)


def test_parts_of_a_request_add_up_and_nothing_stays_wrapped(material):
    system, sample, beside = material.system, material.samples(1)[0], []

    def answer():
        made, ms = overhead._beside_stages(lambda: system.generate(sample.load_image(), sample.question, budget_ms=1e6))
        beside.append(ms)
        return made

    parts = overhead._parts(system, answer)
    assert set(parts) == set(overhead.PARTS.values()) and all(ms > 0 for ms in parts.values())
    assert beside[0] > sum(parts.values()) - parts[overhead.OVERVIEW] - parts[overhead.CLOCK]
    assert not {"_request", "decide", "_learn"} & set(vars(system)) and "_reads" not in vars(system.vlm)
    found = overhead._compared(system, sample)
    assert sum(found[name] for name in (overhead.REST, *parts)) == pytest.approx(found[overhead.ALL])


def test_a_made_up_profile_is_reproducible_and_the_dearest_setting_takes_longest():
    one, two = (made_up(50, seed=3)[0] for _ in range(2))
    assert np.array_equal(one.latency_ms, two.latency_ms)
    assert one.latency_ms.mean(axis=0).argmax() == one.num_settings - 1


def test_a_figure_is_the_median_with_its_range():
    figure = Figure.of("f", "ms", [3.0, 1.0, 2.0], at_most=2.0)
    assert (figure.median, figure.low, figure.high, figure.runs, figure.met) == (2.0, 1.0, 3.0, 3, True)
    assert "at most 2" in str(figure) and "pass" in str(figure) and "1 to 3" in str(figure)
    assert Figure.of("f", "x", [2.0], at_least=3.0).met is False
    assert Figure.of("f", "x", [2.0]).met is None


def test_a_step_on_the_large_table_that_fails_says_why(tmp_path):
    with pytest.raises(OutputError, match=r"large\.table\.parquet.*Free memory or disk space"):
        memory._process("train", str(tmp_path))

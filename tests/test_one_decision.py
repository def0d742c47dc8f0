"""One decision: what a request runs, compiled, is what the specification says, and what calibration promised."""

import math
import os
import subprocess
import sys
import threading
from types import ModuleType

import numpy as np
import pytest
import torch
from test_adaptive import ALL, FEATURES, LATENCY, LENGTHS, TOKENS, guard, requests
from test_latency import SPACE

from budgetvlm import decide
from budgetvlm._compiled import InBackground, compile_module
from budgetvlm.controller.known_terms import KnownTerms
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.provenance import TrainedOn
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.errors import ConfigError, OutputError
from budgetvlm.guard import kernels, machine_code
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.bounds import Request, Spent
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.rule import UNGUARDED, Rule
from budgetvlm.guard.speed import StageSpeed

IMAGE_WIDTH = 7


@pytest.fixture(scope="module")
def loops():
    """The compiled loops, as `decide.start_compiling` loads them."""
    return machine_code.load_kernels()


def network(hidden=16, members=1, known=(0.0, math.inf), **options) -> ValueNetwork:
    """Of a controller with random weights; ``known``: budgets that it was trained on."""
    torch.manual_seed(hidden)
    given = {"latency_ms": range(1, len(SPACE) + 1), "latency_reference_ms": 60.0, **options}
    made = GRPOController(IMAGE_WIDTH, FEATURES.shape[1], knob_values=SPACE.to_dict(), hidden_dim=hidden, **given)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if members > 1:  # blocks on the diagonal, as an ensemble's layers are
        for layer in made.trunk:
            if isinstance(layer, torch.nn.Linear):
                blocks = layer.weight.detach().unflatten(0, (members, -1)).unflatten(2, (members, -1))
                layer.weight.data = torch.block_diag(*[blocks[i, :, i] for i in range(members)])
    made.trained_on = TrainedOn(terms=KnownTerms(known, (0.01, 0.1)).to_dict())
    return ValueNetwork(made.eval())


def random_guard(rng) -> AdaptiveGuard:
    """A guard that has learnt anything that can be learnt."""
    scores = rng.uniform(0.02, 0.5) * rng.standard_t(4, (2, int(rng.integers(1, 300))))
    margin = Margin.start(float(rng.choice([0.01, 0.05, 0.2])), {"overview": scores[0], "image": scores[1]})
    speed = StageSpeed(LATENCY.stages, rng.normal(0, 0.3, len(LATENCY.stages)), rng.normal(0, 0.6, len(LATENCY.stages)))
    speed.pace[0] = rng.normal(0, 0.3)
    speed.pace[1] = rng.choice([0.9, 1.5, 3.0])
    rules = Rule(), Rule(hurries=False), Rule(revises=False), UNGUARDED
    made = AdaptiveGuard(LATENCY, LENGTHS, margin, speed, rng.uniform(0, 3), rule=rules[rng.integers(4)])
    made.margin.offsets[:60] = rng.normal(0, 0.1, 60)
    return made


def random_request(rng) -> tuple[Request, np.ndarray, float, Spent, np.ndarray]:
    """A request, its image's feature, its budget, what it has spent, and the settings that may be chosen."""
    row = rng.integers(len(FEATURES))
    vision = TOKENS["vision"][row].copy()
    vision.flags.writeable = False
    request = Request(vision, float(TOKENS["language"][row, 0]), FEATURES[row], rng.choice([0.0, 1.0, 3.0]))
    image = rng.normal(0, 3, IMAGE_WIDTH).astype(np.float32)
    prepared, waited = rng.choice([0.0, 1.0, 60.0]), rng.choice([0.0, 10.0])
    image_ms = rng.choice([0.0, prepared + rng.uniform(1, 10)])
    spent = Spent(waited + image_ms + 0.5, image_ms, prepared, waited)
    known = ALL if rng.random() < 0.5 else rng.random(len(SPACE)) < 0.7
    known[0] = True
    return request, image, float(rng.uniform(5, 300)), spent, known


@pytest.mark.parametrize("seed", range(30))
def test_the_compiled_decision_is_the_specified_one_in_any_state(loops, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    known = (0.0, math.inf) if seed % 4 else (1.0, 2.0)
    chooses = network(*[(16, 1), (24, 3), (8, 1)][seed % 3], known=known, feature_dim=None if seed % 2 else 4)
    made = random_guard(rng)
    for _ in range(20):
        request, image, budget, spent, known = random_request(rng)
        price = rng.choice([None, 0.0, 0.3])
        asked = made, chooses, request, image, budget, spent, known, price
        wanted = decide.specified_choice(*asked)
        monkeypatch.setattr(decide._LOOPS, "made", loops)
        found = decide.choose(*asked)
        assert_equal(found, wanted)
        index = wanted.settled(budget)
        later = Spent(spent.total_ms + 15.0, rng.uniform(5, 40))
        wanted = decide.specified_revision(made, wanted, index, budget, later, known)
        assert_equal(decide.choose_again(made, found, index, budget, later, known), wanted)
        monkeypatch.setattr(decide._LOOPS, "made", None)
    # No call brought other types than those that the loops were compiled for: compiling takes longer than a request.
    assert len(loops.choose.signatures) == len(loops.choose_again.signatures) == 1


def assert_equal(found: decide.Decision, wanted: decide.Decision) -> None:
    """Equal choices; times within 1e-7 ms, values within what single precision keeps."""
    assert (found.best, found.bounds.fastest) == (wanted.best, wanted.bounds.fastest)
    np.testing.assert_allclose(found.bounds.times, wanted.bounds.times, rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(found.values, wanted.values, rtol=2e-4, atol=2e-5)
    for one, other in zip(found.bounds.forecast, wanted.bounds.forecast, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    assert found.bounds.spent == wanted.bounds.spent and found.bounds.moment == wanted.bounds.moment


def test_no_machine_code_is_older_than_its_source(tmp_path, monkeypatch):
    """A leaf changes, to a text of the same length at the same time of day: what calls it changes, too."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "loops.py"
    text = "RATE = 1.0\n\ndef leaf(x):\n    return RATE * x\n\ndef top(x):\n    return leaf(x) + 1.0\n"

    def made(text: str) -> float:
        source.write_text(text)
        os.utime(source, (1e9, 1e9))
        module = ModuleType("loops")
        module.__file__ = str(source)
        exec(compile(text, source, "exec"), vars(module))
        return compile_module(module).top(10.0)

    assert made(text) == 11.0
    assert made(text.replace("RATE = 1.0", "RATE = 3.0")) == 31.0
    assert made(text.replace("RATE * x", "RATE - x")) == -8.0
    assert made(text) == 11.0


def test_a_constant_of_another_file_changes_the_machine_code_too(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "loops.py"
    source.write_text("def top(x):\n    return ROW + x\n")
    for row in (1, 2):
        module = ModuleType("loops")
        module.__file__, module.ROW = str(source), row
        exec(compile(source.read_text(), source, "exec"), vars(module))
        assert compile_module(module).top(10) == 10 + row


def test_all_compiled_code_stands_in_one_file():
    """Numba is named in one module, and the loops import no function that would be compiled with them."""
    script = "import budgetvlm.runtime, sys; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
    functions = {f for f in vars(kernels).values() if callable(f) and getattr(f, "__module__", "") == kernels.__name__}
    others = {f for f in vars(kernels).values() if callable(f)} - functions
    assert {other.__name__ for other in others} == {"Any", "Forecast", "GuardState", "Request", "Spent"}


def test_what_is_made_in_the_background_is_there_when_it_is_waited_for():
    work, begin = InBackground(), threading.Event()
    assert work.made is None and work.wait() is None
    work.start(lambda: begin.wait() and "made")
    work.start(lambda: "another")
    assert work.wait(0.01) is None
    begin.set()
    assert work.wait() == "made" == work.made
    failed = InBackground()
    failed.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    assert failed.made is None


def test_compiling_leaves_this_process_alone_and_what_was_compiled_is_loaded(tmp_path, monkeypatch):
    """Another process compiles; where it cannot, that is said, and NumPy decides."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: no space left\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OutputError, match=r"could not be compiled: OSError: no space left\. Requests"):
        machine_code.load_kernels()
    assert commands == [[sys.executable, "-m", "budgetvlm.guard.machine_code"]]


def test_parts_that_do_not_fit_together_are_named():
    made = guard()
    speed = StageSpeed(["vision"])
    with pytest.raises(ConfigError, match=r"scale is float64 \[1\], not float64 \[4\]"):
        AdaptiveGuard(LATENCY, LENGTHS, made.margin, speed)


def test_a_request_finds_its_loops_compiled(tmp_path):
    """In a process of its own, with a real model; a budget may be a whole number."""
    script = """
from benchmarks.speed.bench_data import BenchOptions, Material
from budgetvlm import decide

material = Material(BenchOptions())
system, (sample,) = material.system, material.samples(1)
assert decide.wait_for_compiled()
loops = decide._LOOPS.made
for price in (None, 0, 0.3):
    answer = system.generate(sample.load_image(), sample.question, budget_ms=1000, price=price)
    assert answer.feasible and "controller" in answer.stages_ms
assert len(loops.choose.signatures) == len(loops.choose_again.signatures) == 1, loops.choose.signatures
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_without_loops_the_specification_answers():
    """Before anything is compiled, and where a guard has fixed bounds."""
    made, chooses = guard(), network()
    request, image, budget, spent, known = random_request(np.random.default_rng(0))
    found = decide.choose(made, chooses, request, image, budget, spent, known)
    assert_equal(found, decide.specified_choice(made, chooses, request, image, budget, spent, known))


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_specification_keeps_its_promise_on_a_simulated_clock(alpha):
    """Two thousand requests of a noisy machine; see also `test_adaptive`."""
    results = list(requests(guard(alpha=alpha), lambda row: 1.0, seed=5))
    late = np.mean([violated and promised for violated, _, promised in results])
    assert late <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / len(results))

"""Latencies of several machines: each has one scale, and a table of them all is as if one machine had measured it."""

import numpy as np
import pytest

from budgetvlm.profiling.prepare.columns import read_sweep
from budgetvlm.profiling.prepare.machine_scales import said_of_machines
from budgetvlm.profiling.results.measurements import LatencyRecord
from budgetvlm.profiling.results.reading import iter_results
from budgetvlm.profiling.results.result_files import write_result

SPEED = {"a": 1.0, "b": 1.6, "c": 0.7}
SETTINGS = [{"max_crops": crops, "top_k": k, "num_active_blocks": 2} for crops in (1, 4) for k in (1, 2)]
CONFIG = {"split": "test", "max_new_tokens": 3, "world_size": 1, "versions": {}}


def true_ms(setting, visual):
    return 5.0 + 0.02 * visual * setting["top_k"] + setting["max_crops"]


def run_of(name, setting, visual, machine, noise):
    total = true_ms(setting, visual) * (SPEED[machine] if machine else 1) * noise
    split = {"T_prefill_ms": 0.7 * total, "T_decode_ms": 0.3 * total}
    return LatencyRecord(
        name, T_total_ms=total, num_vision_tokens=visual, num_language_tokens=5, num_output_tokens=1, accuracy=1.0,
        machine=machine, **split,
    )  # fmt: skip


def write(directory, machines, repeats, samples=90, noise=0.03):
    """Each run on a machine drawn by chance, the first one twice as often as the others."""
    rng = np.random.default_rng(0)
    names = [machines[0], *machines] if machines else [None]
    hardware = {"machines": {name: {"cores": 2} for name in machines}} if machines else {}
    for setting in SETTINGS:
        records = []
        for row in range(samples):
            visual = 50 + 7 * row % 300
            runs = [
                run_of(f"s{row}", setting, visual, names[rng.integers(len(names))], np.exp(noise * rng.normal()))
                for _ in range(repeats)
            ]
            middle = sorted(runs, key=lambda run: run.T_total_ms)[(repeats - 1) // 2]
            fields = {name: getattr(middle, name) for name in LatencyRecord.__match_args__}
            records.append(LatencyRecord(**fields | {"runs": [run.to_dict() for run in runs] if repeats > 1 else None}))
        write_result("latency", directory, "toy", setting, records, blocks={}, config=CONFIG | hardware)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("machines", [["a", "b"], ["b", "a", "c"]])
def test_scales_are_found_and_times_are_those_of_the_machine_with_the_most_runs(tmp_path, machines, repeats):
    write(tmp_path, machines, repeats)
    sweep = read_sweep(tmp_path, "toy", "latency")
    found = sweep.config["machines"]
    assert next(iter(found)) == machines[0] and found[machines[0]]["cores"] == 2
    assert sum(own["runs"] for own in found.values()) == 90 * repeats * len(SETTINGS)
    for name, own in found.items():
        assert own["scale"] == pytest.approx(SPEED[name] / SPEED[machines[0]], rel=0.02)
    visual = 50 + 7 * np.arange(90) % 300
    expected = np.array([true_ms(setting, visual) for setting in SETTINGS]).T * SPEED[machines[0]]
    assert np.abs(sweep.values["T_total_ms"] / expected - 1).max() < 0.15
    assert np.median(sweep.values["T_total_ms"] / expected) == pytest.approx(1, rel=0.02)
    stages = sweep.values["T_prefill_ms"] + sweep.values["T_decode_ms"]
    np.testing.assert_allclose(stages, sweep.values["T_total_ms"], rtol=1e-6)
    (note,) = said_of_machines(found)
    assert f"{len(machines)} machines" in note and f"as on {machines[0]}" in note


def test_times_of_one_machine_are_left_as_they_are(tmp_path):
    write(tmp_path / "named", ["a"], 3)
    write(tmp_path / "plain", [], 3)
    named, plain = (read_sweep(tmp_path / name, "toy", "latency") for name in ("named", "plain"))
    assert named.config["machines"]["a"]["scale"] == 1 and said_of_machines(named.config["machines"]) == []
    assert "machines" not in plain.config
    for name, sweep in (("named", named), ("plain", plain)):
        stored = [[record.T_total_ms for record in r.records] for r in iter_results(tmp_path / name, "toy", "latency")]
        np.testing.assert_array_equal(sweep.values["T_total_ms"].T, stored)


def test_few_runs_of_a_setting_have_a_scale_too(tmp_path):
    write(tmp_path, ["a", "b"], 1, samples=6, noise=0.001)
    scale = read_sweep(tmp_path, "toy", "latency").config["machines"]["b"]["scale"]
    assert scale == pytest.approx(1.6, rel=0.25)

"""A fifth of the profiling: what it costs, and what the controller loses by it.

    python benchmarks/thrifty.py cells --data FILE           controllers from all cells and from a fifth of them
    python benchmarks/thrifty.py cells --tables DIR          the same on tables of others (benchmarks/data/README.md)
    python benchmarks/thrifty.py quickstart --build SRC      wall time of the quickstart here and of another build
    python benchmarks/thrifty.py busy --build SRC            both sweeps beside a busy process on each core

`cells` needs no model: the sweep's own rule chooses cells of a table that was measured in full, and what it leaves out
is forgotten. Both controllers are then evaluated on the test samples as they were measured. SRC is the `src` directory
of the other build; both take turns.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import fit_controller
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import DataError
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.features import Features
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.cell_selection import Work, plan_cells
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import Sample, SplitSample

PRICES = np.geomspace(0.003, 3.0, 40)
MEANS = (0.3, 0.5, 0.7)  # mean budgets, as shares of the way from the cheapest to the slowest setting
SRC = Path(__file__).resolve().parents[1] / "src"


def masked(table: ProfileTable, cells: float, seed: int) -> ProfileTable:
    """Return the table with the cells that a sweep would have measured; those of test samples are all kept.

    ``seed``: becomes a part of the samples' names, which the choice depends on.
    """
    names, space = table.sample_ids, table.knob_space
    images, split = table.groups.get("image_id", names), table.split or ()
    places = [
        SplitSample(Sample(f"{seed} {name}", image, "", (), None, {}), side)  # type: ignore[arg-type]
        for name, image, side in zip(names, images, split, strict=True)
    ]
    used = np.isfinite(table.accuracy).any(axis=0)
    settings = [setting for setting, asked in zip(space.settings, used, strict=True) if asked]
    known = np.zeros(table.accuracy.shape, dtype=bool)
    known[:, used] = plan_cells(places, settings, cells, work_of(table, settings, used))
    known &= np.isfinite(table.accuracy)
    # a table of others is priced by the cell; here latencies follow from token counts
    latency = table.latency_ms if "exp6_config" in table.metadata else np.where(known, table.latency_ms, np.nan)
    return replace(
        table,
        accuracy=np.where(known, table.accuracy, np.nan).astype(np.float32),
        latency_ms=latency.astype(np.float32),
    )


def work_of(table: ProfileTable, settings: Sequence[Setting], used: np.ndarray) -> Work:
    """Return what measuring a sample costs: by its tokens as in the sweep, or by its latency in tables of others."""
    if "vision" not in table.tokens:
        times = np.nanmedian(table.latency_ms, axis=0)[used].astype(np.float64)
        return Work(np.zeros_like(times), times)
    visual, text = (
        np.nanmedian(table.tokens[kind][:, used], axis=0).astype(np.float64) for kind in ("vision", "language")
    )
    most = settings[-1]["num_active_blocks"]
    return Work(visual, (visual + text) * np.array([s["num_active_blocks"] / most for s in settings]))


def faces(data: EvaluationData, policy: ControllerPolicy) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and mean ms under the options' budgets, then accuracy at mean budgets (their ms are the budgets)."""
    rows, table = np.arange(data.test.num_samples), data.test

    def outcome(states: object) -> tuple[float, float]:
        chosen = policy.choose(states)  # type: ignore[arg-type]
        return float(table.accuracy[rows, chosen].mean()), float(table.latency_ms[rows, chosen].mean())

    ceilings = np.array([outcome(states) for states in data.under_budgets(budget_shares(data), 0.01)])
    curve = np.array(sorted(outcome(states)[::-1] for states in data.at_prices(PRICES.tolist())))
    low, high = np.nanmin(data.means.latency_ms), np.nanmax(data.means.latency_ms)
    wanted = low + np.array(MEANS) * (high - low)
    means = np.interp(wanted, curve[:, 0], np.maximum.accumulate(curve[:, 1]))
    return ceilings, means


def budget_shares(data: EvaluationData) -> tuple[float, ...]:
    """Budgets as the package's grid has them, or just above each setting's bound where there are few settings."""
    bounds = data.guard.bounds_ms[np.isfinite(data.guard.bounds_ms)]
    return (0.5, 0.6, 0.7, 0.85) if len(bounds) > 8 else tuple((1.001 * bounds / data.means.reference_ms).tolist())


def compare_cells(
    name: str, table: ProfileTable, features: Features, args: argparse.Namespace, seed: int
) -> list[float]:
    """Return points and share of latency that a part of the cells costs on the first face, and points on the second."""
    data = EvaluationData.of(table, features, EvaluationOptions(resamples=100))
    found = []
    for known in (table, masked(table, args.cells, seed)):
        config = TrainingConfig(
            hidden_dim=128 if args.members > 1 else TrainingConfig.hidden_dim, seed=seed * args.members
        )
        found.append(faces(data, ControllerPolicy(fit_controller(known, features, config, members=args.members))))
    (whole, whole_means), (part, part_means) = found
    points, share = 100 * (part - whole)[:, 0].mean(), 100 * (part[:, 1].mean() / whole[:, 1].mean() - 1)
    means = 100 * (part_means - whole_means).mean()
    print(
        f"{name} seed {seed}: budgets {100 * whole[:, 0].mean():.2f} -> {100 * part[:, 0].mean():.2f}% "
        f"({points:+.2f} points, latency {share:+.1f}%), mean budgets {100 * whole_means.mean():.2f} -> "
        f"{100 * part_means.mean():.2f}% ({means:+.2f} points)",
        flush=True,
    )
    return [points, share, means]


def cells(args: argparse.Namespace) -> None:
    """Compare controllers from all cells with those from a part, over seeds, and over folds of tables of others."""
    for name, runs in _tables(args):
        found = np.array([compare_cells(name, table, features, args, seed) for seed, (table, features) in runs])
        error = found.std(axis=0, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.full(3, np.nan)
        texts = [f"{mean:+.2f} ± {1.96 * e:.2f}" for mean, e in zip(found.mean(axis=0), error, strict=True)]
        print(f"{name}, {args.cells:.0%} of the cells: {texts[0]} points at budgets, latency {texts[1]}%, ", end="")
        print(f"{texts[2]} points at mean budgets")


def _tables(args: argparse.Namespace) -> Iterator[tuple[str, Iterator[tuple[int, tuple[ProfileTable, Features]]]]]:
    if args.data:
        from budgetvlm.profiling.prepare.prepared_data import load_prepared

        prepared = load_prepared(args.data)
        yield args.data.stem, ((seed, (prepared.table, prepared.features)) for seed in range(args.seeds))
    if args.tables:
        from benchmarks.outside_tables import OutsideTable

        for path in sorted(args.tables.glob("*.npz")):
            try:
                outside = OutsideTable.load(path)
            except DataError:  # tables of another layout may lie there too
                continue
            yield path.stem, ((fold, outside.fold(fold, args.seeds)) for fold in range(args.seeds))


def quickstart(args: argparse.Namespace) -> None:
    """Run the quickstart of both builds, one after the other, and print what each step took."""
    totals = {}
    for build in (args.build, SRC):
        with tempfile.TemporaryDirectory() as directory:
            steps = timed_steps(build, ["quickstart", "--output_dir", directory])
        totals[build] = sum(seconds for _, seconds in steps)
        print(f"{build}: {totals[build]:.0f} s; " + ", ".join(f"{title} {s:.0f}" for title, s in steps), flush=True)
    print(f"{totals[SRC] / totals[args.build]:.0%} of the wall time of the other build")


def timed_steps(build: Path, words: Sequence[str]) -> list[tuple[str, float]]:
    """Run a command of a build; return its steps, by the lines that announce them, with their seconds."""
    started = time.monotonic()
    found = [("start", started)]
    with _budgetvlm(build, words) as process:
        for line in process.stdout or ():
            if match := re.match(r"\[\d+/\d+\] (\w+)|(Three) decisions", line):
                found.append((match[1] or match[2], time.monotonic()))
    if process.returncode:
        raise SystemExit(f"{build}: {words[0]} ended with {process.returncode}")
    ends = [at for _, at in found[1:]] + [time.monotonic()]
    return [(title, end - begin) for (title, begin), end in zip(found, ends, strict=True)]


def busy(args: argparse.Namespace) -> None:
    """Run both sweeps, alone and beside a busy process on each core, with both builds."""
    cores = len(os.sched_getaffinity(0))
    for kind, count in (("accuracy", args.samples), ("latency", 3)):
        for build in (args.build, SRC):
            words = ["profile", kind, "--split", "test", "--num_samples", str(count)]
            alone, beside = timed_beside(build, words, 0), timed_beside(build, words, cores)
            print(f"{kind} {build}: alone {alone:.1f} s, beside others {beside:.1f} s, {beside / alone:.1f} times")


def timed_beside(build: Path, words: Sequence[str], processes: int) -> float:
    """Return the seconds of a sweep beside processes that do nothing but compute."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        with tempfile.TemporaryDirectory() as directory:
            started = time.monotonic()
            with _budgetvlm(build, [*words, "--output_dir", directory]):
                pass
            return time.monotonic() - started
    finally:
        for process in spinning:
            process.kill()


def _budgetvlm(build: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(build)}
    code = "import sys; from budgetvlm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-u", "-c", code, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def main() -> None:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cells", "quickstart", "busy"))
    parser.add_argument("--data", type=Path, help="controller_training_data.json, measured in full")
    parser.add_argument("--tables", type=Path, help="directory of tables of others")
    parser.add_argument("--build", type=Path, help="src directory of the other build")
    parser.add_argument("--cells", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=5, help="seeds, or folds of a table of others")
    parser.add_argument("--members", type=int, default=5, help="of an ensemble")
    parser.add_argument("--samples", type=int, default=24, help="samples of the accuracy sweep beside busy processes")
    args = parser.parse_args()
    {"cells": cells, "quickstart": quickstart, "busy": busy}[args.what](args)


if __name__ == "__main__":
    main()

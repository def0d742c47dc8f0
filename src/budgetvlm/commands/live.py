"""`budgetvlm evaluate --live`: the whole system on the real clock."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.calibrate import open_system, profiled_ids
from budgetvlm.commands.task_arguments import add_task_arguments
from budgetvlm.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.tasks import Sample, Task

LIVE_REPORT = "live.json"
LEAST = {"num_requests": 1, "load": 0, "truth": 0, "truth_repeats": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that only matter with --live."""
    live = parser.add_argument_group("on the real clock (--live)")
    live.add_argument("--live", action="store_true", help="run the whole system on held-out samples, with its guard")
    live.add_argument("--model_path", default="reference", metavar="DIR", help="model directory (default: reference)")
    add_task_arguments(live)
    live.add_argument("--num_requests", type=int, default=1500, metavar="N", help="requests (default: 1500)")
    live.add_argument(
        "--truth", type=int, default=0, metavar="N",
        help="afterwards measure N requests at every setting: what a guard that knows the latencies would gain",
    )  # fmt: skip
    live.add_argument(
        "--truth_repeats", type=int, default=1, metavar="N",
        help="measure them N times, and tell the gain for the medians as well: without the luck of a single run "
        "(default: 1)",
    )  # fmt: skip
    live.add_argument(
        "--cut", choices=["always", "needed"], default="always",
        help="answers that stop before a token their budget would not hold: always (default), or only where finishing "
        "them late would break the promise",
    )  # fmt: skip
    live.add_argument("--load", type=int, default=0, metavar="N", help="busy processes beside the middle third")
    live.add_argument("--num_threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    live.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Run, report."""
    from dataclasses import asdict

    from budgetvlm._io import write_json
    from budgetvlm._version import versions
    from budgetvlm.live.fresh_samples import fresh_samples
    from budgetvlm.live.live_evaluation import run_live, summary
    from budgetvlm.profiling.measure.machine import PACKAGES, hardware

    if not args.checkpoint:
        raise ConfigError("--live needs a trained controller; give --checkpoint DIR")
    _check(args)
    model, guard, task = open_system(args)
    available = min(args.num_requests, task.num_samples(args.split))
    samples = fresh_samples(task, args.split, available, args.seed, profiled_ids(args.data), enough=1)
    reference_ms = reference_on_this_machine(model, samples)
    records = run_live(
        model, task, samples, num_requests=args.num_requests, reference_ms=reference_ms, load=args.load, cut=args.cut,
        seed=args.seed,
    )  # fmt: skip
    found = summary(records, guard.alpha) | {
        "reference_ms": reference_ms,
        "load": args.load,
        "cut": args.cut,
        "drift": guard.speed.drift,
        "hardware": hardware(args.device),
        "versions": versions(*PACKAGES),
    }
    if args.truth:
        found |= _prices(args, model, task, samples[-args.truth :], reference_ms)
    if args.output_dir:
        write_json(args.output_dir / LIVE_REPORT, {**found, "records": [asdict(record) for record in records]})
    print(json.dumps(found) if args.json else describe(found))
    return 0


def _prices(
    args: argparse.Namespace, model: AdaptiveVLM, task: Task, samples: list[Sample], reference_ms: float
) -> dict[str, Any]:
    """The price of the guarantee on these samples, by single runs and, where there are several, by their medians."""
    from budgetvlm.live.calibration import measure, typical
    from budgetvlm.live.live_evaluation import price_of_guarantee

    runs = [measure(model, task, samples, args.seed + n) for n in range(args.truth_repeats)]
    found = {"price_of_guarantee": price_of_guarantee(model, task, runs[0], reference_ms, cut=args.cut)}
    if len(runs) > 1:
        found["price_at_typical_times"] = price_of_guarantee(model, task, typical(runs), reference_ms, cut=args.cut)
    return found


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError or OutputError before any work is done."""
    wrong = [f"--{name} {getattr(args, name)} has to be {least} or more" for name, least in LEAST.items()
             if getattr(args, name) < least]  # fmt: skip
    if args.split == "train" and args.data is None:
        wrong.append("--split train holds what the controller was trained on; give its --data, so that it is left out")
    if wrong:
        raise ConfigError("; ".join(wrong))
    path: Path | None = args.output_dir / LIVE_REPORT if args.output_dir else None
    if path is not None and path.exists() and not args.overwrite:
        raise OutputError(f"{path} exists; add --overwrite to replace it, or choose another --output_dir")


def reference_on_this_machine(model: AdaptiveVLM, samples: list[Sample]) -> float:
    """The full setting's time here: that of the profile times how much slower this machine runs it now."""
    import numpy as np

    slowdown = [model.bounds(s.load_image(), s.question).slowdown for s in samples[:20]]
    return float(model.controller.latency_reference_ms) * float(np.median(slowdown))


def describe(found: dict[str, Any]) -> str:
    """Tables for people."""
    systems = found["systems"]
    lines = [
        f"{found['requests']} requests on the real clock, budgets 0.35 to 1 x {found['reference_ms']:.1f} ms; at most "
        f"{found['alpha']:.1%} may be late",
        "",
        f"{'':24} {'late':>6} {'95% interval':>15} {'accuracy':>9} {'mean ms':>8} {'budget used':>12} "
        f"{'hurried':>8} {'cut':>5} {'nothing fits':>13}",
    ]
    for name, figures in systems.items():
        lines.append(_row(name, figures["all"]))
        phases = figures["by_phase"] if len(figures["by_phase"]) > 1 else {}
        lines += [_row(f"  {phase}", part) for phase, part in phases.items()]
        lines += [_row(f"  budget {share}", part) for share, part in figures["by_budget"].items()]
        worst = figures["worst_group"]
        if worst:
            lines.append(_row(f"  worst: {worst['label']} {worst['name']}", worst))
    own = systems["guarded"]["all"]
    share = own["controller_ms"] / own["latency_ms"]
    lines += ["", f"features, controller and guard: {own['controller_ms']:.2f} ms a request ({share:.1%} of its time)"]
    for key, times in (("price_of_guarantee", "times"), ("price_at_typical_times", "medians of times")):
        price = found.get(key)
        if price is None:
            continue
        lines.append(
            f"replayed on the {times} of {price['requests']} requests: accuracy {price['guard']:.1%} "
            f"({price['late']:.1%} late, {price['cut']:.1%} cut, {price['hurried']:.1%} hurried), "
            f"of a guard that knows the true latencies {price['true latencies']:.1%}"
        )
    if found["drift"]:
        stages = ", ".join(f"{stage} x {factor:.2f}" for stage, factor in found["drift"].items())
        lines.append(f"drift since calibration: {stages}")
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any]) -> str:
    low, high = figures["interval"]
    used = "" if figures["used_median"] is None else f"{figures['used_median']:.0%}"
    return (
        f"{name:24} {figures['violation_rate']:6.1%} {f'{low:.1%} to {high:.1%}':>15} {figures['accuracy']:9.1%} "
        f"{figures['latency_ms']:8.1f} {used:>12} {figures['hurried']:8d} {figures['cut']:5d} "
        f"{figures['infeasible']:13d}"
    )

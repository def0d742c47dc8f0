"""`budgetvlm evaluate --live`: the whole system on the real clock."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.calibrate import open_system
from budgetvlm.commands.flags import add_concurrency_flag, add_cut_flag
from budgetvlm.commands.origins import add_opened_model, complete, split_with_fresh_samples
from budgetvlm.commands.showing import check_output
from budgetvlm.commands.task_arguments import add_task_arguments
from budgetvlm.commands.verdicts import UNCALIBRATED, one_choice
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.controller.provenance import TrainedOn
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.tasks import Sample, Task

LIVE_REPORT = "live.json"
LEAST = {"num_requests": 1, "load": 0, "truth": 0, "truth_repeats": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that only matter with --live."""
    live = parser.add_argument_group("on the real clock (--live)")
    live.add_argument("--live", action="store_true", help="run the whole system on held-out samples, with its guard")
    add_opened_model(live)
    add_task_arguments(live)
    add_cut_flag(live)
    add_concurrency_flag(live)
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
    live.add_argument("--load", type=int, default=0, metavar="N", help="busy processes beside the middle third")


def run(args: argparse.Namespace) -> int:
    """Run both systems, and report."""
    from dataclasses import asdict

    from budgetvlm._io import write_json
    from budgetvlm._version import versions
    from budgetvlm.live.fresh_samples import fresh_samples
    from budgetvlm.live.live_evaluation import run_live, summary
    from budgetvlm.profiling.measure.machine import PACKAGES, hardware

    known = complete(args)
    _check(args, known)
    model, guard, task = open_system(args)
    split = args.split or _held_out_split(task, known)
    # Nothing was fitted to samples of the test split, so that they may be asked about although they were profiled.
    used = frozenset(guard.origin.get("samples", ())).union(*(origin.seen() for origin in known))
    available = min(args.num_requests, task.num_samples(split))
    samples = fresh_samples(task, split, available, args.seed, used, enough=1)
    reference_ms = reference_on_this_machine(model, samples)
    records = run_live(
        model, task, samples, num_requests=args.num_requests, reference_ms=reference_ms, load=args.load, cut=args.cut,
        seed=args.seed, concurrency=args.concurrency,
    )  # fmt: skip
    found = summary(records, guard.alpha) | {
        "reference_ms": reference_ms,
        "load": args.load,
        "concurrency": args.concurrency,
        "cut": args.cut,
        "calibrated_on": guard.calibrated_on,
        "drift": guard.speed.drift,
        "hardware": hardware(args.device),
        "versions": versions(*PACKAGES),
    }
    if args.truth:
        found |= _prices(args, model, task, samples[-args.truth :], reference_ms)
    if args.output_dir:
        write_json(args.output_dir / LIVE_REPORT, {**found, "records": [asdict(record) for record in records]})
    print(json.dumps(found) if args.json else describe(found))
    own = [record for record in records if record.system == "guarded"]
    useless = one_choice((record.setting for record in own), model.controller.knob_space.cheapest)
    if not any(record.accuracy for record in own):
        print("note: no answer scores above 0: look at metric, prompt and max_new_tokens", file=sys.stderr)
    elif useless:
        print(f"note: {useless}", file=sys.stderr)
    return 0


def _held_out_split(task: Task, known: list[TrainedOn]) -> str:
    """The task's test split; where it has none, that which the data's test samples were drawn from."""
    try:
        return "test" if task.num_samples("test") else "validation"
    except ConfigError:
        if not (drawn_from := split_with_fresh_samples(known)):
            raise
        return drawn_from


def _prices(
    args: argparse.Namespace, model: AdaptiveVLM, task: Task, samples: list[Sample], reference_ms: float
) -> dict[str, Any]:
    """The price of the guarantee on these samples, by single runs and, where there are several, by their medians."""
    from budgetvlm.live.calibration import measure, typical
    from budgetvlm.live.live_evaluation import price_of_guarantee

    runs = [
        measure(model, task, samples, args.seed + n, concurrency=args.concurrency) for n in range(args.truth_repeats)
    ]
    times = {"price_of_guarantee": runs[0]} | ({"price_at_typical_times": typical(runs)} if len(runs) > 1 else {})
    return {name: price_of_guarantee(model, task, taken, reference_ms, cut=args.cut) for name, taken in times.items()}


def _check(args: argparse.Namespace, known: list[TrainedOn]) -> None:
    """Raise ConfigError or OutputError before any work is done."""
    if not args.checkpoint:
        raise ConfigError("--live needs a trained controller; give --checkpoint DIR")
    given = {name: getattr(args, name) for name in LEAST}
    wrong = [f"--{name} {n} has to be {LEAST[name]} or more" for name, n in given.items() if n < LEAST[name]]
    if args.split == "train" and not any(origin.samples for origin in known):
        wrong.append("--split train holds what the controller was trained on; give its --data, so that it is left out")
    wrong += [
        f"--{name} is of an evaluation on a table, and --live gives each request a budget of its own"
        for name in ("mean_budgets", "mean_budget_ms", "ceiling")
        if name in getattr(args, "given", ())
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    if not args.overwrite:
        remedy = "add --overwrite to replace it, or choose another --output_dir"
        check_output(args.output_dir, [LIVE_REPORT], remedy)


def reference_on_this_machine(model: AdaptiveVLM, samples: list[Sample]) -> float:
    """The full setting's time here: that of the profile times how much slower this machine runs it now."""
    import numpy as np

    slowdown = [model.bounds(s.load_image(), s.question).slowdown for s in samples[:20]]
    return float(model.controller.latency_reference_ms) * float(np.median(slowdown))


def describe(found: dict[str, Any]) -> str:
    """Tables for people."""
    from budgetvlm._io import time_text

    systems = found["systems"]
    promise = f"at most {found['alpha']:.1%} may be late" if found["calibrated_on"] else UNCALIBRATED
    lines = [
        f"{found['requests']} requests on the real clock, budgets 0.35 to 1 x {time_text(found['reference_ms'])}",
        promise,
        "",
        f"{'':24} {'late':>6} {'95% interval':>15} {'accuracy':>9} {'mean':>9} {'budget used':>12} "
        f"{'hurried':>8} {'cut':>5} {'nothing fits':>13}",
    ]
    for name, figures in systems.items():
        phases = figures["by_phase"] if len(figures["by_phase"]) > 1 else {}
        parts = {name: figures["all"]} | {f"  {phase}": part for phase, part in phases.items()}
        parts |= {f"  budget {share}": part for share, part in figures["by_budget"].items()}
        parts |= {f"  {dataset}": part for dataset, part in figures["by_group"].get("dataset", {}).items()}
        if worst := figures["worst_group"]:
            parts[f"  worst: {worst['label']} {worst['name']}"] = worst
        lines += [_row(label, part) for label, part in parts.items()]
    own = systems["guarded"]["all"]
    share = own["controller_ms"] / own["latency_ms"]
    took = time_text(own["controller_ms"])
    lines += ["", f"features, controller and guard: {took} a request ({share:.1%} of its time)"]
    for key, times in (("price_of_guarantee", "times"), ("price_at_typical_times", "medians of times")):
        if price := found.get(key):
            lines.append(
                f"replayed on the {times} of {price['requests']} requests: accuracy {price['guard']:.1%} "
                f"({price['late']:.1%} late, {price['cut']:.1%} cut, {price['hurried']:.1%} hurried), "
                f"of a guard that knows the true latencies {price['true latencies']:.1%}"
            )
    if found["drift"]:
        stages = ", ".join(f"{stage} x {factor:.2f}" for stage, factor in found["drift"].items())
        since = "calibration" if found["calibrated_on"] else "the profile"
        lines.append(f"drift since {since}: {stages}")
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any]) -> str:
    from budgetvlm._io import time_text

    low, high = figures["interval"]
    used = "" if figures["used_median"] is None else f"{figures['used_median']:.0%}"
    return (
        f"{name:24} {figures['violation_rate']:6.1%} {f'{low:.1%} to {high:.1%}':>15} {figures['accuracy']:9.1%} "
        f"{time_text(figures['latency_ms']):>9} {used:>12} {figures['hurried']:8d} {figures['cut']:5d} "
        f"{figures['infeasible']:13d}"
    )

"""Adapt a controller to what was not profiled, from little, and say what is known of it and how surely.

Without more flags to this machine: at most 50 requests tell how long every setting takes here, accuracies stay as
profiled, and nothing is trained. Nothing is written without --output_dir. With --budget_ms or --price to other budgets
or another price, which takes nothing but a look at held-out samples: the controller knows both as inputs. With --from
to another model, or to new values of knobs: from earlier tables and a few labelled samples a controller is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from budgetvlm.commands.adapt_model import add_model_arguments, to_model
from budgetvlm.commands.data_arguments import add_data_arguments, read_data
from budgetvlm.commands.flags import add_concurrency_flag, add_json_flag, seed_number
from budgetvlm.commands.origins import add_opened_model, complete, split_with_fresh_samples
from budgetvlm.commands.showing import check_output
from budgetvlm.commands.task_arguments import add_task_arguments
from budgetvlm.errors import ConfigError

REQUESTS = 50
NOISY = 2.0  # times as long as predicted, that bounds are where few settings will be allowed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm adapt`."""
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="trained controller")
    add_data_arguments(parser)
    add("--output_dir", type=Path, metavar="DIR", help="write the adapted controller there")
    add("--overwrite", action="store_true", help="replace an adapted controller in --output_dir")
    machine = parser.add_argument_group("to this machine")
    machine.add_argument(
        "--requests", type=int, metavar="N",
        help=f"requests to measure, each at every setting (default: {REQUESTS}; for --alpha 0.05 at least 28)",
    )  # fmt: skip
    machine.add_argument(
        "--alpha", type=float, default=0.05, metavar="A", help="share of requests that may be late (default: 0.05)"
    )
    machine.add_argument("--split", metavar="NAME", help="split they come from (default: as for calibrate)")
    machine.add_argument(
        "--seed", type=seed_number, default=0, metavar="N", help="draws samples and orders (default: 0)"
    )
    add_opened_model(machine)
    add_task_arguments(machine)
    add_concurrency_flag(machine)
    terms = parser.add_argument_group("to other budgets or another price")
    terms.add_argument("--budget_ms", type=float, nargs="+", default=[], metavar="N", help="budgets in ms")
    terms.add_argument(
        "--price", type=float, metavar="X", help="accuracy given for one latency of the full setting (default: its own)"
    )
    add_model_arguments(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Adapt in the way that the flags mean, and report."""
    if args.earlier is None and args.checkpoint is None:
        raise ConfigError(
            "there is nothing to adapt: give the controller and what it was trained on, --checkpoint DIR --data "
            "controller_training_data.json. To fit the guard to this machine takes less: `budgetvlm calibrate`"
        )
    _refuse_unused(args)
    if args.earlier is not None:
        found, text = to_model(args)
    else:
        found, text = _to_terms(args) if args.budget_ms or args.price is not None else _to_machine(args)
    print(json.dumps(found) if args.json else text)
    return 0


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raise ConfigError where a flag of another way to adapt was given, which would count for nothing."""
    terms = {"--budget_ms": bool(args.budget_ms), "--price": args.price is not None}
    machine = {"--requests": args.requests is not None}
    if args.earlier is not None:
        way, unused = "--from", terms | machine
    elif any(terms.values()):
        way, unused = " and ".join(name for name, given in terms.items() if given), machine
        unused["--output_dir"] = args.output_dir is not None
    else:
        return
    if wrong := ", ".join(name for name, given in unused.items() if given):
        raise ConfigError(f"{wrong} counts for nothing beside {way}; leave it out, or run both one after the other")


def _to_machine(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from budgetvlm.commands.calibrate import open_system
    from budgetvlm.controller.checkpoint import BEST
    from budgetvlm.controller.provenance import CONFIG
    from budgetvlm.controller.run_directory import VERSIONS
    from budgetvlm.live.adapt_here import adapt_to_machine
    from budgetvlm.live.calibrate_here import require_enough
    from budgetvlm.tasks import SPLITS

    requests = REQUESTS if args.requests is None else args.requests
    require_enough(requests, args.alpha, "--requests")
    check_output(args.output_dir, [BEST, VERSIONS], "an adapted controller needs a directory of its own")
    if not args.overwrite:
        check_output(args.output_dir, [CONFIG], "add --overwrite to replace it, or choose another --output_dir")
    source = args.checkpoint
    known = complete(args)
    table, features = read_data(args)
    model, _, task = open_system(argparse.Namespace(**vars(args) | {"checkpoint": [source]}))
    adapted = adapt_to_machine(
        model, task, table, features, requests, alpha=args.alpha,
        split=args.split or split_with_fresh_samples(known) or "validation",
        used=frozenset().union(*(origin.seen(SPLITS) for origin in known)), seed=args.seed,
        progress=sys.stderr.isatty(), concurrency=args.concurrency,
    )  # fmt: skip
    found = adapted.report
    if args.output_dir:
        adapted.save(args.output_dir, source)
        found = {**found, "output_dir": str(args.output_dir)}
    return found, describe_machine(found)


def describe_machine(found: dict[str, Any]) -> str:
    """What was found of this machine, for people."""
    from budgetvlm._io import time_numbers, time_text

    before, here = found["reference_ms"]["profiled"], found["reference_ms"]["here"]
    lines = [
        f"from {found['requests']} requests, each at every setting; accuracies are as profiled",
        f"full setting: {time_text(here)} here, {time_text(before)} as profiled (x {here / before:.2f})",
        "",
        f"{'setting':44} {'profiled':>9} {'here':>9}  median measured [95% interval]",
    ]
    for one in found["settings"]:
        words = ", ".join(f"{name}={value:g}" for name, value in one["setting"].items())
        times = one["profiled_ms"], one["expected_ms"], one["measured_median_ms"], *one["interval_ms"]
        (profiled, expected, median, low, high), unit = time_numbers(*times)
        lines.append(f"{words:44} {profiled:>9} {expected:>9}  {median} [{low}, {high}] {unit}")
    lines += ["", f"bounds are {found['factor']:.2f} x predicted times: at most {found['alpha']:.1%} of requests late"]
    if found["factor"] > NOISY:
        lines.append(
            "times vary so much here that small budgets will allow few settings; measure on a quiet machine, or more "
            "requests, or allow more late ones (--alpha)"
        )
    return "\n".join([*lines, *([f"wrote {found['output_dir']}"] if "output_dir" in found else [])])


def _to_terms(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the controller is worth at budgets and a price on samples that it was not trained on."""
    from budgetvlm.adaptation.new_terms import at_terms
    from budgetvlm.controller.checkpoint import load_controller
    from budgetvlm.decide import Terms

    problems = [problem for ms in args.budget_ms or [math.inf] for problem in Terms(ms, args.price).problems()]
    if problems:
        raise ConfigError("; ".join(problems))
    controller, (table, features) = load_controller(args.checkpoint), read_data(args)
    table = controller.trained_on.with_splits(table, str(args.checkpoint))
    price = controller.default_price.item() if args.price is None else args.price
    budgets_ms = args.budget_ms or [float(controller.latency_reference_ms)]
    found = {"price": price, "budgets": at_terms(controller, budgets_ms, price, table, features)}
    return found, describe_terms(found)


def describe_terms(found: dict[str, Any]) -> str:
    """The same for people."""
    from budgetvlm._io import time_text

    lines = [
        f"at price {found['price']:g}, on validation samples, 95% intervals",
        f"{'budget':>10} {'of full':>8} {'allowed':>8} {'right':>20} {'over lookup table':>22} {'mean':>9} {'late':>6}",
    ]
    for at in found["budgets"]:
        right, gain = ([100 * share for share in at[name]] for name in ("accuracy", "vs_lookup"))
        allowed = f"{at['allowed']:.3g}"
        lines.append(
            f"{time_text(at['budget_ms']):>10} {at['budget_share']:8.2f} {allowed:>8} "
            f"{f'{right[0]:.1f}% [{right[1]:.1f}, {right[2]:.1f}]':>20} "
            f"{f'{gain[0]:+.1f} [{gain[1]:+.1f}, {gain[2]:+.1f}]':>22} "
            f"{time_text(at['mean_ms'][0]):>9} {at['late'][0]:6.1%}{'  extrapolated' if at['extrapolates'] else ''}"
        )
    if any(at["extrapolates"] for at in found["budgets"]):
        lines.append("extrapolated: it was trained on nothing like it, and chooses as at the nearest that it knows")
    return "\n".join(lines)

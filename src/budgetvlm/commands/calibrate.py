"""Calibrate the guard on this machine: measure a few requests, refit how fast each stage runs and how wide bounds are.

The controller is not trained again. Do this on the machine, with the threads and beside the load that the model is to
serve with. The guard is written beside the controller, that of the bundled controller into the user's data directory
($XDG_DATA_HOME/budgetvlm or ~/.local/share/budgetvlm), and requests use it from then on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.flags import add_concurrency_flag, add_json_flag, seed_number
from budgetvlm.commands.origins import add_opened_model, complete, split_with_fresh_samples
from budgetvlm.commands.task_arguments import add_task_arguments, open_task
from budgetvlm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from budgetvlm.guard.adaptive import AdaptiveGuard
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.tasks import Task


USUAL_FACTOR, WIDE_FACTOR = (1.1, 1.5), 2.0  # of calibrations on quiet machines; see docs/guarantee.md


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm calibrate`."""
    add = parser.add_argument
    add_opened_model(parser)
    add_task_arguments(parser)
    add(
        "--checkpoint", type=Path, nargs="+", metavar="DIR",
        help="trained controller (default: the one that comes with the model)",
    )  # fmt: skip
    add(
        "--data", type=Path, metavar="FILE",
        help="controller_training_data.json: says which model and data set these are, and its samples are left out",
    )  # fmt: skip
    add("--seed", type=seed_number, default=0, metavar="N", help="seed that draws samples and orders (default: 0)")
    add(
        "--samples", type=int, default=50, metavar="N",
        help="requests, each at every setting (default: 50, or as many as are left if they are enough)",
    )  # fmt: skip
    add(
        "--split", default="validation", metavar="NAME",
        help="split they come from; profiled samples are left out (default: where the data held some back, else "
        "validation)",
    )  # fmt: skip
    add("--alpha", type=float, default=0.05, metavar="A", help="share of requests that may be late (default: 0.05)")
    add(
        "--no_hurry", action="store_true",
        help="finish every answer at its own setting; by default one that would be late goes on with fewer experts and "
        "blocks",
    )  # fmt: skip
    add_concurrency_flag(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Measure requests, fit the guard to them, write it and say where."""
    import numpy as np

    from budgetvlm.live.calibrate_here import calibrate, require_enough
    from budgetvlm.tasks import SPLITS

    known = complete(args)
    require_enough(args.samples, args.alpha)
    model, _, task = open_system(args)
    if args.checkpoint and not any(origin.samples for origin in known):
        print(
            "note: nothing tells which samples this controller was trained on; if they are among these requests, the "
            "promise does not hold. Give its --data.",
            file=sys.stderr,
        )
    guard = calibrate(
        model, task, args.samples, alpha=args.alpha,
        split=args.split or split_with_fresh_samples(known) or "validation",
        used=frozenset().union(*(origin.seen(SPLITS) for origin in known)), hurries=not args.no_hurry, seed=args.seed,
        concurrency=args.concurrency,
    )  # fmt: skip
    scales = zip(guard.latency.stages, guard.speed.normal, strict=True)
    found = {
        "guard": str(model.save_guard(checkpoint_of(args))),
        "alpha": guard.alpha,
        "factor": math.exp(guard.margin.log_margin()),
        "stages": {stage: math.exp(log) for stage, log in scales},
        "samples": guard.calibrated_on,
        "other_ms": guard.own_ms,
        "hurries": guard.rule.hurries,
        "spread": [math.exp(log) for log in np.percentile(guard.margin.scores.arrived[0], (5, 95)).tolist()],
    }
    print(json.dumps(found) if args.json else describe(found))
    return 0


def describe(found: dict[str, Any]) -> str:
    """What was found, in a few lines for people."""
    from budgetvlm._io import time_text

    stages = ", ".join(f"{stage} x {factor:.2f}" for stage, factor in found["stages"].items())
    low, high = found["spread"]
    lines = [
        f"this machine against the profile: {stages}; controller and guard {time_text(found['other_ms'])}",
        f"spread: nine of ten requests took {low:.2f} to {high:.2f} x the predicted time of a long answer",
        f"bounds are {found['factor']:.2f} x that time (usual: {USUAL_FACTOR[0]:g} to {USUAL_FACTOR[1]:g}): at most "
        f"{found['alpha']:.1%} of the requests late, from {found['samples']} requests",
    ]
    if found["factor"] > WIDE_FACTOR:
        lines.append(
            "note: this is a wide bound, which rules out settings that would be in time. Something slowed a request "
            "down, or the requests are few: calibrate again on a quiet machine, with more --samples"
        )
    return "\n".join(
        [
            *lines,
            "repeat it on another machine, with other threads or beside another load, and after the model or its "
            "libraries changed",
            f"wrote {found['guard']}",
        ]
    )


def open_system(args: argparse.Namespace) -> tuple[AdaptiveVLM, AdaptiveGuard, Task]:
    """Open the model, its guard and the task. Raises ConfigError: several checkpoints; CheckpointError: no guard."""
    from budgetvlm.decide import wait_for_compiled
    from budgetvlm.guard.adaptive import AdaptiveGuard
    from budgetvlm.runtime import AdaptiveVLM

    task, path = open_task(args), checkpoint_of(args)
    model = AdaptiveVLM.from_pretrained(
        args.model_path, path, device=args.device, num_threads=args.num_threads,
        allow_other_model=args.allow_other_model,
    )  # fmt: skip
    if not isinstance(model.guard, AdaptiveGuard):
        raise CheckpointError(
            f"no guard.json lies beside the controller {path}; train again, `budgetvlm train` writes it"
        )
    wait_for_compiled()  # what is measured is what comes later
    return model, model.guard, task


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The one controller that the flags name, or the one that comes with the model. Raises ConfigError."""
    from budgetvlm.runtime import bundled_controller

    given: list[Path] = args.checkpoint or [bundled_controller(args.model_path)]
    if len(given) != 1:
        raise ConfigError(f"{len(given)} checkpoints were given; one system runs at a time, so give one")
    return given[0]

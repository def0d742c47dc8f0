"""Calibrate the guard on this machine: measure a few requests, refit how fast each stage runs and how wide bounds are.

The controller is not trained again. Do this on the machine, with the threads and beside the load that the model is to
serve with; the guard is written beside the controller, and requests use it from then on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from budgetvlm.adaptive import AdaptiveGuard
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.tasks import Sample, Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm calibrate`."""
    add_live_arguments(parser)
    add = parser.add_argument
    add("--samples", type=int, default=50, metavar="N", help="requests, each at every setting (default: 50)")
    add(
        "--split",
        default="validation",
        help="split they come from; profiled samples are left out (default: validation)",
    )
    add("--alpha", type=float, default=0.05, metavar="A", help="share of requests that may be late (default: 0.05)")
    add("--json", action="store_true", help="one JSON document on standard output")


def add_live_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command needs that runs the whole system on a task."""
    add = parser.add_argument
    add("--model_path", default="reference", metavar="DIR", help="model directory, or 'reference' (default)")
    add("--dataset_name", default="signs", help="data set (default: signs)")
    add("--checkpoint", type=Path, nargs="+", required=True, metavar="DIR", help="trained controller")
    add("--data", type=Path, metavar="FILE", help="controller_training_data.json: its samples are left out")
    add("--num_threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--device", default="cpu", help="torch device (default: cpu)")
    add("--seed", type=int, default=0, metavar="N", help="draws samples and orders (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Measure, refit, write."""
    from budgetvlm.calibrate import calibrated, measure, requests_needed

    needed = requests_needed(args.alpha)
    if args.samples < needed:
        raise ConfigError(
            f"--samples {args.samples} cannot promise a violation rate of {args.alpha:g}: that takes {needed}. Measure "
            "more, or allow more violations."
        )
    model, task = open_system(args)
    assert model.guard is not None
    samples = fresh_samples(task, args.split, args.samples, args.seed, args.data)
    measured = measure(model, task, samples, args.seed)
    model.guard = guard = calibrated(model, model.guard, measured, args.alpha)
    path = model.save_guard(directory_of(args.checkpoint[0]))
    _say(guard, path, args.samples, args.json)
    return 0


def open_system(args: argparse.Namespace) -> tuple[AdaptiveVLM, Task]:
    """Model, controller and guard, and the task.

    Raises:
        CheckpointError: no guard lies beside the controller.
    """
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.tasks import load_task

    task = load_task(args.dataset_name)
    if len(args.checkpoint) != 1:
        raise ConfigError(f"{len(args.checkpoint)} checkpoints were given; one system runs at a time, so give one")
    path = args.checkpoint[0]
    model = AdaptiveVLM.from_pretrained(args.model_path, path, device=args.device, num_threads=args.num_threads)
    if model.guard is None:
        raise CheckpointError(
            f"no guard.json lies beside the controller in {directory_of(path)}; train again, `budgetvlm train` "
            "writes it"
        )
    return model, task


def directory_of(checkpoint: Path) -> Path:
    """Where a checkpoint's files lie."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def fresh_samples(task: Task, split: str, count: int, seed: int, data: Path | None) -> list[Sample]:
    """Samples of a split that were not profiled.

    Raises:
        ConfigError: there are not so many.
    """
    from budgetvlm.profiling.document import read_document

    used = {sample["sample_id"] for sample in read_document(data)["samples"]} if data else set()
    total = task.num_samples(split)
    wanted = min(total, count + len(used))
    fresh = [sample for sample in task.samples(split, wanted, seed + 1) if sample.sample_id not in used]
    if len(fresh) < count and wanted < total:
        fresh = [sample for sample in task.samples(split) if sample.sample_id not in used]
    if len(fresh) < count:
        raise ConfigError(
            f"{count} samples were asked of {task.name}/{split}, and {len(fresh)} of its {total} are not profiled"
        )
    return fresh[:count]


def _say(guard: AdaptiveGuard, path: Path, samples: int, as_json: bool) -> None:
    import math

    speed = {s: math.exp(v) for s, v in zip(guard.latency.stages, guard.speed.normal, strict=True)}
    factor = math.exp(guard.margin.q(()))
    if as_json:
        document = {"guard": str(path), "alpha": guard.alpha, "factor": factor, "stages": speed, "samples": samples}
        print(json.dumps({**document, "other_ms": guard.other_ms}))
        return
    stages = ", ".join(f"{stage} x {value:.2f}" for stage, value in speed.items())
    print(f"this machine against the profile: {stages}; controller and guard {guard.other_ms:.2f} ms")
    print(
        f"bounds are {factor:.2f} x the predicted time of a long answer: at most {guard.alpha:.1%} of the requests "
        f"late, from {samples} requests"
    )
    print(f"wrote {path}")

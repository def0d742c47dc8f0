"""Calibrate the guard on this machine: measure a few requests, refit how fast each stage runs and how wide bounds are.

The controller is not trained again. Do this on the machine, with the threads and beside the load that the model is to
serve with; the guard is written beside the controller, and requests use it from then on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.commands.task_arguments import add_task_arguments, open_task
from budgetvlm.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from budgetvlm.guard.adaptive import AdaptiveGuard
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
    add(
        "--no_hurry", action="store_true",
        help="finish every answer at its own setting; by default one that would be late goes on with fewer experts and "
        "blocks",
    )  # fmt: skip
    add("--json", action="store_true", help="one JSON document on standard output")


def add_live_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command needs that runs the whole system on a task."""
    add = parser.add_argument
    add("--model_path", default="reference", metavar="DIR", help="model directory, or 'reference' (default)")
    add_task_arguments(parser)
    add("--checkpoint", type=Path, nargs="+", required=True, metavar="DIR", help="trained controller")
    add("--data", type=Path, metavar="FILE", help="controller_training_data.json: its samples are left out")
    add("--num_threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--device", default="cpu", help="torch device (default: cpu)")
    add("--seed", type=int, default=0, metavar="N", help="draws samples and orders (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Measure, refit, write."""
    from budgetvlm.live.calibration import calibrated, measure, requests_needed

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
    model.guard = guard = calibrated(model, model.guard, measured, args.alpha, hurries=not args.no_hurry)
    path = model.save_guard(directory_of(args.checkpoint[0]))
    _say(guard, path, args.samples, args.json)
    return 0


def open_system(args: argparse.Namespace) -> tuple[AdaptiveVLM, Task]:
    """Model, controller and guard, and the task.

    Raises:
        CheckpointError: no guard lies beside the controller.
    """
    from budgetvlm.runtime import AdaptiveVLM

    task = open_task(args)
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


def fresh_samples(
    task: Task, split: str, count: int, seed: int, data: Path | None, enough: int | None = None
) -> list[Sample]:
    """Samples of a split that can be used and that, like their images, were not profiled.

    Args:
        enough: fewer than ``count`` that will do; None: no fewer.

    Raises:
        ConfigError: there are not so many.
    """
    used, ids = _profiled(data)
    total = task.num_samples(split)
    wanted = min(total, count + ids)
    fresh = _usable(task.samples(split, wanted, seed + 1), used, count)
    if len(fresh) < count and wanted < total:
        fresh = _usable(task.samples(split), used, count)
    if len(fresh) < (count if enough is None else enough):
        raise ConfigError(
            f"{count} samples were asked of {task.name}/{split}, and {len(fresh)} of its {total} can be used and are "
            "not profiled. Ask for fewer, or give another --split."
        )
    return fresh


def _profiled(data: Path | None) -> tuple[set[str], int]:
    """Ids of the samples and of the images of training data, and how many samples that is."""
    from budgetvlm.profiling.prepare.document import read_document

    samples = read_document(data)["samples"] if data else []
    images = {sample["groups"]["image_id"] for sample in samples if "image_id" in sample.get("groups", {})}
    return images | {sample["sample_id"] for sample in samples}, len(samples)


def _usable(samples: Iterable[Sample], used: set[str], count: int) -> list[Sample]:
    """The first ``count`` that are not used and whose image can be loaded; says what it skips."""
    found: list[Sample] = []
    for sample in samples:
        if len(found) == count:
            break
        if sample.sample_id in used or sample.image_id in used:
            continue
        try:
            sample.load_image()
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        found.append(sample)
    return found


def _say(guard: AdaptiveGuard, path: Path, samples: int, as_json: bool) -> None:
    import math

    speed = {s: math.exp(v) for s, v in zip(guard.latency.stages, guard.speed.normal, strict=True)}
    factor = math.exp(guard.margin.q())
    if as_json:
        document = {"guard": str(path), "alpha": guard.alpha, "factor": factor, "stages": speed, "samples": samples}
        print(json.dumps({**document, "other_ms": guard.other_ms, "hurries": guard.hurries}))
        return
    stages = ", ".join(f"{stage} x {value:.2f}" for stage, value in speed.items())
    print(f"this machine against the profile: {stages}; controller and guard {guard.other_ms:.2f} ms")
    print(
        f"bounds are {factor:.2f} x the predicted time of a long answer: at most {guard.alpha:.1%} of the requests "
        f"late, from {samples} requests"
    )
    print(f"wrote {path}")

"""Measure the speed claims of this project on your machine, each beside what it is claimed against.

Every figure is the median of several runs, with the smallest and the largest; where the project names a target, it
stands beside it, met or missed. Run it on an idle machine: what else runs is measured too.

  decision   features in hand to setting out, guard included; the same by PyTorch
  overhead   what being adaptive adds to real requests, part by part, beside the model's cheapest one
  training   state updates a second, beside a plain trainer over rows of logged settings
  memory     the peak of resident memory of an epoch over a million samples (with --quick a hundred thousand)
  accuracy   the accuracy sweep beside a plain loop over the settings; the answers have to be the same
  latency    the latency sweep with a quarter of the cells measured, and the error of the others

Without --data and --checkpoint it measures the bundled model with a made-up profile and an untrained controller, which
is as fast as a trained one. Exit code 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from budgetvlm.commands.flags import add_json_flag, add_model_flags, seed_number
from budgetvlm.errors import ConfigError

NAMES = ("decision", "overhead", "training", "memory", "accuracy", "latency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm bench`."""
    add = parser.add_argument
    add("--sections", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="default: all, in this order")
    add("--quick", action="store_true", help="fewer and shorter runs: 3 minutes instead of 15")
    add("--data", type=Path, metavar="FILE", help="controller_training_data.json of the model")
    add("--checkpoint", type=Path, metavar="DIR", help="trained controller; its guard is used if one lies beside it")
    add("--dataset_name", default="signs", metavar="NAME", help="task whose test split is asked (default: signs)")
    add("--seed", type=seed_number, default=0, metavar="N", help="of everything random (default: 0)")
    add_model_flags(parser, "model_path", "num_threads")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and say; 1 where a target is missed. Raises ConfigError without a checkout of the repository."""
    _find_benchmarks()
    from benchmarks.speed.bench_data import BenchOptions
    from benchmarks.speed.sections import run as run_sections
    from budgetvlm._version import versions
    from budgetvlm.profiling.measure.machine import PACKAGES, hardware

    options = BenchOptions(
        args.quick, args.model_path, args.dataset_name, args.checkpoint, args.data, args.num_threads, args.seed
    )
    found = []
    for section in run_sections(options, args.sections):
        found.append(section)
        if not args.json:
            print(section, end="\n\n", flush=True)
    figures = [figure for section in found for figure in section.figures]
    missed = [figure.name for figure in figures if figure.met is False]
    if args.json:
        document = {"schema_version": 1, "quick": args.quick, "sections": [section.to_dict() for section in found]}
        print(json.dumps({**document, "missed": missed, "hardware": hardware(), "versions": versions(*PACKAGES)}))
    else:
        kept = sum(figure.met is True for figure in figures)
        print(f"{kept} of {kept + len(missed)} targets met" + (f"; missed: {'; '.join(missed)}" if missed else ""))
    return 1 if missed else 0


def _find_benchmarks() -> None:
    """Make the repository's ``benchmarks`` importable: from the working directory, or where the package was cloned."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / "benchmarks" / "speed" / "sections.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return
    raise ConfigError(
        "the benchmarks are not part of the installed package, and the working directory is no checkout of the "
        "repository; clone it and run `budgetvlm bench` there"
    )

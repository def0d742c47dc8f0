"""Measure accuracy (exp5) or latency (exp6) of the settings of a model's knobs on a data set.

Writes one JSON file a setting. A killed sweep goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from budgetvlm.commands.flags import OptionFlags, add_model_flags
from budgetvlm.commands.task_arguments import add_task_arguments, open_task, task_options
from budgetvlm.errors import ConfigError
from budgetvlm.profiling.measure.sweep_options import SweepOptions

STRATEGIES = ("full", "balanced", "stratified", "boundary", "lhs")
SWEEP = OptionFlags(SweepOptions, "seed", "rank", "world_size", "strict", "overwrite")
DIRECTORIES = {"accuracy": "./results/profiling/exp5_accuracy", "latency": "./results/profiling/exp6_latency"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add two sub-commands with nearly the same flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="accuracy|latency")
    for kind, text in (
        ("accuracy", "exp5: all settings answer all samples, in batches, scored by the task"),
        ("latency", "exp6: batch 1, all stages timed, settings interleaved in random order"),
    ):
        _add_sweep_arguments(kinds.add_parser(kind, help=text, description=text), kind)


def _add_sweep_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    add = parser.add_argument
    add_model_flags(parser)
    add_task_arguments(parser)
    add("--split", default="train", metavar="NAMES", help="split, or several: train,validation,test (default: train)")
    add("--output_dir", default=DIRECTORIES[kind], metavar="DIR", help="where the results go (default: %(default)s)")
    add(
        "--num_samples", metavar="N",
        help="samples: one number for all splits together, or one for each: 800,200,400 (default: all)",
    )  # fmt: skip
    add("--sampling_strategy", choices=STRATEGIES, default="full", help="which settings to measure (default: full)")
    add("--num_settings", type=int, metavar="N", help="how many settings a strategy draws (default: about a third)")
    add(
        "--settings", metavar="VALUES",
        help="the settings to measure, instead of a strategy: '1,8,8;12,2,4' (max_crops,top_k,blocks)",
    )  # fmt: skip
    SWEEP.add(parser)
    if kind == "accuracy":
        add("--batch_size", type=int, default=32, metavar="N", help="samples answered at once (default: 32)")
        return
    add("--batch_size", type=int, choices=(1,), default=1, help="latency is that of one request: always 1")
    add("--warmup", type=int, default=2, metavar="N", help="untimed requests at each setting before all (default: 2)")
    add("--repeats", type=int, default=3, metavar="N", help="passes over the samples; the median counts (default: 3)")
    add(
        "--cells", type=float, default=1.0, metavar="SHARE",
        help="time each sample at a random share of the settings; `budgetvlm prepare` predicts the rest and says how "
        "well (default: 1, all)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run a sweep and say where its results are."""
    from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
    from budgetvlm.profiling.measure.latency_sweep import profile_latency
    from budgetvlm.profiling.measure.setting_sampling import choose_settings, parse_settings
    from budgetvlm.vlm import load_vlm

    options, task = sweep_options(args), open_task(args)
    vlm = load_vlm(args.model_path, device=args.device, num_threads=args.num_threads)
    space = vlm.knob_space
    if args.settings is None:
        settings = choose_settings(space, args.sampling_strategy, args.num_settings, args.seed)
    else:
        settings = parse_settings(space, args.settings)
    print(f"{args.kind} of {len(settings)} of {len(space)} settings of {args.model_path} on {task.name}")
    if args.kind == "accuracy":
        paths = profile_accuracy(vlm, task, settings, options, batch_size=args.batch_size)
    else:
        paths = profile_latency(
            vlm, task, settings, options,
            warmup=args.warmup, repeats=args.repeats, cells=args.cells, device=args.device,
        )  # fmt: skip
    print(f"{len(paths)} result files in {paths[0].parent}")
    return 0


def sweep_options(args: argparse.Namespace) -> SweepOptions:
    """Return the checked options, from parsed flags."""
    from budgetvlm.profiling.measure.machine import model_fingerprint
    from budgetvlm.vlm.loading import model_directory

    return SweepOptions(
        splits=tuple(name.strip() for name in args.split.replace("+", ",").split(",")),
        output_dir=Path(args.output_dir),
        num_samples=_whole_numbers(args.num_samples),
        max_new_tokens=args.max_new_tokens,
        model_fingerprint=model_fingerprint(model_directory(args.model_path)),
        task_options=task_options(args).to_dict(),
        **SWEEP.read(args),
    )


def _whole_numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"num_samples={text!r} is no number; give one, or one for each split: 800,200") from None

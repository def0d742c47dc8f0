"""Measure accuracy (exp5) or latency (exp6) of the settings of a model's knobs on a data set.

Writes one JSON file a setting, of several data sets one sweep after another. A killed sweep goes on where it was when
the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.cluster_arguments import add_ray_flags, own_path, ray_crew_of
from budgetvlm.commands.flags import OptionFlags, add_concurrency_flag, add_model_flags, forget_defaults
from budgetvlm.commands.origins import complete_from
from budgetvlm.commands.task_arguments import add_task_arguments, each_data_set, open_task, task_options
from budgetvlm.commands.verdicts import NOTHING_SCORES
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.places import default_directory, find_results, measured_dataset
from budgetvlm.profiling.results.result_files import Kind
from budgetvlm.tasks.options import TaskOptions

if TYPE_CHECKING:
    from budgetvlm.knobs import Setting
    from budgetvlm.profiling.measure.elsewhere import Elsewhere
    from budgetvlm.tasks import Task
    from budgetvlm.vlm import VLM
STRATEGIES = ("full", "balanced", "stratified", "boundary", "lhs")
SWEEP = OptionFlags(SweepOptions, "seed", "rank", "world_size", "strict", "overwrite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add two sub-commands with nearly the same flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="accuracy|latency")
    kinds_of: tuple[tuple[Kind, str], ...] = (
        ("accuracy", "exp5: all settings answer all samples, in batches, scored by the task"),
        ("latency", "exp6: batch 1, all stages timed, settings interleaved in random order"),
    )
    for kind, text in kinds_of:
        _add_sweep_arguments(kinds.add_parser(kind, help=text, description=text), kind)


def _add_sweep_arguments(parser: argparse.ArgumentParser, kind: Kind) -> None:
    add = parser.add_argument
    add_model_flags(parser)
    add_task_arguments(parser)
    add("--split", default="train", metavar="NAMES", help="split, or several: train,validation,test (default: train)")
    add(
        "--output_dir", default=f"./{default_directory(kind)}", metavar="DIR",
        help=f"where the results go (default: %(default)s, and ./{default_directory(kind, 'MODEL')} of another model "
        "than the bundled one)",
    )  # fmt: skip
    add(
        "--num_samples", metavar="N",
        help="samples of each data set: one number for all splits together, or one for each: 800,200,400 (default: "
        "all)",
    )  # fmt: skip
    add("--sampling_strategy", choices=STRATEGIES, default="full", help="which settings to measure (default: full)")
    add("--num_settings", type=int, metavar="N", help="how many settings a strategy draws (default: about a third)")
    add(
        "--settings", metavar="VALUES",
        help="the settings to measure, instead of a strategy: '1,8,8;12,2,4' (max_crops,top_k,blocks)",
    )  # fmt: skip
    SWEEP.add(parser)
    add_ray_flags(parser)
    if kind == "accuracy":
        add("--batch_size", type=int, default=32, metavar="N", help="samples answered at once (default: 32)")
        add(
            "--cells", type=float, default=1.0, metavar="SHARE",
            help="answer each sample at some settings, drawn so that they take this share of the time of all: cheap "
            "ones more often, and several at one tiling, which share its encoding. Test samples, or a fifth of the "
            "images where there are none, are answered at all. `budgetvlm train` predicts the rest and says how well "
            "(default: 1, all)",
        )  # fmt: skip
        add(
            "--groups", metavar="LABEL",
            help="with --cells: samples with this label belong together, like a document's, and become test samples "
            "together (default: the samples of an image)",
        )  # fmt: skip
        return
    add(
        "--exp5_dir", type=Path, metavar="DIR",
        help="accuracy results: model, data set and split that are not given are taken from them (default: those in "
        "the default directory, where --output_dir is not given either)",
    )  # fmt: skip
    add_concurrency_flag(parser)
    add("--batch_size", type=int, choices=(1,), default=1, help="latency is that of one request: always 1")
    add("--warmup", type=int, default=2, metavar="N", help="untimed requests at each setting before all (default: 2)")
    add("--repeats", type=int, default=3, metavar="N", help="passes over the samples; the median counts (default: 3)")
    add(
        "--cells", type=float, default=1.0, metavar="SHARE",
        help="time each sample at a random share of the settings; `budgetvlm prepare` predicts the rest and says how "
        "well (default: 1, all)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run a sweep of each data set, one after another."""
    from budgetvlm.engines.opening import open_model

    @cache
    def load(model_path: str) -> VLM:
        device = (
            "meta" if args.ray else args.device
        )  # workers hold the model; what is asked of it here needs no weights
        return open_model(model_path, device=device, num_threads=args.num_threads)

    parts = list(each_data_set(args))
    for own in parts:
        _sweep(own, load, several=len(parts) > 1)
    return 0


def _sweep(args: argparse.Namespace, load: Callable[[str], VLM], *, several: bool) -> None:
    """Run the sweep of one data set, of ``several``, and say where its results are."""
    from tqdm import tqdm

    from budgetvlm.engines.opening import fingerprint_of
    from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
    from budgetvlm.profiling.measure.latency_sweep import profile_latency
    from budgetvlm.profiling.measure.setting_sampling import choose_settings, parse_settings, served_settings

    _complete(args)
    options, task = sweep_options(args), open_task(args)
    options = _with_own_splits(options, task) if several else options
    vlm = load(args.model_path)
    options = replace(options, model_fingerprint=fingerprint_of(args.model_path, vlm))
    elsewhere = _elsewhere(args, options)
    space = vlm.knob_space
    if args.settings is None:
        settings = choose_settings(space, args.sampling_strategy, args.num_settings, args.seed)
    else:
        settings = parse_settings(space, args.settings)
    settings = served_settings(vlm, settings)
    print(f"{args.kind} of {len(settings)} of {len(space)} settings of {args.model_path} on {task.name}")
    if args.kind == "accuracy":
        paths = profile_accuracy(
            vlm, task, settings, options, batch_size=args.batch_size, cells=args.cells, groups=args.groups,
            say=tqdm.write, elsewhere=elsewhere,
        )  # fmt: skip
    else:
        paths = profile_latency(
            vlm, task, settings, options,
            warmup=args.warmup, repeats=args.repeats, cells=args.cells, device=args.device,
            say=tqdm.write, elsewhere=elsewhere,
        )  # fmt: skip
    print(f"{len(paths)} result files in {paths[0].parent}")
    if args.kind == "accuracy":
        _say_accuracies(settings, paths)


def _elsewhere(args: argparse.Namespace, options: SweepOptions) -> Elsewhere | None:
    """The workers that the flags ask for. Raises ConfigError: flags that do not go together, or Ray is missing."""
    from budgetvlm.engines.opening import is_engine
    from budgetvlm.profiling.measure.elsewhere import Elsewhere

    crew = ray_crew_of(args, alone=args.kind == "latency")
    if crew is None:
        return None
    if is_engine(args.model_path):
        raise ConfigError("engines share the work already; raise --concurrency, or add replicas, instead of --ray")
    if options.world_size > 1:
        raise ConfigError("--world_size shares the samples among processes, and --ray does so too; give one of both")
    threads = args.num_threads or (args.cpus_per_worker if args.kind == "accuracy" else None)
    opening = partial(
        _open, own_path(args.model_path), args.device, threads, options.model_fingerprint, task_options(args)
    )
    return Elsewhere(crew, opening)


def _open(
    model_path: str, device: str, num_threads: int | None, fingerprint: str | None, task: TaskOptions
) -> tuple[VLM, Task]:
    """Open model and data set in a worker. Raises ConfigError: another model lies there."""
    from budgetvlm.tasks import load_task
    from budgetvlm.vlm import load_vlm
    from budgetvlm.vlm.fingerprint import model_fingerprint
    from budgetvlm.vlm.loading import model_directory

    found = model_fingerprint(model_directory(model_path))
    if found != fingerprint:
        raise ConfigError(
            f"model_path={model_path!r} is another model on a worker's machine ({found}) than here ({fingerprint}). "
            "Give all machines the same files."
        )
    return load_vlm(model_path, device=device, num_threads=num_threads), load_task(task)


def _with_own_splits(options: SweepOptions, task: Task) -> SweepOptions:
    """The options without the splits that the data set lacks; as they are where it has none."""

    def has(split: str) -> bool:
        try:
            return task.num_samples(split) > 0
        except ConfigError:
            return False

    kept = [place for place, split in enumerate(options.splits) if has(split)]
    lacking = [split for split in options.splits if split not in [options.splits[place] for place in kept]]
    if not kept or not lacking:
        return options
    print(f"{task.name} has no split {', '.join(lacking)}")
    counts = options.num_samples
    if counts is not None and len(counts) > 1:
        counts = tuple(counts[place] for place in kept)
    return replace(options, splits=tuple(options.splits[place] for place in kept), num_samples=counts)


def _say_accuracies(settings: Sequence[Setting], paths: Sequence[Path]) -> None:
    """Print what each setting scored, and whether that is of any use."""
    from budgetvlm._io import read_json

    means = []
    for setting, path in zip(settings, paths, strict=True):
        summary = read_json(path)["summary"][0]
        means.append(float(summary["accuracy"]))
        print(f"{means[-1]:7.1%}  {setting}  ({summary['num_samples']} samples)")
    if not any(means):
        print(f"note: {NOTHING_SCORES}")


def _complete(args: argparse.Namespace) -> None:
    """Fill in what was not given: a latency sweep goes with the accuracy sweep of the same data set."""
    forget_defaults(args, "model_path", "dataset_name", "split", "output_dir")
    opened = _of_accuracy(args) if args.kind == "latency" and (args.exp5_dir or not args.output_dir) else {}
    complete_from(args, opened)
    args.split = args.split or opened.get("split") or "train"
    args.output_dir = args.output_dir or default_directory(args.kind, args.model_path)


def _of_accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the accuracy results say of model and data set; empty where there are none."""
    from budgetvlm.controller.provenance import opened_by
    from budgetvlm.profiling.results.reading import read_file, result_files

    directory = args.exp5_dir or default_directory("accuracy")
    name = TaskOptions(args.dataset_name or measured_dataset(directory) or TaskOptions.dataset_name).name
    place = find_results(directory, name, "accuracy", args.model_path)
    try:
        first = result_files(place, name, "accuracy")[0]
    except DataError:
        if args.exp5_dir:
            raise
        return {}
    opened = opened_by({"exp5_config": read_file(first, name, "accuracy").config, "dataset_name": name})
    print(f"as in the accuracy results in {place}: {opened.get('model_path')}, {name}, split {opened.get('split')}")
    return opened


def sweep_options(args: argparse.Namespace) -> SweepOptions:
    """Return the checked options, from parsed flags."""
    return SweepOptions(
        splits=tuple(name.strip() for name in args.split.replace("+", ",").split(",")),
        output_dir=Path(args.output_dir),
        num_samples=_whole_numbers(args.num_samples),
        max_new_tokens=args.max_new_tokens,
        task_options=task_options(args).to_dict(),
        concurrency=getattr(args, "concurrency", 1),
        **SWEEP.read(args),
    )


def _whole_numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"num_samples={text!r} is no number; give one, or one for each split: 800,200") from None

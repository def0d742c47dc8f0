"""Make a profile table from results that other programs measured.

  profiles  exp5/exp6 directories, without opening a model
  lmms      logs of samples of lmms-eval, one run for each setting
  table     a CSV, Parquet or JSON-lines file with a row for each sample at each setting

Writes the table (.parquet) and, with features, the features beside it; `budgetvlm train --table --features` takes both.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.data_arguments import several_files
from budgetvlm.commands.flags import OptionFlags, add_json_flag, forget_defaults
from budgetvlm.commands.task_arguments import READ, add_task_arguments
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.profiling.prepare.prepare_options import PrepareOptions

if TYPE_CHECKING:
    from budgetvlm.importing.finish import FinishOptions
    from budgetvlm.table import ProfileTable

Say = Callable[[str], None]

AUTO = Path("auto")  # of --features: made from questions and images
KNOBS = "max_crops,top_k,num_active_blocks"
PROFILES = OptionFlags(PrepareOptions, "exp5_dir", "exp6_dir", "latency_fill")
HOW = OptionFlags(PrepareOptions, "groups", "train_split", "test_split", "seed", "feature_batch_size", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add three sub-commands; what becomes of the table is the same for all."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="profiles|lmms|table")
    PROFILES.add(_kind(kinds, "profiles", "exp5/exp6 directories of any tool, without opening a model"))
    lmms = _kind(kinds, "lmms", "logs of samples of lmms-eval, one run for each setting")
    lmms.add_argument(
        "--run", action="append", default=[], dest="runs", metavar="SETTING=PATH",
        help="a run's output directory or log and its setting: max_crops=4,top_k=8,num_active_blocks=16=PATH; once for "
        "each run; PATH alone where the log says the setting, as BudgetVLM's own does",
    )  # fmt: skip
    add = lmms.add_argument
    add("--manifest", type=Path, metavar="FILE", help='or a JSON file: [{"setting": {...}, "path": "..."}, ...]')
    add("--metric", metavar="NAME", help="the score among the log's metrics, for example exact_match")
    add("--filter", metavar="NAME", help="of the filters that the answers were extracted with, where there are several")
    add("--task", metavar="NAME", help="of the tasks in the logs (default: all)")
    add("--latency_field", metavar="a.b", help="the latency's field (default: token_counts.0.latency_ms)")
    add("--latencies", type=Path, metavar="FILE", help="table of latencies, by setting or by sample and setting")
    _values(lmms)
    flat = _kind(kinds, "table", "a file with a row for each sample at each setting")
    flat.add_argument(
        "--input", required=True, metavar="FILE", help=".csv, .tsv, .parquet or .jsonl; a,b of several data sets"
    )
    flat.add_argument("--knobs", default=KNOBS, metavar="a,b", help=f"columns that are knobs (default: {KNOBS})")
    flat.add_argument(
        "--column", action="append", default=[], metavar="WHAT=NAME",
        help="what a column is: sample_id, score, latency_ms, a knob, image_id, question, image, stage.NAME, "
        "tokens.NAME or group.NAME; once for each column that is called otherwise",
    )  # fmt: skip
    flat.add_argument(
        "--sample_ids", choices=("auto", "index", "name"), default="auto",
        help="whole numbers are indices in the split, or names (default auto: indices)",
    )  # fmt: skip
    _values(flat)


def _kind(kinds: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A sub-command, with the flags that all of them have."""
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="table to write (.parquet)")
    add(
        "--features", type=Path, metavar="FILE",
        help="the samples' features (.safetensors, or .npz: sample_ids, image, language), or 'auto': made from their "
        "questions and images without a model",
    )  # fmt: skip
    add("--encoder", metavar="DIR", help="as --features auto, with a text or image encoder of Transformers")
    add("--image_dir", type=Path, metavar="DIR", help="where the images of --features auto lie")
    add("--model_path", metavar="DIR", help="or the model to extract them with, from --dataset_name")
    data = parser.add_argument_group("data set of the samples, to give them its ids and images")
    add_task_arguments(data, answers=False, scores=False)
    data.add_argument("--split", metavar="NAME", help="its split that the samples are of, or their numbers count in")
    HOW.add(parser, test_split=0.0)
    add("--overwrite", action="store_true", help="replace what is there")
    add_json_flag(parser)
    return parser


def _values(parser: argparse.ArgumentParser) -> None:
    """Add what the files of other programs leave open."""
    add = parser.add_argument
    add("--score_scale", type=float, default=1.0, metavar="X", help="largest score: 100 for per cent (default: 1)")
    add("--latency_unit", choices=("ms", "s"), help="default: ms; it has to be said where latencies look like seconds")
    add("--duplicates", choices=("error", "mean", "last"), default="error", help="several rows of one cell")
    add(
        "--gaps", choices=("keep", "drop"), default="keep",
        help="samples that lack a setting: keep them with a gap, or leave them out (default: keep)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Read the results, write the table and say what it holds."""
    from budgetvlm.importing.finish import finish
    from budgetvlm.importing.measured_rows import counts
    from budgetvlm.profiling.prepare.splits import describe_splits

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout)

    forget_defaults(args, "test_split")
    options = _finish_options(args)
    options.require_free()
    table, by_index = READERS[args.kind](args, say)
    _require_both(table)
    table, features = finish(table, options, by_index=by_index, say=say)
    found = counts(table)
    if args.json:
        files = {"table": str(options.output), "features": str(options.features_path) if features else None}
        print(json.dumps({"kind": args.kind, **found, "knob_space": table.knob_space.to_dict(), **files}))
        return 0
    splits = describe_splits(table)
    sides = ", ".join(f"{name} {count}" for name, count in splits["samples"].items())
    print(
        f"wrote {options.output}: {found['samples']} samples ({sides}; split by {splits['by']}), "
        f"{found['settings']} settings, "
        f"{found['cells_with_both']} of {found['cells']} cells with score and latency"
    )
    if "test" not in splits["samples"]:
        print(
            f"no test split: there are too few {splits['by']}s. `budgetvlm evaluate` can report on --split validation "
            "alone; measure more, or hold some out with --test_split"
        )
    command = ["budgetvlm", "train", "--table", str(options.output), "--features", str(options.features_path)]
    if features is None:
        print(
            "to train a controller, features are needed: --features FILE, --features auto (from the questions), or "
            "--model_path and --dataset_name"
        )
    else:
        print(f"next: {shlex.join([*command, '--output_dir', './checkpoints/controller'])}")
    return 0


def _finish_options(args: argparse.Namespace) -> FinishOptions:
    from budgetvlm.importing.finish import FinishOptions
    from budgetvlm.profiling.prepare.made_features import MakeOptions
    from budgetvlm.tasks import TaskOptions

    reading = READ.read(args)
    asked = [*reading, *(name for name in ("split", "model_path") if getattr(args, name))]
    task = None
    if args.dataset_name is not None and (asked or args.kind != "profiles"):  # there it names directories too
        task = TaskOptions(args.dataset_name, **reading)
    names = ("output", "features", "model_path", "split", "overwrite")
    given = {name: getattr(args, name) for name in names} | HOW.read(args)
    make = None
    if _made(args):
        given["features"] = None if args.features == AUTO else args.features
        beside = several_files(Path(args.input))[0].parent if args.kind == "table" else None
        make = MakeOptions(args.encoder, args.image_dir, beside, given["feature_batch_size"], given["device"])
    elif args.image_dir is not None:
        raise ConfigError("cannot import: --image_dir is of --features auto or --encoder; give one of them")
    options = FinishOptions(task=task, make=make, **given)
    if asked and task is None:
        raise ConfigError(f"cannot import: --{asked[0]} needs --dataset_name")
    return options


def _made(args: argparse.Namespace) -> bool:
    """Whether features are made from questions and images."""
    return args.features == AUTO or args.encoder is not None


def _from_profiles(args: argparse.Namespace, say: Say) -> tuple[ProfileTable, bool]:
    from budgetvlm.profiling.prepare.join import BY_INDEX, SAMPLE_IDS, join

    if args.dataset_name is None:
        raise ConfigError("--dataset_name is needed: exp5 and exp6 directories are named by it")
    table, notes = join(args.exp5_dir, args.exp6_dir, args.dataset_name, latency_fill=args.latency_fill)
    for note in notes:
        say(note)
    return table, table.metadata.get(SAMPLE_IDS) == BY_INDEX


def _from_lmms(args: argparse.Namespace, say: Say) -> tuple[ProfileTable, bool]:
    from budgetvlm.importing.flat_tables import read_flat
    from budgetvlm.importing.lmms_logs import LoggedRun, read_manifest, read_runs
    from budgetvlm.importing.measured_rows import to_table, with_latencies

    runs = [LoggedRun.parse(text) for text in args.runs]
    runs += read_manifest(args.manifest) if args.manifest else []
    cells = read_runs(
        runs, metric=args.metric, task=args.task, score_scale=args.score_scale, latency_field=args.latency_field,
        latency_unit=args.latency_unit, filter_name=args.filter, inputs=_made(args), progress=sys.stderr.isatty(),
    )  # fmt: skip
    metadata = {"imported_from": "lmms-eval", "metric": args.metric, "runs": [str(run.path) for run in runs]}
    table = to_table(cells, duplicates=args.duplicates, metadata=metadata)
    if args.latencies:
        given = read_flat(
            args.latencies, knobs=cells.knobs, latency_unit=args.latency_unit, optional=("sample_id", "score")
        )  # fmt: skip
        table = with_latencies(table, given, duplicates=args.duplicates)
    return _without_gaps(args, table, say), cells.by_index


def _from_flat(args: argparse.Namespace, say: Say) -> tuple[ProfileTable, bool]:
    from budgetvlm.importing.flat_tables import read_flat
    from budgetvlm.importing.measured_rows import to_table
    from budgetvlm.profiling.prepare.joined_tables import join_tables
    from budgetvlm.tasks.options import named_once

    words = [word.partition("=") for word in args.column]
    if any(not (role and equals and name) for role, equals, name in words):
        raise ConfigError(f"--column has to be WHAT=NAME, for example --column score=accuracy; given {args.column}")
    columns = named_once("--column", ((role, name) for role, _, name in words))
    if args.groups and args.groups not in ("sample_id", "image_id"):
        columns = {f"group.{args.groups}": args.groups} | columns
    tables: dict[str, ProfileTable] = {}
    by_index = False
    for path in several_files(Path(args.input)):
        cells = read_flat(
            path, knobs=tuple(name.strip() for name in args.knobs.split(",")), columns=columns,
            score_scale=args.score_scale, latency_unit=args.latency_unit, inputs=_made(args),
        )  # fmt: skip
        by_index = cells.by_index if args.sample_ids == "auto" else args.sample_ids == "index"
        tables[path.stem] = to_table(cells, duplicates=args.duplicates, metadata={"imported_from": str(path)})
    table = _without_gaps(args, join_tables(tables, say), say)
    return table, by_index and len(tables) == 1


def _without_gaps(args: argparse.Namespace, table: ProfileTable, say: Say) -> ProfileTable:
    from budgetvlm.importing.measured_rows import complete_samples, counts

    gaps = table.num_samples - counts(table)["samples_without_gap"]
    if gaps:
        done = "kept, with gaps (--gaps drop)" if args.gaps == "keep" else "left out"
        say(f"{gaps} of {table.num_samples} samples lack score or latency at a setting: {done}")
    return complete_samples(table) if gaps and args.gaps == "drop" else table


def _require_both(table: ProfileTable) -> None:
    from budgetvlm.importing.measured_rows import counts

    found = counts(table)
    if not found["cells_with_both"]:
        which = "latency" if not found["cells_with_latency"] else "score"
        raise DataError(
            f"the results have no {which}"
            + (", or not of the samples and settings that have the other" if found["cells_with_latency"] else "")
            + ". A controller needs both. Latencies can be given apart: import lmms --latencies FILE (columns: the "
            "knobs, latency_ms, perhaps sample_id)."
        )


READERS = {"profiles": _from_profiles, "lmms": _from_lmms, "table": _from_flat}

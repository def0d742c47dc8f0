"""One HTML file about what was measured, learnt and chosen; it opens without a network.

What is not given is left out or, for the evaluation, made. Pictures of samples come from the data set that the data
names, where it can be opened here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.data_arguments import add_data_arguments, read_data
from budgetvlm.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from budgetvlm.html_report.choices import Choices
    from budgetvlm.html_report.report_data import Material, Shown
    from budgetvlm.tasks import Sample

PICTURE_WIDTH = 320  # pixels; small enough to embed a dozen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm report`."""
    add_data_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], metavar="DIR", help="trained controllers, one a seed"
    )
    found = parser.add_argument_group("what was found already")
    found.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="evaluation.json of `budgetvlm evaluate` (default: made now)"
    )
    found.add_argument("--live", type=Path, metavar="FILE", help="live.json of `budgetvlm evaluate --live`")
    found.add_argument("--compare", type=Path, metavar="FILE", help="comparison.json of `budgetvlm compare`")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write each plot there, as PNG and SVG")
    parser.add_argument("--title", default="BudgetVLM report", metavar="TEXT", help="default: BudgetVLM report")
    parser.add_argument("--dataset_name", metavar="NAME", help="data set of the pictures (default: the data's own)")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures of samples out")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")


def run(args: argparse.Namespace) -> int:
    """Read, evaluate if needed, write."""
    _check(args)
    from budgetvlm.html_report.chapters import sections, write_page, write_plots
    from budgetvlm.html_report.interactive import library

    library()  # a missing extra shows before any work
    chapters = sections(_gather(args))
    write_page(chapters, args.title, args.output)
    print(args.output)
    if args.plots is not None:
        print(f"{args.plots}: {len(write_plots(chapters, args.plots))} files")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError or OutputError before any work is done."""
    if args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a directory; give the name of a file, such as report.html in it")
    if args.output.exists() and not args.overwrite:
        raise OutputError(f"{args.output} exists; add --overwrite to replace it, or give another --output")
    if args.plots is not None and args.plots.exists() and not args.plots.is_dir():
        raise ConfigError(f"--plots {args.plots} is a file; give a directory")


def _gather(args: argparse.Namespace) -> Material:
    from budgetvlm.commands import evaluate
    from budgetvlm.evaluation.evaluation_options import EvaluationOptions
    from budgetvlm.html_report.choices import Choices
    from budgetvlm.html_report.report_data import Material, options_of
    from budgetvlm.html_report.saved_results import read_comparison, read_evaluation, read_live, read_run

    given = read_evaluation(args.evaluation) if args.evaluation else None
    live = read_live(args.live) if args.live else None
    comparison = read_comparison(args.compare) if args.compare else None
    if args.compare and comparison is None:
        _note(f"{args.compare} has no rows that this version can show; its table is left out")
    table, features = read_data(args)
    policies = evaluate.read_controllers(args.checkpoint, table, features)
    names = evaluate.checkpoint_names(args.checkpoint)
    runs = tuple(read_run(path, name) for path, name in zip(args.checkpoint, names, strict=True))
    report = given or evaluate.evaluate_with_progress(table, features, policies, EvaluationOptions())
    material = Material(table, report, None, runs, live, comparison, source=_source(args))
    if policies:
        material = replace(material, choices=Choices.of(table, features, policies, options_of(report)))
    return replace(material, shown=_shown(args, material))


def _source(args: argparse.Namespace) -> dict[str, Any]:
    """Where the prepared data comes from."""
    if args.data is None:
        return {}
    from budgetvlm.profiling.prepare.document import read_document

    document = read_document(args.data)
    return {name: document[name] for name in ("dataset_name", "model_path") if name in document}


def _shown(args: argparse.Namespace, material: Material) -> dict[str, Shown]:
    """Pictures and questions of the samples that the report wants to show; none where the data set is not here."""
    from budgetvlm.html_report.report_data import Shown
    from budgetvlm.profiling.prepare.feature_extraction import locate
    from budgetvlm.tasks import SPLITS, load_task

    name = args.dataset_name or material.source.get("dataset_name")
    if args.no_pictures or material.choices is None or name is None:
        return {}
    ids = _wanted(material.choices)
    try:
        located = locate(load_task(name), ids, SPLITS)
        samples = {place.sample.sample_id: place.sample for place in located}
    except (ConfigError, DataError) as error:
        if args.dataset_name is not None:
            raise
        _note(f"no pictures of samples: {error}")
        return {}
    return {key: Shown(_embedded(sample), sample.question, sample.answers) for key, sample in samples.items()}


def _wanted(choices: Choices) -> list[str]:
    from budgetvlm.html_report.choices import pick_examples

    return [choices.table.sample_ids[picked.row] for picked in pick_examples(choices.table)]


def _embedded(sample: Sample) -> str:
    """The image as a data URI, no wider than `PICTURE_WIDTH`."""
    import base64
    import io

    image = sample.load_image().convert("RGB")
    if image.width > PICTURE_WIDTH:
        image = image.resize((PICTURE_WIDTH, max(1, round(image.height * PICTURE_WIDTH / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)

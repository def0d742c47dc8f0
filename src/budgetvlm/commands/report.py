"""Write one HTML file about what was measured, learnt and chosen; it opens without a network.

What is not given is left out, except the evaluation, which is made. Pictures of samples come from the data set that
the data names, if it can be opened here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.commands.data_arguments import add_data_arguments, read_data
from budgetvlm.commands.flags import OptionFlags
from budgetvlm.commands.trained_policies import own_controllers, read_controllers
from budgetvlm.errors import ConfigError, DataError, OutputError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions

if TYPE_CHECKING:
    from budgetvlm.html_report.report_inputs import ReportInputs, SamplePicture
    from budgetvlm.tasks import Sample

EVALUATION = OptionFlags(EvaluationOptions, "mean_budgets", "mean_budget_ms", "ceiling")
PICTURE_WIDTH = 320  # pixels; small enough to embed a dozen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm report`."""
    add_data_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], metavar="DIR", help="trained controllers, one for each seed"
    )
    EVALUATION.add(parser)
    found = parser.add_argument_group("results of other commands")
    found.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="evaluation.json of `budgetvlm evaluate` (default: made now)"
    )
    found.add_argument("--live", type=Path, metavar="FILE", help="live.json of `budgetvlm evaluate --live`")
    found.add_argument("--compare", type=Path, metavar="FILE", help="comparison.json of `budgetvlm compare`")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write each plot there, as PNG and SVG")
    parser.add_argument("--title", default="BudgetVLM report", metavar="TEXT", help="default: BudgetVLM report")
    parser.add_argument("--dataset_name", metavar="NAME", help="data set of the pictures (default: the data's own)")
    parser.add_argument("--no_pictures", action="store_true", help="leave the pictures of samples out")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")


def run(args: argparse.Namespace) -> int:
    """Read, evaluate if needed, and write the page and the pictures."""
    _check(args)
    from budgetvlm.html_report.page import charts_of, report_sections, write_page
    from budgetvlm.html_report.picture_files import save_pictures

    sections = report_sections(_gather(args))
    write_page(sections, args.title, args.output)
    print(args.output)
    if args.plots is not None:
        paths = [path for chart in charts_of(sections) for path in save_pictures(chart, args.plots)]
        print(f"{args.plots}: {len(paths)} files")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError or OutputError before any work is done."""
    asked = [f"--{name}" for name in ("mean_budgets", "mean_budget_ms", "ceiling") if name in args.given]
    if args.evaluation and asked:
        raise ConfigError(
            f"--evaluation {args.evaluation} has mean budgets of its own; leave {' and '.join(asked)} out, or the "
            "file, and the evaluation is made anew"
        )
    if args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a directory; give the name of a file, such as report.html in it")
    if args.output.exists() and not args.overwrite:
        raise OutputError(f"{args.output} exists; add --overwrite to replace it, or give another --output")
    if args.plots is not None and args.plots.exists() and not args.plots.is_dir():
        raise ConfigError(f"--plots {args.plots} is a file; give a directory")


def _gather(args: argparse.Namespace) -> ReportInputs:
    """Read all that the flags name, and evaluate where no evaluation is given."""
    from budgetvlm.commands import evaluate
    from budgetvlm.html_report.controller_choices import choices_of
    from budgetvlm.html_report.report_inputs import ReportInputs, options_of
    from budgetvlm.html_report.saved_results import read_comparison, read_evaluation, read_live, read_run
    from budgetvlm.profiling.prepare.document import read_document

    given = read_evaluation(args.evaluation) if args.evaluation else None
    live = read_live(args.live) if args.live else None
    comparison = read_comparison(args.compare) if args.compare else None
    table, features = read_data(args)
    options = options_of(given) if given else EvaluationOptions(**EVALUATION.read(args))
    table, policies = read_controllers(args.checkpoint, table, features, options.split)
    runs = tuple(read_run(path, name) for path, name in zip(args.checkpoint, policies, strict=True))
    own = None if given else own_controllers(args.checkpoint, table, features, options.split)
    evaluation = given or evaluate.evaluate_with_progress(table, features, policies, options, own)
    document = read_document(args.data) if args.data else {}
    source = {name: value for name, value in document.items() if name in ("dataset_name", "model_path")}
    inputs = ReportInputs(table, evaluation, None, runs, live, comparison, source=source)
    if policies:
        inputs = replace(inputs, choices=choices_of(table, features, policies, options_of(evaluation)))
    for sentence in evaluate.verdict_of(evaluation, table):
        print(f"note: {sentence}", file=sys.stderr)
    return replace(inputs, pictures=_pictures(args, inputs))


def _pictures(args: argparse.Namespace, inputs: ReportInputs) -> dict[str, SamplePicture]:
    """Pictures and questions of the samples to show, by sample id; none if the data set cannot be opened."""
    from budgetvlm.controller.provenance import opened_by
    from budgetvlm.html_report.report_inputs import SamplePicture
    from budgetvlm.html_report.section_choices import pick_samples
    from budgetvlm.profiling.prepare.task_samples import find_samples
    from budgetvlm.profiling.results.reading import split_names
    from budgetvlm.tasks import SPLITS, TaskOptions, load_task

    name = args.dataset_name or inputs.source.get("dataset_name")
    if args.no_pictures or inputs.choices is None or name is None:
        return {}
    shown = inputs.choices.table
    ids = [shown.sample_ids[picked.row] for picked in pick_samples(shown)]
    opened, options = opened_by(inputs.table.metadata), TaskOptions(name)
    own = opened if opened.get("dataset_name") == options.name else {}
    try:
        task = load_task(options.remembered(own.get("task", {})))
        samples = [place.sample for place in find_samples(task, ids, split_names(own) or SPLITS)]
    except (ConfigError, DataError) as error:
        if args.dataset_name is not None:
            raise
        print(f"note: no pictures of samples: {error}", file=sys.stderr)
        return {}
    return {s.sample_id: SamplePicture(_data_uri(s), s.question, s.answers) for s in samples}


def _data_uri(sample: Sample) -> str:
    """The image as a data URI, at most `PICTURE_WIDTH` pixels wide."""
    import base64
    import io

    image = sample.load_image().convert("RGB")
    image.thumbnail((PICTURE_WIDTH, image.height))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

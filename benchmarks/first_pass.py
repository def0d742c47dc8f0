"""A cheap first pass: does answering cheaply first, and going on only if unsure, beat choosing one setting at once?

    python benchmarks/first_pass.py --data data/controller_training_data.json [--first 1 1 3] [--json]

Two steps. The first looks at image, question and budget and either goes straight to a setting or starts with a pass at
--first. The second sees how sure the model was of each token and what is left of the budget, and answers now or goes on
with a setting whose bound fits into what is left. Each pass is charged all of its prefill and decoding; image tokens
that both passes read are encoded once. The second step is the project's controller, trained with GRPO on the rest of
the work, its question features extended by the confidences. The first step compares what both ways earned on training
samples, with controllers that never saw them (3 folds).

Bounds say what stands in the way. "free": the confidences cost no time, so what it lacks is knowledge. "sure": knows
whether the first answer is right, so what it lacks is time. "free and sure" lacks neither; no first pass gains more.
The control does not see the confidences: what it gains comes from picking one of two controllers, as any two would.

In the tables, "passes" is the share of requests that start with one, "kept" of those that end with its answer, "late"
of those over their budget; all are means over the budgets. Differences are paired, with 95% intervals over images.
Recording 4,000 samples takes some minutes, and a seed about four; both are kept in --output_dir. Needs scikit-learn:
pip install "budgetvlm[explain]".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
from confidences import confidences, record
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from two_steps import FOLDS, Chosen, Material, Step, straight, train, two_steps

from budgetvlm.errors import BudgetVLMError, ConfigError, KnobSpaceError
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluation_data import EvaluationData, complete_rows
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import sweep_prices, under_budgets
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics
from budgetvlm.evaluation.outcomes import GROUP, Contender
from budgetvlm.evaluation.records import Estimate
from budgetvlm.policies import GroupLookup, LookupTable
from budgetvlm.profiling.prepare.prepared_data import load_prepared

COPIES = 8  # of the one feature that knows, among hundreds that do not
AT = 0.98  # of the full setting's accuracy
ONE, TWO, ALWAYS = "one-step GRPO", "two-step GRPO", "two-step, always"
UNSEEN = "control: unseen"
SURE, FREE, BEST = "bound: sure", "bound: free", "bound: free and sure"


def policies(work: Material, seed: int, bar: tqdm[Any]) -> tuple[list[Chosen], dict[str, Any]]:
    """All policies of one seed, and how well answers are foreseen with and without the confidences."""
    bar.set_description(f"seed {seed}")
    one = train(work, work.table, work.features, seed, FOLDS, bar)
    after = (work.confident, work.features, work.sure)
    two, unseen, sure = (train(work, work.rest, seen, seed, FOLDS, bar) for seen in after)
    free, best = (train(work, work.table, seen, seed, 0, bar) for seen in (work.confident, work.sure))
    some, always = two_steps(work, one, two)
    found = {ONE: straight(work, one), TWO: some, ALWAYS: always}
    found |= {name: two_steps(work, one, step)[0] for name, step in ((UNSEEN, unseen), (SURE, sure))}
    found |= {FREE: straight(work, free), BEST: straight(work, best)}
    row = {name: place for place, name in enumerate(work.table.sample_ids)}
    known = {"image and question": foreknowledge(work, one), "confidences too": foreknowledge(work, free)}
    return [Chosen(name, choices, row) for name, choices in found.items()], known


def foreknowledge(work: Material, step: Step) -> dict[str, float]:
    """Area under the ROC curve of a step's values of the test samples, against which answers are right."""
    test, values = work.split("test"), step.values(np.inf, 0.0)
    right = work.table.accuracy[test] > 0.5
    places = {"first answer": work.first, "full setting's answer": -1}
    mixed = {name: k for name, k in places.items() if 0 < right[:, k].mean() < 1}
    return {name: float(roc_auc_score(right[:, k], values[test, k])) for name, k in mixed.items()}


def compare(work: Material, seeds: Sequence[int]) -> dict[str, Any]:
    """All figures; those in rows are `Estimate`."""
    with tqdm(total=len(seeds) * (4 * (FOLDS + 1) + 2), file=sys.stderr, leave=False, unit="controller") as bar:
        runs, known = zip(*(policies(work, seed, bar) for seed in seeds), strict=True)
    data, options = EvaluationData.of(work.both, work.features, work.options), work.options
    simple = LookupTable(data.means), GroupLookup.fit(data.train, means=data.means)
    contenders = [Contender(policy.name, "", (policy,), "", priced=True) for policy in simple]
    contenders += [Contender(same[0].name, "", same, "", priced=True) for same in zip(*runs, strict=True)]
    budget = CeilingMetrics.measure(data, options.budget_shares, under_budgets(data, contenders, options))
    price = MeanBudgetMetrics.measure(
        data, replace(options, accuracy_shares=(AT,)), sweep_prices(data, contenders, options)
    )
    return {
        "first": dict(work.table.knob_space.settings[work.first]),
        "first_ms": float(work.table.latency_ms[:, work.first].mean()),
        "first_accuracy": float(data.test.accuracy[:, work.first].mean()),
        "reference_ms": work.reference_ms,
        "budget_shares": list(work.options.budget_shares),
        "counts": data.counts,
        "seeds": list(seeds),
        "area_under_roc": list(known),
        "rows": [row(work, budget, price, each.name) for each in contenders],
    }


def row(work: Material, budget: CeilingMetrics, price: MeanBudgetMetrics, name: str) -> dict[str, Any]:
    """One policy: its figures at each budget, and paired differences from others."""
    at, chosen = budget.at_budgets(name), budget.found[name].chosen
    room, shares = work.options.room_shares, work.options.budget_shares

    def versus(other: str) -> dict[str, Any]:
        by_budget = [budget.gain(name, other, (share,)) for share in shares]
        saved = price.faster(name, other, AT)
        return {"points": budget.gain(name, other, room), "points_by_budget": by_budget, "latency_saved": saved}

    return {
        "name": name,
        "accuracy": [each.accuracy for each in at],
        "late": [each.violation_rate for each in at],
        "passes": (chosen < work.table.num_settings).mean(axis=(0, 2)).tolist(),
        "kept": (chosen == work.first).mean(axis=(0, 2)).tolist(),
        "ms_at_98": price.at_accuracy(name)[0].latency_ms,
        "versus": {other: versus(other) for other in (ONE, GROUP)},
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Two tables: each policy by budget, and the paired differences; and what is known before an answer is given."""
    by_budget, differences = Table(box=SIMPLE_HEAD), Table(box=SIMPLE_HEAD)
    shares = [f"{share:g}" for share in found["budget_shares"]]
    for title in ("accuracy at budget", *shares, "late", "passes", "kept", "ms at 98%"):
        by_budget.add_column(title, justify="right" if by_budget.columns else "left", no_wrap=True)
    for title in (
        "",
        f"points over\n{ONE}",
        "% latency saved\nat 98%",
        f"points over\n{GROUP}",
        "% latency saved\nat 98%",
    ):
        differences.add_column(title, justify="right" if differences.columns else "left", no_wrap=True)
    for each in found["rows"]:
        name, ms = each["name"], each["ms_at_98"]
        late = [at.value for at in each["late"]]
        means = [f"{100 * np.mean(share):.1f}%" for share in (late, each["passes"], each["kept"])]
        accuracy = [f"{100 * at.value:.1f}" for at in each["accuracy"]]
        by_budget.add_row(name, *accuracy, *means, "-" if ms is None else f"{ms.value:.1f}")
        versus = [each["versus"][other] for other in (ONE, GROUP)]
        differences.add_row(
            name, *(text for v in versus for text in (percent(v["points"]), percent(v["latency_saved"])))
        )
    console.print(by_budget, differences)
    right, ms = found["first_accuracy"], found["first_ms"]
    console.print(
        f"first pass: {ms:.1f} of {found['reference_ms']:.1f} ms, right on {right:.1%}; known beforehand (ROC):"
    )
    for seen in found["area_under_roc"][0]:
        for answer in found["area_under_roc"][0][seen]:
            area = np.mean([each[seen][answer] for each in found["area_under_roc"]])
            console.print(f"  {answer} from {seen}: {area:.3f}")


def percent(number: Estimate | None) -> str:
    """With its interval, to three digits."""
    if number is None:
        return "-"
    digits = 2 if abs(number.value) < 0.1 else 1
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*(100 * n for n in astuple(number)), d=digits)


def read(args: argparse.Namespace) -> Material:
    """The data, the recorded first pass, and the features that follow from it."""
    if args.output_dir.exists() and not args.resume:
        raise ConfigError(f"{args.output_dir} exists; add --resume to go on with it, or choose another --output_dir")
    prepared = load_prepared(args.data)
    table = complete_rows(prepared.table, np.ones(prepared.table.num_settings, dtype=bool))
    features, space = prepared.features.aligned(table.sample_ids), table.knob_space
    values = args.first or list(space.cheapest.values())
    if len(values) != len(space.names):
        raise KnobSpaceError(f"--first {' '.join(map(str, values))} needs a value for each of {', '.join(space.names)}")
    first = space.index(dict(zip(space.names, values, strict=True)))
    passes = record(args.data, table, first, args.output_dir / f"first_pass_{'_'.join(map(str, values))}.jsonl")
    seen = confidences(passes, np.array(table.split) == "train")
    right = np.repeat(table.accuracy[:, [first]], COPIES, axis=1)
    confident, sure = (replace(features, language=np.hstack([features.language, more])) for more in (seen, right))
    return Material(table, first, features, confident, sure, EvaluationOptions(), args.output_dir / "controllers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DATA.json", help="what budgetvlm prepare wrote")
    parser.add_argument(
        "--first", type=int, nargs="+", metavar="V", help="the first pass's value of each knob (default: the cheapest)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("results/first_pass"), metavar="DIR", help="default: results/first_pass"
    )
    parser.add_argument("--resume", action="store_true", help="use what is finished in --output_dir")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    try:
        found = compare(read(args), args.seeds)
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on with what is kept in --output_dir", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(found, default=asdict, allow_nan=False))
        return 0
    console = Console()
    console.width = max(console.width, 120)
    show(found, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())

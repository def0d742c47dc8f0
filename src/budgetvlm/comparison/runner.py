"""The comparison itself: make what cells are missing, then put all choices on both faces of the evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import read_json, write_json
from budgetvlm.comparison.compare_options import CompareOptions
from budgetvlm.comparison.comparison_records import CompareReport, ComparisonRow
from budgetvlm.comparison.fits import NO_FEATURES, OK, Cell, Recorded, Spec, failed_cell, make_cell
from budgetvlm.comparison.fitting_data import VIEWS, FittingData, learning_part, viewed, with_splits
from budgetvlm.comparison.roster import ALWAYS, ROSTER
from budgetvlm.errors import BudgetVLMError, ConfigError
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluator import evaluation_data, versions
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics
from budgetvlm.evaluation.outcomes import ORACLE, Contender, EvaluationData
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

ORIGIN = "origin.json"  # beside the cells: options and data that they were made with
KNOB_POLICIES, VIEW_POLICIES = ("lookup", "grpo"), ("grpo", "predict")
SIZE_POLICIES = "lookup", "grpo", "grpo_ensemble", "predict"
Progress = Callable[[int, int, str], None]


def compare(
    table: ProfileTable,
    features: Features | None,
    options: CompareOptions | None = None,
    cells_dir: str | Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> CompareReport:
    """Compare policies on one split of a table.

    Args:
        table: a profile table; where it has no splits they are drawn.
        features: of its samples; without them only policies that read none are compared.
        options: see `CompareOptions`.
        cells_dir: where finished cells are kept and found again; None keeps nothing.
        progress: called with cells done, cells in all and the name of the next.

    Raises:
        DataError: a split or measurements are missing.
        ConfigError: options that cannot work, or cells that were made with other options or data.
    """
    options = options or CompareOptions()
    whole = with_splits(table)
    bench = evaluation_data(whole, features, options.evaluation)
    material = _material(whole, features, bench, options)
    directory = None if cells_dir is None else Path(cells_dir)
    if directory is not None:
        _check_origin(directory, whole, features, options)
    wanted = list(dict.fromkeys(_specs(whole, material, options)))
    cells = []
    for number, spec in enumerate(wanted):
        progress(number, len(wanted), spec.name)
        cells.append(_cell(spec, material, whole, bench, options, directory))
    progress(len(wanted), len(wanted), "intervals")
    return _report(whole, bench, options, cells)


def _material(
    whole: ProfileTable, features: Features | None, bench: EvaluationData, options: CompareOptions
) -> FittingData:
    budgets = np.array(options.evaluation.budget_shares) * bench.expected.reference_ms
    return FittingData(
        table=learning_part(whole),
        features=None if features is None else features.aligned(whole.sample_ids),
        expected=bench.expected,
        guard=bench.guard,
        budgets_ms=budgets,
        labels=tuple(label for label in options.evaluation.labels if label in whole.groups) or ("kind",),
        members=options.members,
        num_epochs=options.num_epochs,
    )


def _specs(whole: ProfileTable, material: FittingData, options: CompareOptions) -> Iterator[Spec]:
    """All cells of the sections asked for; the same cell may come twice."""
    for key in dict.fromkeys((*options.policies, *ALWAYS)):
        yield from _seeds(Spec(key, 0), options)
    if "knobs" in options.sections:
        names = whole.knob_space.names
        for size in range(1, len(names) + 1):
            for knobs in itertools.combinations(names, size):
                for key in KNOB_POLICIES:
                    yield from _seeds(Spec(key, 0, knobs=None if size == len(names) else knobs), options)
    if "features" in options.sections and material.features is not None:
        named = set(options.evaluation.labels) <= set(whole.groups)
        for view in (None, *(view for view in VIEWS if view != "labels" or named)):
            for key in VIEW_POLICIES:
                yield from _seeds(Spec(key, 0, view=view), options)
    if "samples" in options.sections:
        sizes = [size for size in options.sizes if size < material.table.num_samples]
        limits: tuple[int | None, ...] = (*sizes, None)
        for limit, key in itertools.product(limits, SIZE_POLICIES):
            yield from _seeds(Spec(key, 0, samples=limit), options)


def _seeds(spec: Spec, options: CompareOptions) -> Iterator[Spec]:
    drawn = ROSTER[spec.policy].drawn or spec.samples is not None
    return (replace(spec, seed=seed) for seed in (options.seeds if drawn else options.seeds[:1]))


def _cell(
    spec: Spec,
    material: FittingData,
    whole: ProfileTable,
    bench: EvaluationData,
    options: CompareOptions,
    directory: Path | None,
) -> Cell:
    known = None if directory is None else Cell.load(spec, directory)
    if known is not None and known.status == OK:  # what was not installed may be by now
        return known
    evaluation = options.evaluation
    try:
        changed = _changed(spec, material, whole)
    except BudgetVLMError as error:  # too few images for a split, for example
        return failed_cell(spec, str(error))
    cell = make_cell(spec, changed, bench, evaluation.budget_shares, evaluation.price, _prices(options))
    if directory is not None:
        cell.save(directory)
    return cell


def _changed(spec: Spec, material: FittingData, whole: ProfileTable) -> FittingData:
    if spec.knobs:
        material = material.only_knobs(spec.knobs)
    if spec.view and material.features is not None:
        material = material.seeing(viewed(material.features, spec.view, whole, material.labels))
    return material.only_samples(spec.samples, spec.seed) if spec.samples else material


def _prices(options: CompareOptions) -> list[float]:
    return sorted(options.evaluation.prices, reverse=True)


def _check_origin(directory: Path, whole: ProfileTable, features: Features | None, options: CompareOptions) -> None:
    """Note what cells are made with, or raise ConfigError where it is not what they were made with."""
    from budgetvlm.controller.training import fingerprint

    evaluation = asdict(options.evaluation)
    for name in ("resamples", "level", "room_range", "accuracy_shares"):  # these are used after the cells are made
        evaluation.pop(name)
    origin: dict[str, Any] = {
        **evaluation, "members": options.members, "num_epochs": options.num_epochs,
        "data": fingerprint(whole, features), "version": versions()["budgetvlm"],
    }  # fmt: skip
    origin = {name: list(value) if isinstance(value, tuple) else value for name, value in origin.items()}
    path = directory / ORIGIN
    if not path.exists():
        write_json(path, origin)
        return
    before = read_json(path)
    differing = sorted(name for name in {*before, *origin} if before.get(name) != origin.get(name))
    if differing:
        raise ConfigError(
            f"the comparison in {directory.parent} was begun with another {', '.join(differing)}; give the same "
            "options and data, or --overwrite to start anew"
        )


def _report(
    whole: ProfileTable, bench: EvaluationData, options: CompareOptions, cells: Sequence[Cell]
) -> CompareReport:
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.spec.name, []).append(cell)
    made = {name: group for name, group in by_name.items() if all(cell.status == OK for cell in group)}
    faces = _Faces.measure(bench, options, made)
    rows = [faces.row(group) for group in by_name.values()]
    main = sorted(_with_rivals(faces, rows), key=_order)
    rest = [row for row in rows if row.section != "policies"]
    evaluation = options.evaluation
    return CompareReport(
        split=evaluation.split,
        counts=bench.counts,
        latency_reference_ms=bench.expected.reference_ms,
        full_accuracy=float(bench.test.accuracy[:, -1].mean(dtype=np.float64)),
        room_budget_shares=evaluation.room_shares,
        options=asdict(options),
        versions=versions(),
        notes=tuple(_notes(whole, bench, cells)),
        rows=(*main, *rest),
    )


def _order(row: ComparisonRow) -> tuple[bool, bool, float]:
    """Competitors from best to worst, then those that break budgets or have no figures, then the bounds."""
    return row.role == "bound", not row.competes, -row.gain


def _notes(whole: ProfileTable, bench: EvaluationData, cells: Sequence[Cell]) -> Iterator[str]:
    if bench.test_features is None:
        yield "The data has no features, so policies that read the input are left out."
    yield from sorted({cell.note for cell in cells if cell.status not in (OK, NO_FEATURES)})
    if bench.left_out:
        yield f"{bench.left_out} evaluated samples lack measurements and are left out."


@dataclass(frozen=True, eq=False)
class _Faces:
    """Both faces of the evaluation, with what the rows need of them."""

    options: CompareOptions
    budget: CeilingMetrics
    price: MeanBudgetMetrics

    @classmethod
    def measure(cls, bench: EvaluationData, options: CompareOptions, made: dict[str, list[Cell]]) -> _Faces:
        evaluation = options.evaluation
        contenders = [_contender(group, bench, options) for group in made.values()]
        quiet: Callable[[str], None] = lambda text: None  # noqa: E731
        budget = CeilingMetrics.measure(bench, contenders, evaluation.budget_shares, evaluation.price, quiet)
        price = MeanBudgetMetrics.measure(bench, contenders, evaluation.prices, evaluation.accuracy_shares, quiet)
        return cls(options, budget, price)

    def row(self, group: Sequence[Cell]) -> ComparisonRow:
        spec = group[0].spec
        entry, name = ROSTER[spec.policy], spec.name
        bad = next((cell for cell in group if cell.status != OK), None)
        section = "samples" if spec.samples else "knobs" if spec.knobs else "features" if spec.view else "policies"
        row = ComparisonRow(
            key=spec.policy, name=name, role=entry.role, section=section, variant=spec.variant,
            status=bad.status if bad else OK, note=bad.note if bad else entry.note, runs=len(group),
        )  # fmt: skip
        if bad:
            return row
        shares = self.options.evaluation.room_shares
        return replace(
            row,
            at_budget=self.budget.at_budgets(name),
            room=self.budget.room(name, shares),
            comparable=self.budget.comparable(name, shares),
            regret=self.budget.gain(ORACLE, name, shares).value,
            at_accuracy=self.price.at_accuracy(name),
            fit_seconds=float(np.mean([cell.fit_seconds for cell in group])),
            decision_us=float(np.median([cell.decision_us for cell in group])),
        )


def _with_rivals(faces: _Faces, rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Rows of the main section, each compared with the best other competitor on both faces."""
    main = [row for row in rows if row.section == "policies"]
    return [_rivalled(faces, row, [other for other in main if other.competes and other is not row]) for row in main]


def _rivalled(faces: _Faces, row: ComparisonRow, others: Sequence[ComparisonRow]) -> ComparisonRow:
    if row.status != OK or not others:
        return row
    evaluation = faces.options.evaluation
    best = max(others, key=lambda other: other.gain)
    row = replace(
        row, best_other=best.name, vs_best_other=faces.budget.gain(row.name, best.name, evaluation.room_shares)
    )
    timed = [other for other in others if other.latency_ms is not None]
    if row.latency_ms is None or not timed:
        return row
    fastest = min(timed, key=lambda other: other.latency_ms or np.inf)
    faster = faces.price.faster(row.name, fastest.name, evaluation.accuracy_shares[0])
    return replace(row, fastest_other=fastest.name, faster=faster)


def _contender(group: Sequence[Cell], bench: EvaluationData, options: CompareOptions) -> Contender:
    evaluation, entry, name = options.evaluation, ROSTER[group[0].spec.policy], group[0].spec.name
    prices = _prices(options)
    runs = tuple(Recorded.of(cell, bench, evaluation.budget_shares, evaluation.price, prices) for cell in group)
    oracle = name == ORACLE
    return Contender(name, entry.role, runs, entry.note, priced=entry.priced, charged_expected=oracle)

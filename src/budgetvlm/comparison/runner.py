"""The comparison itself: fit the policies that are not fitted yet, then measure all choices in both ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from budgetvlm._io import read_json, write_json
from budgetvlm._version import __version__
from budgetvlm.cluster.hand_out import StartCrew, do_jobs
from budgetvlm.comparison.compare_options import CompareOptions
from budgetvlm.comparison.comparison_records import CompareReport
from budgetvlm.comparison.fits import FAILED, NO_FEATURES, OK, Cell, CellSpec, make_cell
from budgetvlm.comparison.fitting_data import VIEWS, FittingData, viewed
from budgetvlm.comparison.roster import ALWAYS, ROSTER, Entry
from budgetvlm.comparison.rows import comparison_rows
from budgetvlm.errors import BudgetVLMError, ConfigError
from budgetvlm.evaluation.evaluation_data import EvaluationData, learning_part
from budgetvlm.evaluation.evaluator import common_fields, with_choice
from budgetvlm.features import Features
from budgetvlm.policies.unmeasured import with_predictions
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
    entries: Sequence[Entry] = (),
    crew: StartCrew | None = None,
) -> CompareReport:
    """Compare policies on one split of a table.

    Args:
        table: a profile table; where it has no splits they are drawn as training draws them.
        features: the features of its samples; without them only policies that read none are compared.
        options: see `CompareOptions`.
        cells_dir: where finished cells are kept and found again; None keeps nothing.
        progress: called with the number of finished cells, the number of all and the name of the next.
        entries: further policies to compare.
        crew: starts processes that fit the policies, several at once; None: this process does.

    Raises:
        DataError: a split or measurements are missing.
        ConfigError: the options cannot work, two entries share a key, or the cells were made with other options or
            data.
    """
    from budgetvlm.controller.training import with_splits

    options = options or CompareOptions()
    _check_keys(entries)
    drawn = () if table.split else ("The table stores no splits; those that training draws are used.",)
    task = ComparisonTask.of(with_splits(table), features, options)
    directory = None if cells_dir is None else Path(cells_dir)
    if directory is not None:
        _check_origin(directory, task, features)
    wanted = list(dict.fromkeys(_specs(task, entries)))
    made = _known(wanted, directory)

    def show(what: str) -> None:
        progress(len(made), len(wanted), what)

    jobs = (_Fitting(spec, made, directory, show) for spec in wanted)
    do_jobs(jobs, partial(_Fitter, task), crew, tqdm.write)
    cells = [made[spec] for spec in wanted]
    show("intervals")
    rows, reasons = comparison_rows(cells, task.data, task.options.evaluation)
    report = CompareReport(
        **common_fields(task.data, task.options.evaluation),
        options=asdict(task.options),
        notes=(*drawn, *task.notes, *reasons, *_notes(task.data, cells)),
        rows=rows,
    )
    alike = said_of_ranks(report.ranks)
    return replace(report, notes=(alike, *report.notes)) if alike else report


@dataclass(frozen=True, eq=False)
class ComparisonTask:
    """A comparison: its options, the whole table, and what is evaluated and fitted on."""

    options: CompareOptions
    table: ProfileTable
    data: EvaluationData
    fitting: FittingData
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, table: ProfileTable, features: Features | None, options: CompareOptions) -> ComparisonTask:
        data = EvaluationData.of(table, features, options.evaluation)
        evaluation, notes = with_choice(data, options.evaluation)
        options = replace(options, evaluation=evaluation)
        fitting = FittingData(
            table=learning_part(with_predictions(table, features, evaluated=options.evaluation.split)),
            features=features and features.aligned(table.sample_ids),
            means=data.means,
            guard=data.guard,
            budgets_ms=data.budgets_ms(options.evaluation.budget_shares),
            labels=tuple(label for label in options.evaluation.labels if label in table.groups),
            members=options.members,
            num_epochs=options.num_epochs,
        )
        return cls(options, table, data, fitting, notes)


def said_of_ranks(ranks: Mapping[str, int]) -> str | None:
    """A sentence where several policies compete and all choose alike; None otherwise."""
    if len(ranks) < 2 or set(ranks.values()) != {1}:
        return None
    return f"Nothing is ranked under a budget: all {len(ranks)} policies that keep the budgets choose alike at each."


def _check_keys(entries: Sequence[Entry]) -> None:
    keys = [*ROSTER, *(entry.key for entry in entries)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"two policies of the comparison are called {', '.join(twice)}; give each entry its own key")


def _specs(task: ComparisonTask, entries: Sequence[Entry]) -> Iterator[CellSpec]:
    """All cells of the sections asked for; the same cell may come twice."""
    options, names = task.options, task.table.knob_space.names
    for entry in (*(ROSTER[key] for key in (*options.policies, *ALWAYS)), *entries):
        yield from _seeds(entry, options)
    if "knobs" in options.sections:
        subsets = [some for size in range(1, len(names) + 1) for some in itertools.combinations(names, size)]
        for knobs, key in itertools.product(subsets, KNOB_POLICIES):
            yield from _seeds(ROSTER[key], options, knobs=None if knobs == tuple(names) else knobs)
    if "features" in options.sections and task.fitting.features is not None:
        named = set(options.evaluation.labels) <= set(task.table.groups)
        views = (None, *(view for view in VIEWS if view != "labels" or named))
        for view, key in itertools.product(views, VIEW_POLICIES):
            yield from _seeds(ROSTER[key], options, view=view)
    if "samples" in options.sections:
        sizes = [size for size in options.sizes if size < task.fitting.table.num_samples]
        for limit, key in itertools.product((*sizes, None), SIZE_POLICIES):
            yield from _seeds(ROSTER[key], options, samples=limit)


def _seeds(entry: Entry, options: CompareOptions, **left_out: Any) -> Iterator[CellSpec]:
    drawn = entry.drawn or left_out.get("samples") is not None
    return (CellSpec(entry, seed, **left_out) for seed in (options.seeds if drawn else options.seeds[:1]))


def _known(wanted: Sequence[CellSpec], directory: Path | None) -> dict[CellSpec, Cell]:
    """The cells that are made already; those that lacked something are made again, because it may be there by now."""
    known = (None if directory is None else Cell.load(spec, directory) for spec in wanted)
    return {cell.spec: cell for cell in known if cell is not None and cell.status == OK}


class _Fitting:
    """The job of making one cell."""

    def __init__(
        self, spec: CellSpec, made: dict[CellSpec, Cell], directory: Path | None, show: Callable[[str], None]
    ) -> None:
        self.spec, self.made, self.directory, self.show = spec, made, directory, show

    def left(self) -> CellSpec | None:
        self.show(self.spec.name)
        return None if self.spec in self.made else self.spec

    def take(self, piece: Cell) -> None:
        self.made[self.spec] = replace(piece, spec=self.spec)  # not the copy that a worker was sent
        if self.directory is not None:
            self.made[self.spec].save(self.directory)

    def end(self) -> None:
        pass

    def __str__(self) -> str:
        return f"{self.spec.name}, seed {self.spec.seed}"


class _Fitter:
    """Makes cells."""

    def __init__(self, task: ComparisonTask, say: Callable[[str], None]) -> None:
        self.task = task

    def work(self, message: CellSpec) -> Iterator[Cell]:
        try:
            fitting = _changed(self.task, message)
        except BudgetVLMError as error:  # too few images for a split, for example
            yield Cell(message, FAILED, str(error))
        else:
            yield make_cell(message, fitting, self.task.data, self.task.options.evaluation)

    def close(self) -> None:
        pass


def _changed(task: ComparisonTask, spec: CellSpec) -> FittingData:
    """What the cell's policy is fitted on: everything but what is left out."""
    fitting = task.fitting
    if spec.knobs:
        fitting = fitting.only_knobs(spec.knobs)
    if spec.view and fitting.features is not None:
        fitting = replace(fitting, features=viewed(fitting.features, spec.view, task.table, fitting.labels))
    return fitting.only_samples(spec.samples, spec.seed) if spec.samples else fitting


def _check_origin(directory: Path, task: ComparisonTask, features: Features | None) -> None:
    """Note what cells are made with, or raise ConfigError where it is not what they were made with."""
    from budgetvlm.controller.run_directory import fingerprint

    options = task.options
    evaluation = asdict(options.evaluation)
    for name in (
        "resamples",
        "level",
        "room_range",
        "accuracy_shares",
        "mean_budgets",
        "mean_budget_ms",
    ):  # used after cells are made
        evaluation.pop(name)
    origin: dict[str, Any] = {
        **evaluation, "members": options.members, "num_epochs": options.num_epochs,
        "data": fingerprint(task.table, features), "version": __version__,
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


def _notes(data: EvaluationData, cells: Sequence[Cell]) -> Iterator[str]:
    if data.test_features is None:
        yield "The data has no features, so policies that read the input are left out."
    yield f"{data.guard.why[:1].upper()}{data.guard.why[1:]}."
    named = {(cell.spec.entry.name, cell.note) for cell in cells if cell.status not in (OK, NO_FEATURES)}
    yield from (f"No {name}: {note}." for name, note in sorted(named))
    if data.left_out:
        yield f"{data.left_out} evaluated samples lack measurements and are left out."

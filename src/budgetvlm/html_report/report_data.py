"""Everything that a report is made of, gathered once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from budgetvlm.errors import DataError, KnobSpaceError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.records import EvaluationReport
from budgetvlm.html_report.choices import Choices
from budgetvlm.html_report.saved_results import Run
from budgetvlm.table import ProfileTable


@dataclass(frozen=True)
class Shown:
    """A sample for the eye: its picture as a data URI ("" where there is none), the question, the right answers."""

    picture: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Material:
    """What lies on disk, read and checked.

    Attributes:
        table: the whole profile table.
        evaluation: of this table.
        choices: of the controllers; None without one.
        runs: a training run for each controller.
        live: the document of `evaluate --live`, or None.
        comparison: rows of a comparison, or None.
        shown: sample id -> what is shown of it.
        source: what the prepared data says of its origin, for example "dataset_name".

    Raises:
        KnobSpaceError: the evaluation is of another knob space than the table.
        DataError: it is of other samples.
    """

    table: ProfileTable
    evaluation: EvaluationReport
    choices: Choices | None = None
    runs: tuple[Run, ...] = ()
    live: Mapping[str, Any] | None = None
    comparison: tuple[dict[str, Any], ...] | None = None
    shown: Mapping[str, Shown] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.evaluation.knobs != self.table.knob_space.to_dict():
            raise KnobSpaceError(
                f"the evaluation is of other knobs ({self.evaluation.knobs}) than the data ({self.table.knob_space}); "
                "give the evaluation of this data, or none: then it is made"
            )
        counts, split = self.evaluation.counts, self.evaluation.split
        evaluated = counts["evaluated_samples"] + counts["left_out_incomplete"]
        here = (self.table.split or ()).count(split)
        if evaluated != here:
            raise DataError(
                f"the evaluation is of {evaluated} {split} samples, and the data has {here}; give the evaluation of "
                "this data, or none: then it is made"
            )


def options_of(evaluation: EvaluationReport) -> EvaluationOptions:
    """The options that an evaluation was made with, as far as the controllers' choices depend on them."""
    known = evaluation.options
    default = EvaluationOptions()
    return EvaluationOptions(
        split=evaluation.split,
        budget_shares=tuple(known.get("budget_shares", default.budget_shares)),
        price=known.get("price", default.price),
        guard_quantile=known.get("guard_quantile", default.guard_quantile),
        resamples=1,
    )

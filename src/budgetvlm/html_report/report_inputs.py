"""Everything that a report is about, gathered once and checked to belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from budgetvlm.comparison.comparison_records import CompareReport
from budgetvlm.errors import DataError, KnobSpaceError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.records import EvaluationReport
from budgetvlm.html_report.controller_choices import ControllerChoices
from budgetvlm.html_report.saved_results import SavedRun
from budgetvlm.table import ProfileTable


@dataclass(frozen=True)
class SamplePicture:
    """The picture of a sample as a data URI, its question and the right answers."""

    picture: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ReportInputs:
    """What the report is made of.

    Attributes:
        table: the whole profile table.
        evaluation: the evaluation of this table.
        choices: what the controllers choose; None without a controller.
        runs: the training run of each controller.
        live: the document of `budgetvlm evaluate --live`, or None.
        comparison: a comparison of policies, or None.
        pictures: the samples that can be shown, by sample id.
        source: what the prepared data says about its origin, for example "dataset_name".

    Raises:
        KnobSpaceError: the evaluation and the table have different knob spaces.
        DataError: the evaluation and the table have different samples.
    """

    table: ProfileTable
    evaluation: EvaluationReport
    choices: ControllerChoices | None = None
    runs: tuple[SavedRun, ...] = ()
    live: Mapping[str, Any] | None = None
    comparison: CompareReport | None = None
    pictures: Mapping[str, SamplePicture] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        remedy = "give the evaluation of this data, or leave it out to have it made"
        if self.evaluation.knobs != self.table.knob_space.to_dict():
            raise KnobSpaceError(
                f"the evaluation is of other knobs ({self.evaluation.knobs}) than the data ({self.table.knob_space}); "
                f"{remedy}"
            )
        counts, split = self.evaluation.counts, self.evaluation.split
        evaluated = counts["evaluated_samples"] + counts["left_out_incomplete"]
        here = (self.table.split or ()).count(split)
        if evaluated != here:
            raise DataError(f"the evaluation is of {evaluated} {split} samples, and the data has {here}; {remedy}")


def options_of(evaluation: EvaluationReport) -> EvaluationOptions:
    """The options of an evaluation, as far as the controllers' choices depend on them."""
    given = evaluation.options
    return EvaluationOptions(
        split=evaluation.split, budget_shares=tuple(given["budget_shares"]), price=given["price"],
        guard_quantile=given["guard_quantile"], resamples=1,
    )  # fmt: skip

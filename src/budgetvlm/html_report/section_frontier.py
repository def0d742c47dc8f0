"""Accuracy under a budget, mean latency at equal accuracy, and the tables of all policies."""

from __future__ import annotations

from budgetvlm.comparison.comparison_tables import detail_table, ranking_table
from budgetvlm.evaluation.text_tables import accuracy_table, dataset_tables, equal_accuracy_table, room_table
from budgetvlm.html_report.report_chart import ReportSection
from budgetvlm.html_report.report_inputs import ReportInputs
from budgetvlm.html_report.result_charts import comparison_charts, evaluation_charts


def frontier(inputs: ReportInputs) -> ReportSection:
    """Accuracy against time, with a budget for each request and without one."""
    return ReportSection("frontier", "Accuracy against time", (evaluation_charts(inputs.evaluation),))


def comparison(inputs: ReportInputs) -> ReportSection:
    """All policies as tables, and the policies of `budgetvlm compare` where its result is given."""
    evaluation, compared = inputs.evaluation, inputs.comparison
    values = {
        "tables": [
            accuracy_table(evaluation),
            *dataset_tables(evaluation.policies),
            room_table(evaluation),
            equal_accuracy_table(evaluation),
        ],
        "compared": [ranking_table(compared), detail_table(compared)] if compared else [],
    }
    charts = (comparison_charts(compared),) if compared else ()
    return ReportSection("comparison", "Comparison with everything simple", charts, values)

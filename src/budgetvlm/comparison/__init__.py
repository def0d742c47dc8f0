"""Every policy on one table, on identical splits, budgets and guard, with paired intervals: `budgetvlm compare`."""

from budgetvlm.comparison.compare_options import SECTIONS, CompareOptions
from budgetvlm.comparison.comparison_records import CompareReport
from budgetvlm.comparison.runner import compare

__all__ = ["SECTIONS", "CompareOptions", "CompareReport", "compare"]

"""Every policy on one table, on identical splits, budgets and guard, with paired intervals: `budgetvlm compare`."""

from budgetvlm.compare.options import SECTIONS, CompareOptions
from budgetvlm.compare.report import CompareReport
from budgetvlm.compare.run import compare

__all__ = ["SECTIONS", "CompareOptions", "CompareReport", "compare"]

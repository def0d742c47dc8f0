"""All policies on one table, on identical splits, budgets and guard, with paired intervals: `budgetvlm compare`."""

from budgetvlm.comparison.compare_options import SECTIONS, CompareOptions
from budgetvlm.comparison.comparison_records import CompareReport
from budgetvlm.comparison.fitting_data import FittingData
from budgetvlm.comparison.roster import ROSTER, Entry
from budgetvlm.comparison.runner import compare

__all__ = ["ROSTER", "SECTIONS", "CompareOptions", "CompareReport", "Entry", "FittingData", "compare"]

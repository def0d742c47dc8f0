"""Policies besides the controller: simple ones, predictors, and bounds on what is possible.

Every policy chooses among the same feasible settings. `GroupLookup` and `Oracle` read the labels or outcomes of the
evaluated table itself, so they are bounds and never competitors.
"""

from budgetvlm.policies.hindsight import GroupLookup, Oracle, group_keys
from budgetvlm.policies.simple import (
    Cheapest,
    Full,
    LookupTable,
    RandomFeasible,
    Restricted,
    free_settings,
)
from budgetvlm.policies.states import Policy, States

__all__ = [
    "Cheapest",
    "Full",
    "GroupLookup",
    "LookupTable",
    "Oracle",
    "Policy",
    "RandomFeasible",
    "Restricted",
    "States",
    "free_settings",
    "group_keys",
]

"""Policies: from states to settings. What the controller is measured against, and the bounds on what is possible.

Shapes: B states, K settings, S samples of the evaluated table. Every policy chooses among the same feasible settings.
`GroupLookup` and `Oracle` look at the evaluated table itself (labels, outcomes): they are bounds, never competitors.
Those that are learnt with other libraries import these only to fit them.
"""

from budgetvlm.policies.hindsight import GroupLookup, Oracle, group_keys
from budgetvlm.policies.simple import (
    BestStatic,
    Cheapest,
    Full,
    Greedy,
    LookupTable,
    RandomFeasible,
    Restricted,
    free_settings,
)
from budgetvlm.policies.states import Policy, States

__all__ = [
    "BestStatic",
    "Cheapest",
    "Full",
    "Greedy",
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

"""Policies: from states to settings. What the controller is measured against, and the bounds on what is possible.

Shapes: B states, K settings, S samples of the evaluated table. Every policy chooses among the same feasible settings.
`GroupLookup` and `Oracle` look at the evaluated table itself (labels, outcomes): they are bounds, never competitors.
Those that are learnt with other libraries are in `budgetvlm.baselines`, which imports the libraries only to fit them.
"""

from budgetvlm.baselines.bounds import GroupLookup, Oracle, group_keys
from budgetvlm.baselines.simple import (
    BestStatic,
    Cheapest,
    Full,
    Greedy,
    LookupTable,
    RandomFeasible,
    Restricted,
    free_settings,
)
from budgetvlm.baselines.states import Policy, States
from budgetvlm.baselines.trained import ControllerPolicy

__all__ = [
    "BestStatic",
    "Cheapest",
    "ControllerPolicy",
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

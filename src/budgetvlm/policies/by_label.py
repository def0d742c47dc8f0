"""One policy for each value of a label, for example a controller of its own for each data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from budgetvlm.policies.states import Policy, States


@dataclass(frozen=True, eq=False)
class ByLabel:
    """Lets the policy of each sample's label choose.

    Attributes:
        label: of the evaluated table. policies: one for each of its values.
    """

    label: str
    policies: Mapping[str, Policy]
    name: str = "by label"

    def choose(self, states: States) -> np.ndarray:
        labels = np.array(states.table.groups[self.label])[states.sample_index]
        chosen = np.empty(len(labels), dtype=np.int64)
        for value in np.unique(labels).tolist():
            rows = np.flatnonzero(labels == value)
            chosen[rows] = self.policies[value].choose(states.rows(rows))
        return chosen

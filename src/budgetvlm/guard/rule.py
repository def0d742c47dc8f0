"""What a guard may do about a request: a rule that is handed in."""

from __future__ import annotations

from typing import Literal, NamedTuple

Infeasible = Literal["fastest", "reject", "best_effort"]
"""What is done where no setting is sure to keep the budget, see `AdaptiveVLM.generate`."""


class Rule(NamedTuple):
    """How a guard keeps a budget.

    Attributes:
        revises: the choice is revised once the image is encoded.
        cuts: an answer stops before a token that would be late.
        hurries: an answer that would be late goes on with fewer experts and blocks.
        learns: every finished request moves the bounds.
        expected_only: a setting is allowed where its expected time keeps the budget; nothing is promised.
    """

    revises: bool = True
    cuts: bool = True
    hurries: bool = True
    learns: bool = True
    expected_only: bool = False

    def for_model(self, can_revise: bool) -> Rule:
        """Return what of this can be done about requests to a model that may not be able to revise one under way."""
        return self if can_revise else self._replace(revises=False, hurries=False)


GUARDED = Rule()
"""What a guard does if nothing else is said."""
UNGUARDED = Rule(revises=False, cuts=False, hurries=False, learns=False, expected_only=True)
"""What a system without a guard does, for comparison: settings are allowed that keep the budget on average."""

"""What a training run keeps: what GRPO made, or what it started from.

On few validation samples the best of many epochs is best by luck. So the start is kept unless what GRPO made is better
by more than chance explains, paired over groups (`budgetvlm.policies.evidence`). The start itself is the settings'
means where nothing that the features tell was found (`budgetvlm.policies.teachers`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from budgetvlm.controller.ensemble import merge
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.training_run import TrainingRun
from budgetvlm.policies.evidence import mean_and_margin


@dataclass(frozen=True, eq=False)
class Kept:
    """The controller that a run leaves.

    Attributes:
        controller: of one member, or the average of several, in evaluation mode.
        epoch: the last one whose weights are in it, 0 for a start. figures: on the validation samples.
        why: one sentence.
    """

    controller: GRPOController
    epoch: int
    figures: dict[str, float | None]
    why: str


def keep(run: TrainingRun) -> Kept:
    """Compare what the run made with its start on its validation samples."""
    start, trained = _merged(run.starts), _merged(run.best_controllers())
    measured = run.validation
    gain, least = mean_and_margin(measured.rewards(trained) - measured.rewards(start), measured.table.units)
    epoch = max(int(member.best["epoch"]) for member in run.members)
    chance = f" ± {least:.4f}" if math.isfinite(least) else f", from a single {measured.table.unit_name}"
    by = f"validation reward {gain:+.4f}{chance}"
    if gain > least:
        why = f"GRPO improved on its start ({by}); the controller of epoch {epoch} is kept"
        return Kept(trained, epoch, measured.measure(trained), why)
    what = "the start is kept"
    if not any(controller.heads.weight.any() for controller in run.starts):
        what += ", which is the lookup table and the best blind mix: the features tell nothing of which setting to use"
    return Kept(start, 0, measured.measure(start), f"GRPO did not improve on its start ({by}); {what}")


def _merged(controllers: Sequence[GRPOController]) -> GRPOController:
    """The controller of one member, or the average of several."""
    return controllers[0] if len(controllers) == 1 else merge(controllers)

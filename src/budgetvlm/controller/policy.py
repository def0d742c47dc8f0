"""A trained controller as a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from budgetvlm.policies.states import States

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController


@dataclass(frozen=True, eq=False)
class ControllerPolicy:
    """A trained controller, choosing its most probable feasible setting."""

    controller: GRPOController
    name: str = "controller"

    def choose(self, states: States) -> np.ndarray:
        import torch

        self.controller.eval()
        with torch.no_grad():
            arrays = (states.image, states.language, states.budget_ms, states.price)
            logits = self.controller(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))
            actions = self.controller.sample_actions(
                logits, deterministic=True, feasible=torch.from_numpy(states.feasible)
            )
        return actions["setting_index"].numpy().astype(np.int64)

"""A trained controller as a policy that can be evaluated and compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from budgetvlm.controller.network import GRPOController
from budgetvlm.policies.states import States


@dataclass(frozen=True, eq=False)
class ControllerPolicy:
    """Chooses the feasible setting that a trained controller prefers."""

    controller: GRPOController
    name: str = "controller"

    def choose(self, states: States) -> np.ndarray:
        self.controller.eval()
        with torch.no_grad():
            arrays = (states.image, states.language, states.budget_ms, states.price)
            logits = self.controller(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))
            actions = self.controller.sample_actions(
                logits, deterministic=True, feasible=torch.from_numpy(states.feasible)
            )
        return actions["setting_index"].numpy().astype(np.int64)

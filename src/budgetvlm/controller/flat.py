"""AdamW and the average of the weights over all parameters side by side, so that an update is few large operations.

Parameter by parameter most of an update's time was spent between operations, not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from budgetvlm.controller import kernels
from budgetvlm.errors import CheckpointError

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of `torch.optim.AdamW`


class FlatAdamW:
    """AdamW on parameters that become views of one tensor, as their gradients are; matrices decay, vectors do not.

    Whoever computes gradients writes them into ``parameter.grad``, all of them before each step.

    Args:
        parameters: trained in place. learning_rate, weight_decay: as in `torch.optim.AdamW`.

    Attributes:
        average: a moving average of the parameters, in their order and shapes.
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rate: float, weight_decay: float):
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        self.parameters, self.learning_rate = [*matrices, *vectors], learning_rate
        self.values = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.gradient, self.mean, self.square = (torch.zeros_like(self.values) for _ in range(3))
        self.averages = self.values.clone()
        self.steps = torch.zeros((), device=self.values.device)
        pairs = zip(self.parameters, self._views(self.values), self._views(self.gradient), strict=True)
        for parameter, value, gradient in pairs:
            parameter.data, parameter.grad = value, gradient
        order = {id(p): view for p, view in zip(self.parameters, self._views(self.averages), strict=True)}
        self.average = [order[id(p)] for p in parameters]
        self.weight_decay, self.decayed = weight_decay, sum(p.numel() for p in matrices)
        self._columns = self.values, self.gradient, self.mean, self.square
        # What the compiled loop takes; None: it cannot.
        self._arrays: tuple[Any, ...] | None = None
        if self.values.is_cpu and self.values.dtype == torch.float32:
            self._arrays = tuple(column.numpy() for column in (*self._columns, self.averages))

    def _views(self, flat: Tensor) -> list[Tensor]:
        """All numbers ``[n]`` in the shapes of the parameters."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def step(self, average_decay: float) -> None:
        """One update, and average = decay x average + (1 - decay) x values."""
        self.steps += 1
        if self._arrays is not None:
            values, gradient, mean, square, averages = self._arrays
            kernels.adamw(
                values, gradient, mean, square, averages, self.decayed, self.steps.item(), self.learning_rate, BETAS,
                self.weight_decay, EPSILON, average_decay,
            )  # fmt: skip
            return
        for part, decay in ((slice(self.decayed), self.weight_decay), (slice(self.decayed, None), 0.0)):
            values, gradient, mean, square = ([column[part]] for column in self._columns)
            # What `torch.optim.AdamW(fused=True)` calls; its own preparations take as long as the arithmetic.
            torch._fused_adamw_(
                values, gradient, mean, square, [], [self.steps], lr=self.learning_rate, beta1=BETAS[0],
                beta2=BETAS[1], weight_decay=decay, eps=EPSILON, amsgrad=False, maximize=False,
            )  # fmt: skip
        self.averages.lerp_(self.values, 1.0 - average_decay)

    def state_dict(self) -> dict[str, Any]:
        """The moments; holds references."""
        return {"mean": self.mean, "square": self.square, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave, or `torch.optim.AdamW` with matrices and vectors as its groups, as it once was."""
        if "param_groups" in state:
            entries = [state["state"][number] for number in sorted(state["state"])]
            mean, square = (torch.cat([e[name].reshape(-1) for e in entries]) for name in ("exp_avg", "exp_avg_sq"))
            state = {"mean": mean, "square": square, "steps": entries[0]["step"]}
        if state["mean"].shape != self.mean.shape:
            raise CheckpointError(
                f"the optimiser's state is of {len(state['mean'])} numbers, but {len(self.mean)} are trained; begin "
                "anew with --overwrite"
            )
        for name, value in state.items():
            getattr(self, name).copy_(value)

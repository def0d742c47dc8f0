"""Linear layers of several networks of one shape, evaluated and trained by one batched product.

Shapes: M networks, B rows, D inputs, H outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """Copies of the linear layers of M networks.

    Attributes:
        weight: ``[M, D, H]``, transposed, because the product and its gradient then need no copies. bias: ``[M, H]``.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().t() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply network m to row block m, ``[M, B, D]`` -> ``[M, B, H]``."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)

    @torch.no_grad()
    def copy_to(self, member: int, layer: nn.Linear) -> None:
        """Write one network's weight and bias into a linear layer of its shape."""
        layer.weight.copy_(self.weight[member].t())
        layer.bias.copy_(self.bias[member])

    def keep(self, members: Tensor) -> None:
        """Drop the layers of all but these networks, int64 ``[m]``."""
        self.weight = nn.Parameter(self.weight.detach()[members])
        self.bias = nn.Parameter(self.bias.detach()[members])


class FastDropout(nn.Dropout):
    """`torch.nn.Dropout` with its mask drawn by `torch.rand`, which takes a fourth of the time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero each number with probability p while training, and scale the others to the same mean."""
        if not self.training or self.p == 0.0:
            return x
        return x * torch.rand_like(x).ge_(self.p).div_(1.0 - self.p)


def decay_groups(parameters: Sequence[Tensor], vector_dimensions: int = 1) -> list[dict[str, object]]:
    """Parameter groups for `torch.optim.AdamW` in which biases do not decay.

    ``vector_dimensions`` is the number of dimensions of a bias: 1 for a single network, 2 for stacked ones.
    """
    biases = [p for p in parameters if p.ndim <= vector_dimensions]
    return [
        {"params": [p for p in parameters if p.ndim > vector_dimensions]},
        {"params": biases, "weight_decay": 0.0},
    ]


def stack_networks(networks: Sequence[nn.Sequential]) -> nn.Sequential:
    """M perceptrons of one shape as one network on ``[M, B, D]``; their other layers must have no parameters."""
    layers: list[nn.Module] = []
    for parts in zip(*networks, strict=True):
        linear = [part for part in parts if isinstance(part, nn.Linear)]
        if linear:
            layers.append(StackedLinear(linear))
        else:
            layers.append(FastDropout(parts[0].p) if isinstance(parts[0], nn.Dropout) else parts[0])
    return nn.Sequential(*layers)


def unstack_networks(stack: nn.Sequential, networks: Sequence[nn.Sequential]) -> None:
    """Write the weights of `stack_networks`' result back into the networks it was made from."""
    for layer, parts in zip(stack, zip(*networks, strict=True), strict=True):
        if isinstance(layer, StackedLinear):
            for member, part in enumerate(parts):
                layer.copy_to(member, part)

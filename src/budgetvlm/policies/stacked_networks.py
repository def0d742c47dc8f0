"""Several networks of one shape, evaluated and trained at once by batched products.

Each has its own order of samples and its own early stopping.
Shapes: M networks, S samples, B rows of a batch, D inputs, H outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from budgetvlm._threads import torch_threads


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


WORTH_SHARING = 6e7  # samples x weights of an update above which several threads pay


@dataclass(frozen=True)
class SupervisedOptions:
    """AdamW and its schedule; ``patience`` counts epochs without a smaller validation loss."""

    lr: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 256
    num_epochs: int = 60
    patience: int = 8


def train_stacked(
    parameters: Sequence[Tensor],
    num_samples: int,
    loss: Callable[[Tensor], Tensor],
    validate: Callable[[], Tensor],
    options: SupervisedOptions,
) -> Tensor:
    """Train M networks until none has improved for ``patience`` epochs, and leave each with its best epoch's weights.

    Args:
        parameters: of all networks, ``[M, ...]`` each; trained in place.
        loss: from rows ``[M, B]`` of the training samples to the networks' losses ``[M]``.
        validate: the networks' validation losses ``[M]``.

    Returns:
        The smallest validation losses ``[M]``.
    """
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)
    best = validate()
    kept = [parameter.detach().clone() for parameter in parameters]
    since = torch.zeros_like(best)
    weights = sum(parameter.numel() for parameter in parameters)
    with torch_threads(1 if options.batch_size * weights < WORTH_SHARING else None):
        for _ in range(options.num_epochs):
            order = torch.rand(len(best), num_samples).argsort(dim=1).to(best.device)
            for rows in order.split(options.batch_size, dim=1):
                optimizer.zero_grad()
                loss(rows).sum().backward()
                optimizer.step()
            now = validate()
            better = now < best
            best, since = torch.where(better, now, best), torch.where(better, 0.0, since + 1.0)
            for copy, parameter in zip(kept, parameters, strict=True):
                copy[better] = parameter.detach()[better]
            if bool((since >= options.patience).all()):
                break
    with torch.no_grad():
        for copy, parameter in zip(kept, parameters, strict=True):
            parameter.copy_(copy)
    return best

"""Supervised training of several networks at once, each with its own order of samples and its own early stopping.

Shapes: M networks, S samples, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from budgetvlm._threads import torch_threads

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

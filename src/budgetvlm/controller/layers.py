"""Input layers of the controller: standardised features, and embedded positive numbers (budget and price)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn

from budgetvlm.errors import ConfigError
from budgetvlm.guard.static import InputBounds
from budgetvlm.knobs import KnobSpace

PART = 65_536  # rows that are converted to float64 at once: all of them would dominate the memory of a training
LARGEST_SCORE = 8.0  # standardised features are clipped here, so that an odd image cannot blow up the network


class Standardiser(nn.Module):
    """Computes (x - mean) / std, optionally followed by a projection on ``out_dim`` principal components.

    Everything is a buffer and nothing is learnt. An unfitted layer passes its input through. Raw features go in, so a
    checkpoint needs no separate preprocessing.

    Args:
        in_dim: D, width of the raw features.
        out_dim: number of principal components kept; None keeps all features as they are.
    """

    mean: Tensor
    std: Tensor
    components: Tensor | None
    component_std: Tensor | None

    def __init__(self, in_dim: int, out_dim: int | None = None):
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = in_dim if out_dim is None else min(out_dim, in_dim)
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        self.register_buffer("components", None if out_dim is None else torch.eye(in_dim, self.out_dim))
        self.register_buffer("component_std", None if out_dim is None else torch.ones(self.out_dim))

    @torch.no_grad()
    def fit(self, x: Tensor, rows: Tensor | None = None) -> None:
        """Fit on features ``[S, D]``, or on some rows of them, one part after the other.

        A feature that never varies gets std 1, so it becomes 0. Components are those of the standardised features,
        scaled to unit variance; if there are fewer samples than components, the remaining ones stay 0.

        Raises:
            ConfigError: a feature that is not a finite number.
        """
        numbers = torch.arange(len(x), device=x.device) if rows is None else rows
        parts, count = numbers.split(PART), len(numbers)
        largest = torch.stack([x[part].abs().amax(dim=0) for part in parts]).amax(dim=0)
        if not bool(torch.isfinite(largest).all()):
            raise ConfigError("the features hold NaN or infinite numbers; extract them again")
        mean = _summed(x[part].double().sum(dim=0) for part in parts) / count
        std = (_summed((x[part].double() - mean).square().sum(dim=0) for part in parts) / count).sqrt()
        std = torch.where(std > 1e-6 * (1.0 + largest), std, torch.ones_like(std))
        self.mean.copy_(mean)
        self.std.copy_(std)
        if self.components is not None:
            scores = ((x[part].double() - mean) / std for part in parts)
            self._fit_components(_summed(z.T @ z for z in scores) / count)

    def _fit_components(self, covariance: Tensor) -> None:
        """Set the principal components of standardised features from their covariance ``[D, D]``."""
        assert self.components is not None and self.component_std is not None
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0)[: self.out_dim], vectors.flip(1)[:, : self.out_dim]
        known = values > 1e-9 * values[0].clamp(min=1e-30)
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        self.components.copy_(vectors * largest.sign() * known)  # the sign is fixed, so equal data give equal bits
        self.component_std.copy_(torch.where(known, values.clamp(min=0.0).sqrt(), torch.ones_like(values)))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise raw features, ``[B, D]`` -> ``[B, out_dim]``."""
        z = (x - self.mean).div_(
            self.std
        )  # in place, because for many rows allocating takes longer than the arithmetic
        if self.components is not None and self.component_std is not None:
            z = (z @ self.components).div_(self.component_std)
        return z.clamp_(-LARGEST_SCORE, LARGEST_SCORE)


class BoundsLayer(nn.Module):
    """Latency bounds that depend on the input: `budgetvlm.guard.static.InputBounds` as buffers.

    Args:
        in_dim: D, width of the raw features, image and language side by side.
        num_settings: K.
    """

    center: Tensor
    weight: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, in_dim: int, num_settings: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(in_dim))
        self.register_buffer("weight", torch.zeros(in_dim, num_settings))
        for name in ("bias", "low", "high"):
            self.register_buffer(name, torch.zeros(num_settings))

    @torch.no_grad()
    def copy(self, bounds: InputBounds) -> None:
        """Take over fitted bounds."""
        for name, buffer in self.named_buffers():
            buffer.copy_(torch.from_numpy(getattr(bounds, name)))

    def forward(self, image: Tensor, language: Tensor) -> Tensor:
        """Bounds in ms for raw features ``[B, Di]`` and ``[B, Dl]``, ``[B, K]``; many rows one part after the other."""
        pairs = zip(image.split(PART), language.split(PART), strict=True)
        parts = [(torch.cat(pair, dim=-1) - self.center) @ self.weight + self.bias for pair in pairs]
        return torch.cat(parts).clamp(self.low, self.high).exp()


def _summed(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


class LogEmbedding(nn.Module):
    """Embeds the logarithm of a positive ratio: sines and cosines of several frequencies, then a linear layer.

    Args:
        width: width of the embedding.
        num_frequencies: frequencies pi/4, pi/2, pi, ... per unit of the natural logarithm.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 6):
        super().__init__()
        frequencies = math.pi / 4 * 2.0 ** torch.arange(num_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear = nn.Linear(2 * num_frequencies + 1, width)

    def basis(self, log_ratio: Tensor) -> Tensor:
        """The logarithm, its sines and its cosines, ``[B]`` -> ``[B, 2 * num_frequencies + 1]``; nothing is learnt."""
        angles = log_ratio[..., None] * self.frequencies
        return torch.cat([log_ratio[..., None], angles.sin(), angles.cos()], dim=-1)

    def forward(self, basis: Tensor) -> Tensor:
        """Embed what `basis` computes, ``[B, 2 * num_frequencies + 1]`` -> ``[B, width]``."""
        return torch.nn.functional.silu(self.linear(basis))


def head_sum_matrix(space: KnobSpace) -> Tensor:
    """Which outputs of the knobs' heads each setting adds up: 0 or 1, ``[sum(sizes), K]``."""
    matrix = torch.zeros(sum(space.sizes), space.num_settings)
    offset = 0
    for column, size in enumerate(space.sizes):
        matrix[offset + torch.from_numpy(space.value_indices[:, column]), torch.arange(len(space))] = 1.0
        offset += size
    return matrix

"""One decision, quickly: a trained controller as a few NumPy products, for requests that come one at a time.

PyTorch spends most of a decision's time on starting its many small operations. Here what is fixed after training is
folded together once: the heads with their sum over the knobs, the embeddings with the layers that read them. The
choices are those of `GRPOController.sample_actions(..., deterministic=True)`; a test holds both against each other.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from budgetvlm.controller.layers import LARGEST_SCORE, LogEmbedding, Standardiser
from budgetvlm.controller.network import LARGEST_LOG_RATIO, SMALLEST_PRICE, GRPOController
from budgetvlm.errors import InputError

MOST_BLOCKS = 64  # members of an ensemble that are looked for


class Decider:
    """Chooses a setting for one state at a time.

    Args:
        controller: trained; later changes to it are not seen.
    """

    def __init__(self, controller: GRPOController) -> None:
        self._image, self._language = _Input(controller.image_input), _Input(controller.lang_input)
        self._feature_layer = _affine(controller.feature_layer)
        self._embeddings = _Embedding(controller.budget_embedding), _Embedding(controller.price_embedding)
        self._context_layer = _affine(controller.context_layer)
        self._hidden = [_Blocks(layer) for layer in controller.trunk if isinstance(layer, nn.Linear)]
        self._heads = _summed_heads(controller)
        self._reference_ms = float(controller.latency_reference_ms)
        self._default_price = float(controller.default_price)
        self._latency_share = _array(controller.latency_ms) / self._reference_ms
        self._bounds_ms = _array(controller.bounds_ms)
        finite = self._bounds_ms[np.isfinite(self._bounds_ms)]
        self._largest_ms = float(finite.max()) if finite.size and finite.max() > 0 else math.inf
        self._cheapest = int(self._bounds_ms.argmin())

    def feasible(self, budget_ms: float) -> np.ndarray:
        """Which settings' bounds lie within a budget, bool ``[K]``."""
        return np.isfinite(self._bounds_ms) & (self._bounds_ms <= budget_ms)

    def values(self, image: np.ndarray, language: np.ndarray, budget_ms: float, price: float | None) -> np.ndarray:
        """The value of every setting less what the price takes off, on the accuracy scale, float32 ``[K]``.

        Args:
            image, language: raw features ``[Di]`` and ``[Dl]``, float32.

        Raises:
            InputError: features of another width.
        """
        price = self._default_price if price is None else price
        weight, bias = self._feature_layer
        features = np.concatenate([self._image(image, "image"), self._language(language, "language")])
        hidden = weight @ features + bias + self._context(budget_ms, price)
        for layer in self._hidden:
            hidden = layer(_silu(hidden))
        weight, bias = self._heads
        out: np.ndarray = weight @ _silu(hidden) + bias - np.float32(price) * self._latency_share
        return out

    def choose(
        self,
        image: np.ndarray,
        language: np.ndarray,
        budget_ms: float,
        price: float | None = None,
        feasible: np.ndarray | None = None,
    ) -> int:
        """Number of the best setting among ``feasible`` (bool ``[K]``; None: what the bounds allow).

        Where nothing is feasible it is the setting with the smallest bound. Raises InputError as `values` does.
        """
        allowed = self.feasible(budget_ms) if feasible is None else feasible
        if not allowed.any():
            return self._cheapest
        return int(np.where(allowed, self.values(image, language, budget_ms, price), -np.inf).argmax())

    def _context(self, budget_ms: float, price: float) -> np.ndarray:
        limit = min(budget_ms, self._largest_ms)
        budget_log = math.log(limit / self._reference_ms) if limit < math.inf else LARGEST_LOG_RATIO
        price_log = math.log(max(price, SMALLEST_PRICE) / 0.1)
        budget, cost = self._embeddings
        budget_log = max(-LARGEST_LOG_RATIO, min(budget_log, LARGEST_LOG_RATIO))
        embedded = np.concatenate([budget(budget_log), cost(min(price_log, LARGEST_LOG_RATIO))])
        weight, bias = self._context_layer
        out: np.ndarray = weight @ embedded + bias
        return out


class _Input:
    """`Standardiser` for one state."""

    def __init__(self, layer: Standardiser) -> None:
        self.mean, self.scale = _array(layer.mean), 1.0 / _array(layer.std)
        self.components: np.ndarray | None = None
        if layer.components is not None and layer.component_std is not None:
            self.components = np.ascontiguousarray((_array(layer.components) / _array(layer.component_std)).T)

    def __call__(self, raw: np.ndarray, what: str) -> np.ndarray:
        if raw.shape != self.mean.shape:
            raise InputError(
                f"the {what} feature has shape {list(raw.shape)}, but this controller was built for "
                f"{len(self.mean)} {what} features; use features of the model that it was trained with"
            )
        z = (raw - self.mean) * self.scale
        if self.components is not None:
            z = self.components @ z
        return z.clip(-LARGEST_SCORE, LARGEST_SCORE)


class _Embedding:
    """`LogEmbedding` for one number."""

    def __init__(self, layer: LogEmbedding) -> None:
        self.frequencies = _array(layer.frequencies)
        self.weight, self.bias = _affine(layer.linear)

    def __call__(self, log_ratio: float) -> np.ndarray:
        angles = log_ratio * self.frequencies
        basis = np.concatenate([[np.float32(log_ratio)], np.sin(angles), np.cos(angles)], dtype=np.float32)
        return _silu(self.weight @ basis + self.bias)


class _Blocks:
    """A square layer; where it is an ensemble's, only the members' own blocks are multiplied."""

    def __init__(self, layer: nn.Linear) -> None:
        weight, self.bias = _affine(layer)
        count = _num_blocks(weight)
        size = len(weight) // count
        blocks = [weight[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
        self.weight = np.ascontiguousarray(np.stack(blocks))

    def __call__(self, hidden: np.ndarray) -> np.ndarray:
        if len(self.weight) == 1:
            single: np.ndarray = self.weight[0] @ hidden + self.bias
            return single
        out: np.ndarray = np.matmul(self.weight, hidden.reshape(len(self.weight), -1, 1)).reshape(-1) + self.bias
        return out


def _num_blocks(weight: np.ndarray) -> int:
    """The largest number of equal blocks on the diagonal of ``[H, H]`` outside which all is zero."""
    row, column = np.nonzero(weight)
    width = len(weight)
    counts = (count for count in range(min(width, MOST_BLOCKS), 1, -1) if width % count == 0)
    return next((n for n in counts if len(row) and (row * n // width == column * n // width).all()), 1)


def _summed_heads(controller: GRPOController) -> tuple[np.ndarray, np.ndarray]:
    """The heads and the joint term as one layer with an output a setting, ``[K, H]`` and ``[K]``."""
    weight, bias = _affine(controller.heads)
    head_sum = _array(controller.head_sum)
    split = len(head_sum)
    return weight[split:] + head_sum.T @ weight[:split], bias[split:] + head_sum.T @ bias[:split]


def _affine(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return _array(layer.weight), _array(layer.bias)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy().copy())


def _silu(x: np.ndarray) -> np.ndarray:
    out: np.ndarray = x / (1.0 + np.exp(-x))
    return out

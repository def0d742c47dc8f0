"""One decision, quickly: a trained controller as a few NumPy products, for requests that come one at a time.

PyTorch spends most of a decision's time on starting its many small operations. Here what is fixed after training is
folded together once: the heads with their sum over the knobs, the embeddings with the layers that read them. The
choices are those of `GRPOController.sample_actions(..., deterministic=True)`; a test holds both against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import nn

from budgetvlm.controller.layers import LARGEST_SCORE, LogEmbedding, Standardiser
from budgetvlm.controller.network import LARGEST_LOG_RATIO, SMALLEST_PRICE, GRPOController
from budgetvlm.errors import InputError

MOST_BLOCKS = 64  # members of an ensemble that are looked for


class Decider:
    """Chooses a setting for one state at a time. May be called by several threads.

    Hidden numbers are kept with the other sign: silu(h) = h / (1 + exp(-h)) is then one operation less.

    Args:
        controller: trained; later changes to it are not seen.
    """

    def __init__(self, controller: GRPOController) -> None:
        self._inputs = _Inputs(controller)
        feature_weight, feature_bias = _affine(controller.feature_layer)
        context_weight, context_bias = _affine(controller.context_layer)
        width = controller.budget_embedding.linear.out_features
        self._budget, self._price = _Embedding(controller.budget_embedding), _Embedding(controller.price_embedding)
        self._first = -np.concatenate([feature_weight, context_weight[:, :width]], axis=1)
        self._price_weight, self._first_bias = context_weight[:, width:], feature_bias + context_bias
        self._hidden = [_Blocks(layer) for layer in controller.trunk if isinstance(layer, nn.Linear)]
        weight, self._head_bias = _summed_heads(controller)
        self._heads = -weight
        self._reference_ms = float(controller.latency_reference_ms)
        self._default_price = float(controller.default_price)
        self._latency_share = _array(controller.latency_ms) / self._reference_ms
        bounds_ms = _array(controller.bounds_ms)
        finite = bounds_ms[np.isfinite(bounds_ms)]
        self._bounds_ms = np.where(np.isfinite(bounds_ms), bounds_ms, np.nan)  # NaN lies within no budget
        self._largest_ms = float(finite.max()) if finite.size and finite.max() > 0 else math.inf
        self._cheapest = int(bounds_ms.argmin())
        self._priced = self._at_price(self._default_price)

    def feasible(self, budget_ms: float) -> np.ndarray:
        """Which settings' bounds lie within a budget, bool ``[K]``."""
        out: np.ndarray = self._bounds_ms <= budget_ms
        return out

    def values(self, image: np.ndarray, language: np.ndarray, budget_ms: float, price: float | None) -> np.ndarray:
        """The value of every setting less what the price takes off, on the accuracy scale, float32 ``[K]``.

        Args:
            image, language: raw features ``[Di]`` and ``[Dl]``, float32.

        Raises:
            InputError: features of another width.
        """
        price = self._default_price if price is None else price
        priced = self._priced
        if priced.price != price:
            self._priced = priced = self._at_price(price)
        hidden = self._first.dot(self._inputs(image, language, self._budget(self._budget_log(budget_ms))))
        hidden -= priced.hidden
        for layer in self._hidden:
            hidden = layer(_silu_of_minus(hidden))
        out: np.ndarray = self._heads.dot(_silu_of_minus(hidden))
        out += priced.values
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
        allowed = (self.feasible(budget_ms) if feasible is None else feasible).nonzero()[0]
        if not len(allowed):
            return self._cheapest
        return int(allowed[self.values(image, language, budget_ms, price)[allowed].argmax()])

    def _budget_log(self, budget_ms: float) -> float:
        limit = min(budget_ms, self._largest_ms)
        budget_log = math.log(limit / self._reference_ms) if limit < math.inf else LARGEST_LOG_RATIO
        return max(-LARGEST_LOG_RATIO, min(budget_log, LARGEST_LOG_RATIO))

    def _at_price(self, price: float) -> _Priced:
        price_log = min(math.log(max(price, SMALLEST_PRICE) / 0.1), LARGEST_LOG_RATIO)
        hidden = self._price_weight @ self._price(price_log) + self._first_bias
        return _Priced(price, hidden, self._head_bias - np.float32(price) * self._latency_share)


@dataclass(frozen=True, eq=False)
class _Priced:
    """What follows from the price alone: most requests have the same.

    Attributes:
        hidden: its share of the first hidden layer, with both biases, ``[H]``.
        values: what it takes off, and the heads' bias, ``[K]``.
    """

    price: float
    hidden: np.ndarray
    values: np.ndarray


class _Inputs:
    """`Standardiser` of both features for one state, with the budget's embedding behind them."""

    def __init__(self, controller: GRPOController) -> None:
        layers = controller.image_input, controller.lang_input
        self._split = len(layers[0].mean)
        self._mean = np.concatenate([_array(layer.mean) for layer in layers])
        self._scale = np.concatenate([1.0 / _array(layer.std) for layer in layers])
        self._components = [_components(layer) for layer in layers if layer.components is not None]
        width = sum(layer.out_dim for layer in layers)
        self._most = np.full(width, LARGEST_SCORE, dtype=np.float32)
        self._least = -self._most

    def __call__(self, image: np.ndarray, language: np.ndarray, budget: np.ndarray) -> np.ndarray:
        split = self._split
        if image.shape != (split,) or language.shape != (len(self._mean) - split,):
            self._complain(image, language)
        z = np.concatenate((image, language))
        z -= self._mean
        z *= self._scale
        if self._components:
            ours, theirs = self._components
            z = np.concatenate((ours.dot(z[:split]), theirs.dot(z[split:])))
        np.minimum(z, self._most, out=z)
        np.maximum(z, self._least, out=z)
        return np.concatenate((z, budget))

    def _complain(self, image: np.ndarray, language: np.ndarray) -> NoReturn:
        widths = self._split, len(self._mean) - self._split
        what, raw, width = ("image", image, widths[0])
        if image.shape == (widths[0],):
            what, raw, width = ("language", language, widths[1])
        raise InputError(
            f"the {what} feature has shape {list(raw.shape)}, but this controller was built for {width} {what} "
            "features; use features of the model that it was trained with"
        )


def _components(layer: Standardiser) -> np.ndarray:
    """Standardised features -> components of unit variance, ``[out_dim, D]``."""
    assert layer.components is not None and layer.component_std is not None
    return np.ascontiguousarray((_array(layer.components) / _array(layer.component_std)).T)


class _Embedding:
    """`LogEmbedding` for one number; a cosine is a sine a quarter of a turn later."""

    def __init__(self, layer: LogEmbedding) -> None:
        frequencies = _array(layer.frequencies).astype(np.float64)
        weight, bias = _affine(layer.linear)
        self._frequencies = np.concatenate([frequencies, frequencies])
        self._phases = np.repeat([0.0, np.pi / 2], len(frequencies))
        # The number itself and the bias are columns as well.
        self._weight = -np.concatenate([weight[:, 1:], weight[:, :1], bias[:, None]], axis=1).astype(np.float64)
        self._width = 2 * len(frequencies)

    def __call__(self, log_ratio: float) -> np.ndarray:
        basis = np.empty(self._width + 2)
        angles = basis[: self._width]
        np.multiply(self._frequencies, log_ratio, out=angles)
        angles += self._phases
        np.sin(angles, out=angles)
        basis[-2:] = log_ratio, 1.0
        minus = self._weight.dot(basis)
        return (-_silu_of_minus(minus)).astype(np.float32)


class _Blocks:
    """A square layer; where it is an ensemble's, only the members' own blocks are multiplied. Signs: see `Decider`."""

    def __init__(self, layer: nn.Linear) -> None:
        weight, self.bias = _affine(layer)
        count = _num_blocks(weight)
        size = len(weight) // count
        blocks = [weight[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
        self.weight = np.ascontiguousarray(np.stack(blocks))

    def __call__(self, hidden: np.ndarray) -> np.ndarray:
        if len(self.weight) == 1:
            out: np.ndarray = self.weight[0].dot(hidden)
        else:
            out = np.matmul(self.weight, hidden.reshape(len(self.weight), -1, 1)).reshape(-1)
        out -= self.bias
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


def _silu_of_minus(minus: np.ndarray) -> np.ndarray:
    """-h -> -silu(h), in place."""
    below = np.exp(minus)
    below += 1.0
    minus /= below
    return minus

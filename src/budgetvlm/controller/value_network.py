"""A trained controller's values for one request at a time, in NumPy.

PyTorch spends most of a decision's time on starting its many small operations. Here what is fixed after training is
folded together once: the heads with their sum over the knobs, the embeddings with the layers that read them. The
choices are those of `GRPOController.sample_actions(..., deterministic=True)`; a test holds both against each other.
`budgetvlm.guard.kernels.network_values` computes `ValueNetwork.values` in compiled loops.

Shapes: Di, Dl features, F of them standardised, C functions of a budget, E numbers embed it, H hidden, K settings.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

from budgetvlm.controller.known_terms import known_terms
from budgetvlm.controller.layers import LARGEST_SCORE, LogEmbedding, Standardiser
from budgetvlm.controller.network import LARGEST_LOG_RATIO, SMALLEST_PRICE, GRPOController
from budgetvlm.errors import InputError

MAX_MEMBERS = 64  # of an ensemble, that are looked for


class NetworkWeights(NamedTuple):
    """A controller's weights at one price; arrays are float32.

    Attributes:
        mean, scale: of the features, which are standardised so, ``[F]``.
        frequencies, embedding: of the budget's logarithm, ``[C]`` and ``[2 C + 2, E]``.
        first, first_bias: from standardised features and the embedded budget, ``[F + E, H]``; the bias holds the price.
        hidden, hidden_bias: square layers as n blocks on their diagonals, ``[layers, n, H / n, H / n]`` and
            ``[layers, H]``.
        heads, head_bias: ``[H, K]`` and ``[K]``; what the price takes off is in the bias.
        reference_ms, largest_budget_ms: the full setting's median time, and the largest bound.
        largest_log_ratio, largest_score: limits of the budget's logarithm and of a standardised feature.
        least_log_ratio: the other limit of the budget's logarithm.
    """

    mean: np.ndarray
    scale: np.ndarray
    frequencies: np.ndarray
    embedding: np.ndarray
    first: np.ndarray
    first_bias: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    heads: np.ndarray
    head_bias: np.ndarray
    reference_ms: float
    largest_budget_ms: float
    largest_log_ratio: float
    largest_score: np.float32
    least_log_ratio: float


class ValueNetwork:
    """The values of a controller for one state at a time. May be called by several threads.

    Attributes:
        default_price: the controller's own price.
        known_terms: the budgets and prices that it was trained on; beyond them it is told the nearest.
        known_ms: the same budgets, in ms.
        default_weights, default_tuple: at it, as a record and as compiled loops take them.
        projects: whether features are projected before the network takes them.

    Args:
        controller: trained; later changes to it are not seen.
    """

    def __init__(self, controller: GRPOController) -> None:
        inputs = controller.image_input, controller.lang_input
        self._image_shape, self._language_shape = ((layer.in_dim,) for layer in inputs)
        self._projections = [_projection(layer) for layer in inputs if layer.components is not None]
        self.default_price = float(controller.default_price)
        self.known_terms = known_terms(controller)
        self.known_ms = [share * float(controller.latency_reference_ms) for share in self.known_terms.budgets]
        self._latency_share = _array(controller.latency_ms) / float(controller.latency_reference_ms)
        self._price_layer, self._price_context, weights = _folded(controller)
        self._unpriced = weights
        self.projects = bool(self._projections)
        self.default_weights = self._at_price(self.default_price)
        self.default_tuple = tuple(self.default_weights)
        self._priced = self.default_price, self.default_weights

    def values(self, image: np.ndarray, language: np.ndarray, budget_ms: float, price: float | None) -> np.ndarray:
        """The value of every setting less what the price takes off, on the accuracy scale, float32 ``[K]``.

        Args:
            image, language: raw features ``[Di]`` and ``[Dl]``, float32.
            budget_ms: of the machine that was profiled, for the model alone.
            price: accuracy for one latency of the full setting; None: the controller's default.

        Raises:
            InputError: features of another width.
        """
        net = self.weights(price)
        # Standardised features, and beside them the embedded budget.
        features = (np.concatenate(self.inputs(image, language)) - net.mean) * net.scale
        ratio = math.log(min(budget_ms, net.largest_budget_ms) / net.reference_ms)
        budget = _embedded(max(net.least_log_ratio, min(ratio, net.largest_log_ratio)), net.frequencies, net.embedding)
        state = np.concatenate([features.clip(-net.largest_score, net.largest_score), budget])
        # The layers; an ensemble's members are blocks of the hidden ones.
        now = state @ net.first + net.first_bias
        for blocks, bias in zip(net.hidden, net.hidden_bias, strict=True):
            by_block = _silu(now).reshape(len(blocks), -1)
            now = np.einsum("nd,ndh->nh", by_block, blocks).ravel() + bias
        out: np.ndarray = _silu(now) @ net.heads + net.head_bias
        return out

    def inputs(self, image: np.ndarray, language: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raw features as the network takes them: projected, where the controller does that. Raises InputError."""
        if image.shape != self._image_shape or language.shape != self._language_shape:
            self._complain(image, language)
        if self._projections:
            return self._projections[0].dot(image), self._projections[1].dot(language)
        return image, language

    def weights(self, price: float | None) -> NetworkWeights:
        """The weights at this price; those of the last price are kept, because most requests have the same."""
        if price is None:
            return self.default_weights
        priced = self._priced
        if priced[0] != price:
            self._priced = priced = price, self._at_price(price)
        return priced[1]

    def _at_price(self, price: float) -> NetworkWeights:
        least, most = self.known_terms.prices
        told = min(max(price, least), most)
        log_price = min(math.log(max(told, SMALLEST_PRICE) / 0.1), LARGEST_LOG_RATIO)
        net = self._unpriced
        embedded = _embedded(log_price, net.frequencies, self._price_layer)
        return net._replace(
            first_bias=self._price_context @ embedded + net.first_bias,
            head_bias=net.head_bias - np.float32(price) * self._latency_share,
        )

    def _complain(self, image: np.ndarray, language: np.ndarray) -> NoReturn:
        what, raw, wanted = "image", image, self._image_shape
        if image.shape == wanted:
            what, raw, wanted = "language", language, self._language_shape
        raise InputError(
            f"the {what} feature has shape {list(raw.shape)}, but this controller was built for {wanted[0]} {what} "
            "features; use features of the model that it was trained with"
        )


def _folded(controller: GRPOController) -> tuple[np.ndarray, np.ndarray, NetworkWeights]:
    """The layer that embeds a price, what the first layer makes of it ``[H, E]``, and the weights without a price."""
    feature_weight, feature_bias = _affine(controller.feature_layer)
    context_weight, context_bias = _affine(controller.context_layer)
    width = controller.budget_embedding.linear.out_features
    statistics = map(_statistics, (controller.image_input, controller.lang_input))
    mean, scale = (np.concatenate(both) for both in zip(*statistics, strict=True))
    hidden, hidden_bias = _hidden([layer for layer in controller.trunk if isinstance(layer, nn.Linear)])
    heads, head_bias = _summed_heads(controller)
    bounds_ms = _array(controller.bounds_ms)
    largest_ms = max(bounds_ms[np.isfinite(bounds_ms)], default=0.0)
    reference_ms, (least, most) = float(controller.latency_reference_ms), known_terms(controller).budgets
    weights = NetworkWeights(
        mean=mean,
        scale=scale,
        frequencies=_array(controller.price_embedding.frequencies),
        embedding=_embedding(controller.budget_embedding),
        first=_columns(np.concatenate([feature_weight, context_weight[:, :width]], axis=1)),
        first_bias=feature_bias + context_bias,
        hidden=hidden,
        hidden_bias=hidden_bias,
        heads=_columns(heads),
        head_bias=head_bias,
        reference_ms=reference_ms,
        largest_budget_ms=min(float(largest_ms) if largest_ms > 0 else math.inf, most * reference_ms),
        largest_log_ratio=LARGEST_LOG_RATIO,
        largest_score=np.float32(LARGEST_SCORE),
        least_log_ratio=max(math.log(least), -LARGEST_LOG_RATIO) if least > 0 else -LARGEST_LOG_RATIO,
    )
    return _embedding(controller.price_embedding), context_weight[:, width:], weights


def _embedded(log_ratio: float, frequencies: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """`LogEmbedding` of one number, ``[E]``; ``embedding`` is that of `_embedding`."""
    angles = frequencies * np.float32(log_ratio)
    basis = np.concatenate([np.sin(angles), np.cos(angles), np.array([log_ratio, 1.0], dtype=np.float32)])
    return _silu(basis @ embedding)


def _silu(x: np.ndarray) -> np.ndarray:
    out: np.ndarray = x / (1 + np.exp(-x))
    return out


def _statistics(layer: Standardiser) -> tuple[np.ndarray, np.ndarray]:
    """What standardises a feature, ``[F]`` each: its mean and scale; projected components have their own already."""
    if layer.components is None:
        return _array(layer.mean), 1.0 / _array(layer.std)
    shift = (_array(layer.mean) / _array(layer.std)) @ _array(layer.components)
    return shift, 1.0 / _array(layer.component_std)


def _projection(layer: Standardiser) -> np.ndarray:
    """Raw features -> components, not yet centred, ``[F, D]``."""
    return np.ascontiguousarray((_array(layer.components) / _array(layer.std)[:, None]).T)


def _embedding(layer: LogEmbedding) -> np.ndarray:
    """`LogEmbedding`'s weights for sines, cosines, the number itself and 1, ``[2 C + 2, E]``."""
    weight, bias = _affine(layer.linear)
    return _columns(np.concatenate([weight[:, 1:], weight[:, :1], bias[:, None]], axis=1))


def _hidden(layers: list[nn.Linear]) -> tuple[np.ndarray, np.ndarray]:
    """Square layers as the blocks on their diagonals, ``[layers, n, H / n, H / n]``, and biases ``[layers, H]``.

    An ensemble's members are such blocks, so that the zeros between them are not multiplied.
    """
    if not layers:
        return np.empty((0, 1, 1, 1), dtype=np.float32), np.empty((0, 1), dtype=np.float32)
    weights, biases = zip(*map(_affine, layers), strict=True)
    size = len(weights[0]) // math.gcd(*(_num_blocks(weight) for weight in weights))
    cuts = [slice(start, start + size) for start in range(0, len(weights[0]), size)]
    return np.stack([np.stack([_columns(weight[cut, cut]) for cut in cuts]) for weight in weights]), np.stack(biases)


def _columns(weight: np.ndarray) -> np.ndarray:
    """``[N, D]`` -> ``[D, N]``, contiguous."""
    return np.ascontiguousarray(weight.T)


def _num_blocks(weight: np.ndarray) -> int:
    """The largest number of equal blocks on the diagonal of ``[H, H]`` outside which all is zero."""
    row, column = np.nonzero(weight)
    width = len(weight)
    counts = (count for count in range(min(width, MAX_MEMBERS), 1, -1) if width % count == 0)
    return next((n for n in counts if len(row) and (row * n // width == column * n // width).all()), 1)


def _summed_heads(controller: GRPOController) -> tuple[np.ndarray, np.ndarray]:
    """The heads and the joint term as one layer with an output for each setting, ``[K, H]`` and ``[K]``."""
    weight, bias = _affine(controller.heads)
    head_sum = _array(controller.head_sum)
    split = len(head_sum)
    return weight[split:] + head_sum.T @ weight[:split], bias[split:] + head_sum.T @ bias[:split]


def _affine(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return _array(layer.weight), _array(layer.bias)


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy().copy())

"""One decision, quickly: a trained controller as one compiled loop, for requests that come one at a time.

PyTorch spends most of a decision's time on starting its many small operations. Here what is fixed after training is
folded together once: the heads with their sum over the knobs, the embeddings with the layers that read them. The
choices are those of `GRPOController.sample_actions(..., deterministic=True)`; a test holds both against each other.

Shapes: Di, Dl features, F of them standardised, C functions of a budget, E numbers embed it, H hidden, K settings.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

from budgetvlm._compiled import compiled
from budgetvlm.controller.layers import LARGEST_SCORE, LogEmbedding, Standardiser
from budgetvlm.controller.network import LARGEST_LOG_RATIO, SMALLEST_PRICE, GRPOController
from budgetvlm.errors import InputError

MOST_BLOCKS = 64  # members of an ensemble that are looked for
_ONE = np.float32(1.0)  # a plain 1 would make doubles of what it is added to
_LARGEST = np.float32(LARGEST_SCORE)


class Decider:
    """Chooses a setting for one state at a time. May be called by several threads.

    Args:
        controller: trained; later changes to it are not seen.
    """

    def __init__(self, controller: GRPOController) -> None:
        inputs = controller.image_input, controller.lang_input
        self._image_shape, self._language_shape = ((layer.in_dim,) for layer in inputs)
        feature_weight, feature_bias = _affine(controller.feature_layer)
        context_weight, context_bias = _affine(controller.context_layer)
        width = controller.budget_embedding.linear.out_features
        self._price, self._price_weight = _embedding(controller.price_embedding), context_weight[:, width:]
        self._frequencies = _array(controller.price_embedding.frequencies)
        self._first_bias = feature_bias + context_bias
        heads, self._head_bias = _summed_heads(controller)
        self._projections = [_projection(layer) for layer in inputs if layer.components is not None]
        self._reference_ms = float(controller.latency_reference_ms)
        bounds_ms = _array(controller.bounds_ms)
        finite = bounds_ms[np.isfinite(bounds_ms)]
        largest_ms = float(finite.max()) if finite.size and finite.max() > 0 else math.inf
        self._before: list[Any] = [
            largest_ms,
            self._reference_ms,
            *(np.concatenate(both) for both in zip(*map(_statistics, inputs), strict=True)),
            self._frequencies,
            _embedding(controller.budget_embedding),
            _columns(np.concatenate([feature_weight, context_weight[:, :width]], axis=1)),
        ]
        square = [layer for layer in controller.trunk if isinstance(layer, nn.Linear)]
        self._after: list[Any] = [*_hidden(square), _columns(heads)]
        self._default_price = float(controller.default_price)
        self._latency_share = _array(controller.latency_ms) / self._reference_ms
        self._bounds_ms = np.where(np.isfinite(bounds_ms), bounds_ms, np.nan)  # NaN lies within no budget
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
        return values_of(*self.state(image, language), float(budget_ms), *self.weights(price))

    def best(
        self,
        image: np.ndarray,
        language: np.ndarray,
        budget_ms: float,
        price: float | None,
        times_ms: np.ndarray,
        limit_ms: float,
    ) -> tuple[int, np.ndarray]:
        """`best_within` of `values`, and these, in one call."""
        state = self.state(image, language)
        return _best(times_ms, float(limit_ms), *state, float(budget_ms), *self.weights(price))

    def state(self, image: np.ndarray, language: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raw features as `values_of` takes them. Raises InputError."""
        if image.shape != self._image_shape or language.shape != self._language_shape:
            self._complain(image, language)
        if self._projections:
            image, language = (p.dot(x) for p, x in zip(self._projections, (image, language), strict=True))
        return image, language

    def weights(self, price: float | None) -> tuple[Any, ...]:
        """What `values_of` takes beside a state and a budget."""
        price = self._default_price if price is None else price
        priced = self._priced
        if priced.price != price:
            self._priced = priced = self._at_price(price)
        return priced.weights

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

    def _at_price(self, price: float) -> _Priced:
        price_log = min(math.log(max(price, SMALLEST_PRICE) / 0.1), LARGEST_LOG_RATIO)
        embedded = np.empty(self._price_weight.shape[1], dtype=np.float32)
        _embed(price_log, self._frequencies, self._price, embedded)
        hidden = self._price_weight @ embedded + self._first_bias
        heads = self._head_bias - np.float32(price) * self._latency_share
        return _Priced(price, (*self._before, hidden, *self._after, heads))

    def _complain(self, image: np.ndarray, language: np.ndarray) -> NoReturn:
        what, raw, wanted = "image", image, self._image_shape
        if image.shape == wanted:
            what, raw, wanted = "language", language, self._language_shape
        raise InputError(
            f"the {what} feature has shape {list(raw.shape)}, but this controller was built for {wanted[0]} {what} "
            "features; use features of the model that it was trained with"
        )


class _Priced(NamedTuple):
    """What follows from the price alone: most requests have the same.

    Attributes:
        weights: all that `values_of` takes beside a state. The price's share is in two biases: of the first hidden
            layer ``[H]``, and of the heads, what it takes off ``[K]``.
    """

    price: float
    weights: tuple[Any, ...]


@compiled
def best_within(values: np.ndarray, times_ms: np.ndarray, budget_ms: float) -> int:
    """The most valuable setting ``[K]`` whose time ``[K]`` a budget holds; -1 if there is none."""
    best = -1
    for k in range(len(values)):
        if times_ms[k] <= budget_ms and (best < 0 or values[k] > values[best]):
            best = k
    return best


@compiled
def _best(times_ms: np.ndarray, limit_ms: float, *state: Any) -> tuple[int, np.ndarray]:
    """See `Decider.best`; ``state`` is what `values_of` takes."""
    values = values_of(*state)
    return best_within(values, times_ms, limit_ms), values


@compiled
def values_of(
    image: np.ndarray,
    language: np.ndarray,
    budget_ms: float,
    largest_ms: float,
    reference_ms: float,
    mean: np.ndarray,
    scale: np.ndarray,
    frequencies: np.ndarray,
    embedding: np.ndarray,
    first: np.ndarray,
    first_bias: np.ndarray,
    hidden: np.ndarray,
    hidden_bias: np.ndarray,
    heads: np.ndarray,
    head_bias: np.ndarray,
) -> np.ndarray:
    """A state's values ``[K]``.

    Args:
        image, language: features, projected where the controller does that.
        budget_ms, largest_ms, reference_ms: see `_budget_log`.
        mean, scale: of both; they are standardised so, ``[F]``.
        frequencies, embedding: of the budget's logarithm, see `_embed`.
        first: from standardised features and the embedded budget, ``[F + E, H]``; its bias holds the price's share.
        hidden, hidden_bias: see `_hidden`.
        heads, head_bias: ``[H, K]``, ``[K]``.
    """
    state = np.empty(len(first), np.float32)
    for i in range(len(mean)):  # slices that are assigned to would take seconds to compile
        raw = image[i] if i < len(image) else language[i - len(image)]
        state[i] = min(max((raw - mean[i]) * scale[i], -_LARGEST), _LARGEST)
    _embed(_budget_log(budget_ms, largest_ms, reference_ms), frequencies, embedding, state[len(mean) :])
    now = first_bias.copy()
    _multiply(first, state, now)
    for layer in range(len(hidden)):
        _silu(now)
        after = hidden_bias[layer].copy()
        size = hidden.shape[2]
        for block in range(hidden.shape[1]):
            start, end = block * size, (block + 1) * size
            _multiply(hidden[layer, block], now[start:end], after[start:end])
        now = after
    _silu(now)
    out = head_bias.copy()
    _multiply(heads, now, out)
    return out


@compiled
def _budget_log(budget_ms: float, largest_ms: float, reference_ms: float) -> float:
    """log(budget / the full setting's median); a budget above the largest bound says no more than that."""
    limit = min(budget_ms, largest_ms)
    return max(-LARGEST_LOG_RATIO, min(math.log(limit / reference_ms), LARGEST_LOG_RATIO))


@compiled
def _embed(log_ratio: float, frequencies: np.ndarray, embedding: np.ndarray, out: np.ndarray) -> None:
    """`LogEmbedding` of one number ``[E]``; ``embedding`` is that of `_embedding`."""
    count = len(frequencies)
    basis = np.empty(2 * count + 2, np.float32)
    for i in range(count):
        basis[i], basis[count + i] = math.sin(frequencies[i] * log_ratio), math.cos(frequencies[i] * log_ratio)
    basis[2 * count], basis[2 * count + 1] = log_ratio, 1.0
    for i in range(len(out)):
        out[i] = 0.0
    _multiply(embedding, basis, out)
    _silu(out)


@compiled
def _multiply(weight: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """Add ``[D, N]``, transposed, times x ``[D]`` to ``out`` ``[N]``: whole columns, which vector units like.

    Four at a time, so that ``out`` is read and written a quarter as often; they lie far apart, because memory is read
    ahead in several places at once, within a page each.
    """
    count, width = weight.shape
    n = count // 4
    for j in range(n):
        a, b, c, d = x[j], x[n + j], x[2 * n + j], x[3 * n + j]
        for i in range(width):
            out[i] += weight[j, i] * a + weight[n + j, i] * b + weight[2 * n + j, i] * c + weight[3 * n + j, i] * d
    for j in range(4 * n, count):
        for i in range(width):
            out[i] += weight[j, i] * x[j]


@compiled
def _silu(x: np.ndarray) -> None:
    for i in range(len(x)):
        x[i] = x[i] / (_ONE + math.exp(-x[i]))


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
    """Square layers, of n blocks on their diagonals these alone, ``[L, n, H / n, H / n]``, and biases ``[L, H]``.

    An ensemble's members are such blocks, so that what lies between them is not multiplied.
    """
    if not layers:
        return np.empty((0, 1, 1, 1), dtype=np.float32), np.empty((0, 1), dtype=np.float32)
    weights, biases = zip(*map(_affine, layers), strict=True)
    size = len(weights[0]) // math.gcd(*(_num_blocks(weight) for weight in weights))
    cuts = [slice(start, start + size) for start in range(0, len(weights[0]), size)]
    return np.stack([np.stack([_columns(weight[cut, cut]) for cut in cuts]) for weight in weights]), np.stack(biases)


def _columns(weight: np.ndarray) -> np.ndarray:
    """``[N, D]`` -> ``[D, N]``, as `_multiply` reads it."""
    return np.ascontiguousarray(weight.T)


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


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy().copy())

"""What a training step does between its matrix products, each as one compiled loop over memory.

At 64 states a step is some hundred small operations, and PyTorch spends as long on starting and passing them on as on
computing. All arguments are contiguous float32 arrays unless said otherwise; what is written into is said.

Shapes: B states of A samples, D numbers of a state, E numbers embed one context (budget or price), C functions of it, K
settings.
"""

from __future__ import annotations

import math

import numpy as np

from budgetvlm._compiled import compiled

_ONE = np.float32(1.0)  # a plain 1 would make doubles of what it is added to
_PART = 2048  # numbers that are updated at once: their moments stay in the nearest cache


@compiled
def standardise(
    x: np.ndarray, rows: np.ndarray, mean: np.ndarray, std: np.ndarray, limit: float, start: int, out: np.ndarray
) -> None:
    """(x - mean) / std of these rows of ``[S, D]``, cut at +- limit, into columns of ``out`` from ``start`` on."""
    most = np.float32(limit)
    for i in range(len(rows)):
        row, to = x[rows[i]], out[i, start : start + x.shape[1]]
        for d in range(len(row)):
            score = (row[d] - mean[d]) / std[d]
            score = most if score > most else score
            to[d] = -most if score < -most else score


@compiled
def embed(basis: np.ndarray, context: int, weight: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The linear layer ``[E, C]`` of one of the contexts ``[B, 2, C]``, into its columns of ``out [B, 2 E]``."""
    width = len(bias)
    columns = np.ascontiguousarray(weight.T)
    for b in range(len(basis)):
        to = out[b, context * width : (context + 1) * width]
        for e in range(width):
            to[e] = bias[e]
        for c in range(basis.shape[2]):
            x = basis[b, context, c]
            for e in range(width):
                to[e] += columns[c, e] * x


@compiled
def embed_backward(
    gradient: np.ndarray, basis: np.ndarray, context: int, weight_gradient: np.ndarray, bias_gradient: np.ndarray
) -> None:
    """The last two from the gradient of `embed`'s ``out``."""
    width, count = weight_gradient.shape
    columns = np.zeros((count, width), np.float32)
    bias_gradient[:] = np.float32(0.0)
    for b in range(len(basis)):
        of = gradient[b, context * width : (context + 1) * width]
        for e in range(width):
            bias_gradient[e] += of[e]
        for c in range(count):
            x = basis[b, context, c]
            for e in range(width):
                columns[c, e] += of[e] * x
    for e in range(width):
        for c in range(count):
            weight_gradient[e, c] = columns[c, e]


@compiled
def spread(rows: np.ndarray, sample: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """Each state's own of these rows ``[A, D]``, and a bias added, into ``out [B, D]``; sample is int64 ``[B]``."""
    for b in range(len(out)):
        row, to = rows[sample[b]], out[b]
        for d in range(len(to)):
            to[d] = row[d] + bias[d]


@compiled
def gathered(gradient: np.ndarray, sample: np.ndarray, count: int) -> np.ndarray:
    """The gradient of `spread`'s ``rows``, of which there are ``count``."""
    out = np.zeros((count, gradient.shape[1]), np.float32)
    for b in range(len(gradient)):
        of, to = gradient[b], out[sample[b]]
        for d in range(len(to)):
            to[d] += of[d]
    return out


@compiled
def activate(x: np.ndarray, sigmoid: np.ndarray, out: np.ndarray, slope: np.ndarray) -> None:
    """silu(x) ``[B, D]`` and its derivative into ``out`` and ``slope``; ``sigmoid`` is that of x."""
    for b in range(x.shape[0]):
        for d in range(x.shape[1]):
            s = sigmoid[b, d]
            out[b, d] = x[b, d] * s
            slope[b, d] = s * (_ONE + x[b, d] * (_ONE - s))


@compiled
def drop(bits: np.ndarray, factor: float, out: np.ndarray, slope: np.ndarray) -> None:
    """Multiply both ``[B, D]`` with factor or 0, as `QuickDropout.factors` has them of these bits, uint8 ``[n]``."""
    flat, flat_slope, count = out.reshape(out.size), slope.reshape(out.size), len(bits)
    for plane in range(8):
        part, mask = slice(plane * count, min((plane + 1) * count, out.size)), np.int32(1 << plane)
        to, to_slope = flat[part], flat_slope[part]
        for i in range(len(to)):
            kept = np.float32(factor) if np.int32(bits[i]) & mask else np.float32(0.0)
            to[i] *= kept
            to_slope[i] *= kept


@compiled
def through(slope: np.ndarray, gradient: np.ndarray, total: np.ndarray) -> None:
    """Multiply a gradient ``[B, D]`` with a slope, in place, and write its sum over states into ``total``."""
    total[:] = np.float32(0.0)
    for b in range(gradient.shape[0]):
        for d in range(gradient.shape[1]):
            g = gradient[b, d] * slope[b, d]
            gradient[b, d] = g
            total[d] += g


@compiled
def exact_policy(
    raw: np.ndarray, places: np.ndarray, scale: float, offset: np.ndarray, rewards: np.ndarray, entropy: float,
    gradient: np.ndarray,
) -> float:  # fmt: skip
    """-E[reward + entropy's bonus] under the policy, a mean over states; its gradient by ``raw``.

    That is `expectation` of `exact_advantages` and of the log-policy, taken back by `through_softmax`.

    Args:
        raw: heads side by side, the joint term last, ``[B, sum(sizes) + K]``.
        places: which of the heads' columns a setting is the sum of, int64 ``[K, N]``.
        scale: of the logits. offset, rewards: see `budgetvlm.controller.policy_loss.Batch`.
        gradient: is written into, of raw's shape.
    """
    count, settings = offset.shape
    heads = raw.shape[1] - settings
    loss, share, weight, factor = np.float32(0.0), np.float32(1.0 / count), np.float32(entropy), np.float32(scale)
    costs, policy = np.empty((2, settings), np.float32)
    for b in range(count):
        top = -np.float32(np.inf)
        for k in range(settings):
            value = raw[b, heads + k]
            for place in places[k]:
                value += raw[b, place]
            costs[k] = value * factor + offset[b, k]
            top = max(top, costs[k])
        total = np.float32(0.0)
        for k in range(settings):
            policy[k] = math.exp(costs[k] - top)
            total += policy[k]
        log_total, mean = top + math.log(total), np.float32(0.0)
        for k in range(settings):
            policy[k] /= total
            costs[k] = weight * (costs[k] - log_total) - rewards[b, k]
            mean += policy[k] * costs[k]
        for head in range(heads):
            gradient[b, head] = np.float32(0.0)
        for k in range(settings):
            of = policy[k] * (costs[k] - mean) * share * factor
            gradient[b, heads + k] = of
            for place in places[k]:
                gradient[b, place] += of
        loss += mean * share
    return float(loss)


@compiled
def adamw(
    values: np.ndarray, gradient: np.ndarray, mean: np.ndarray, square: np.ndarray, averages: np.ndarray, decayed: int,
    steps: float, learning_rate: float, betas: tuple[float, float], weight_decay: float, epsilon: float,
    average_decay: float,
) -> None:  # fmt: skip
    """One update of `FlatAdamW`; the first ``decayed`` numbers decay. All but the gradient are written into."""
    beta1, beta2 = betas
    size = np.float32(learning_rate / (1.0 - beta1**steps))
    root = np.float32(1.0 / math.sqrt(1.0 - beta2**steps))
    kept = np.float32(1.0 - learning_rate * weight_decay)
    rates = np.float32(1.0 - beta1), np.float32(1.0 - beta2), np.float32(1.0 - average_decay)
    for first, last, shrink in ((0, decayed, kept), (decayed, len(values), _ONE)):
        for start in range(first, last, _PART):
            part = slice(start, min(start + _PART, last))
            _moments(gradient[part], mean[part], square[part], rates[0], rates[1])
            _move(values[part], mean[part], square[part], size, root, np.float32(epsilon), shrink)
            _follow(averages[part], values[part], rates[2])


@compiled
def _moments(
    gradient: np.ndarray, mean: np.ndarray, square: np.ndarray, rate: np.float32, square_rate: np.float32
) -> None:
    for i in range(len(gradient)):
        mean[i] += rate * (gradient[i] - mean[i])
        square[i] += square_rate * (gradient[i] * gradient[i] - square[i])


@compiled
def _move(
    values: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    size: np.float32,
    root: np.float32,
    epsilon: np.float32,
    shrink: np.float32,
) -> None:
    for i in range(len(values)):
        values[i] = values[i] * shrink - size * mean[i] / (math.sqrt(square[i]) * root + epsilon)


@compiled
def _follow(averages: np.ndarray, values: np.ndarray, rate: np.float32) -> None:
    for i in range(len(values)):
        averages[i] += rate * (values[i] - averages[i])

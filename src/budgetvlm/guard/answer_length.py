"""How long an answer will be: a distribution over its number of tokens, from the question alone.

Multinomial logistic regression on the language features. Long answers decide the tail of the latency, so what is
wanted is a quantile as well as the mean. Shapes: B requests, L lengths, Dl language features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from budgetvlm.errors import DataError

MOST_LENGTHS = 24  # longer lists of lengths are put into bins, each named by its longest
RIDGE = 1e-2  # penalty on the weights, so that few samples do not claim much


@dataclass(frozen=True, eq=False)
class LengthModel:
    """P(number of output tokens | question).

    Attributes:
        lengths: ascending numbers of tokens, ``[L]``.
        mean, std: of the training features, ``[Dl]``.
        weight, bias: of the logits, ``[Dl, L]`` and ``[L]``.
    """

    lengths: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(cls, language: np.ndarray, output_tokens: np.ndarray) -> LengthModel:
        """Fit on language features ``[S, Dl]`` and numbers of output tokens ``[S]``.

        Raises:
            DataError: no samples, or numbers of tokens that are not positive.
        """
        tokens = np.asarray(output_tokens, dtype=np.float64)
        if not len(tokens) or len(tokens) != len(language) or not (np.isfinite(tokens).all() and tokens.min() > 0):
            raise DataError("the lengths of answers have to be positive numbers, one for each sample's features")
        lengths = _bins(np.ceil(tokens))
        number = np.searchsorted(lengths, np.ceil(tokens))
        mean, std = language.mean(axis=0), language.std(axis=0)
        std = np.where(std > 1e-6, std, 1.0)
        weight, bias = _logistic((language - mean) / std, number, len(lengths))
        return cls(lengths, mean, std, weight, bias)

    def probabilities(self, language: np.ndarray) -> np.ndarray:
        """Language features ``[B, Dl]`` or ``[Dl]`` -> probability of each length, ``[B, L]`` or ``[L]``."""
        logits = (language - self.mean) / self.std @ self.weight + self.bias
        shares: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return shares / shares.sum(axis=-1, keepdims=True)

    def expected(self, language: np.ndarray) -> np.ndarray:
        """Mean number of tokens, ``[B]`` or a number."""
        out: np.ndarray = self.probabilities(language) @ self.lengths
        return out

    def quantile(self, language: np.ndarray, level: float) -> np.ndarray:
        """The smallest length that an answer exceeds with a probability of at most 1 - level, ``[B]`` or a number."""
        below = self.probabilities(language).cumsum(axis=-1)
        out: np.ndarray = self.lengths[(below < level - 1e-12).sum(axis=-1).clip(max=len(self.lengths) - 1)]
        return out

    @cached_property
    def folded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights ``[L, Dl]`` and biases that take raw features, and the lengths."""
        weight = self.weight / self.std[:, None]
        bias = self.bias - self.mean @ weight
        return np.ascontiguousarray(weight.T, dtype=np.float64), bias, self.lengths.astype(np.float64)

    def check(self, language: np.ndarray) -> None:
        """Raise DataError if a request's feature ``[Dl]`` has another width."""
        if len(language) != len(self.mean):
            raise DataError(
                f"the question's feature has {len(language)} numbers, but answers' lengths were learnt from "
                f"{len(self.mean)}; calibrate with features of this model"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back."""
        return {name: getattr(self, name).tolist() for name in ("lengths", "mean", "std", "weight", "bias")}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LengthModel:
        """The model of a `to_dict` document. Raises DataError."""
        try:
            return cls(*(np.array(document[name]) for name in ("lengths", "mean", "std", "weight", "bias")))
        except KeyError as error:
            raise DataError(f"the length model lacks the field {error.args[0]}; train again") from None


def _bins(tokens: np.ndarray) -> np.ndarray:
    """The distinct lengths, or, where there are many, the upper ends of bins with equal shares of the samples."""
    distinct = np.unique(tokens)
    if len(distinct) <= MOST_LENGTHS:
        return distinct
    return np.unique(np.quantile(tokens, np.linspace(0, 1, MOST_LENGTHS + 1)[1:], method="higher"))


def _logistic(x: np.ndarray, number: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[D, L]`` and biases ``[L]`` of least penalised cross-entropy."""
    from scipy.optimize import minimize  # slow to import, and only fitting needs it
    from scipy.special import log_softmax

    samples, width = x.shape
    target = np.eye(count)[number]
    # The shares of the lengths, each with half a sample more: where features tell nothing these are the answer.
    bias = np.log((target.sum(axis=0) + 0.5) / (samples + 0.5 * count))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, shift = flat[:-count].reshape(width, count), flat[-count:]
        log_p = log_softmax(x @ weight + bias + shift, axis=1)
        error = (np.exp(log_p) - target) / samples
        gradient = np.concatenate([(x.T @ error + RIDGE * weight).ravel(), error.sum(axis=0) + RIDGE * shift])
        value = -(target * log_p).sum() / samples + 0.5 * RIDGE * float((flat**2).sum())
        return value, gradient

    found = minimize(loss, np.zeros(width * count + count), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return found.x[:-count].reshape(width, count), bias + found.x[-count:]

"""What earlier models' accuracies and a few labels of a new model say of the new model's accuracy.

The new model is expected to score what predictors of the earlier models say, plus an offset of each setting, plus a
multiple of each direction in which the earlier models' accuracies depend on the input. Offsets and multiples are
normal with mean 0, and alike where settings are; how large they are follows from the labels as well (a hierarchical
model, Gelman et al., Bayesian Data Analysis, chapter 5). Outcomes of one sample
at several settings go together as the earlier ones do, and where a sample was answered by an earlier model too, what
surprised there says what will surprise here; so both kinds of luck count for less (control variates).

Shapes: M earlier models, B samples, N labelled ones, K settings, R directions; P = K + R * K + 2 * M coefficients, in
this order: offsets, multiples of the first direction, and so on, weights of the earlier models and of their surprises.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from budgetvlm.knobs import MODEL, KnobSpace

REACH = 1.0  # distance of two settings, in ranges of a knob, at which what is their own has a correlation of 1/e
SHARED = 0.5  # share of a setting's variance that it has in common with all others
MOST_DIRECTIONS = 4
WEIGHT, SURPRISE = 0.3, 0.5  # standard deviations of an earlier model's weight, and of its surprise's
OFFSETS = (0.01, 0.02, 0.04, 0.08, 0.16)  # standard deviations of a setting's offset that are tried
MULTIPLES = (0.05, 0.15, 0.4, 1.0)  # and of a multiple, in parts of what it was in the earlier models
LUCK = (0.1, 0.2, 0.4, 0.7, 1.0, 1.4)  # variances of what the coefficients leave, in parts of the earlier models'
OWN_LUCK = (0.1, 0.5)  # shares of it that go with no other setting
LEAST_SPREAD = 0.05  # of the accuracies of settings, where settings that nobody measured are concerned


def likeness(first: KnobSpace, second: KnobSpace, *others: KnobSpace) -> np.ndarray:
    """Prior correlation of the settings of two spaces with the same knobs, ``[K, K2]``; models are all equally far.

    Distances count the values that the spaces have between two, those of ``others`` included.
    """
    distance = np.zeros((len(first), len(second)))
    for name in first.names:
        values = sorted({value for space in (first, second, *others) for value in space.values(name)})
        one, other = (np.array([values.index(setting[name]) for setting in s.settings]) for s in (first, second))
        apart = np.abs(one[:, None] - other[None]) / max(len(values) - 1, 1)
        distance += apart > 0 if name == MODEL else apart
    return np.asarray(SHARED + (1 - SHARED) * np.exp(-distance / REACH))


def interpolation(space: KnobSpace, earlier: KnobSpace) -> tuple[np.ndarray, np.ndarray]:
    """Weights of an earlier space's settings for each of a space ``[K, K2]``, and what they leave open ``[K, K]``.

    Simple kriging; a setting that both spaces have is itself, and nothing is left open.
    """
    across = likeness(space, earlier)
    weights = np.linalg.solve(likeness(earlier, earlier, space), across.T).T
    left_open = likeness(space, space, earlier) - weights @ across.T
    return weights / weights.sum(axis=1, keepdims=True), left_open


@dataclass(frozen=True, eq=False)
class Prior:
    """What is expected before any label.

    Attributes:
        alike: correlation of settings, ``[K, K]``. open_: the part of it that no earlier table knows, ``[K, K]``.
        noise: covariance of a sample's outcomes, given its features, ``[K, K]``.
        centre: mean of the earlier models' expected accuracies, ``[M, K]``.
        basis: for what varies in them, ``[M * K, R]``. scale: how much it varies in each, ``[R]``.
    """

    alike: np.ndarray
    open_: np.ndarray
    noise: np.ndarray
    centre: np.ndarray
    basis: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, expected: np.ndarray, alike: np.ndarray, open_: np.ndarray, noise: np.ndarray) -> Prior:
        """From the earlier models' expected accuracies of many samples, ``[M, S, K]``."""
        centre = expected.mean(axis=1)
        flat = np.concatenate(list(expected - centre[:, None]), axis=1)
        _, spread, basis = np.linalg.svd(flat, full_matrices=False)
        count = min(MOST_DIRECTIONS, int((spread > 1e-6 * max(spread[0], 1e-6)).sum()))
        scale = spread[:count] / np.sqrt(flat.size)
        return cls(alike, open_, noise, centre, basis[:count].T / (np.sqrt(flat.shape[1]) * scale), scale)

    def directions(self, expected: np.ndarray) -> np.ndarray:
        """Where samples lie in the directions, each of variance 1 among many samples: ``[M, B, K]`` -> ``[B, R]``."""
        flat = np.concatenate(list(expected - self.centre[:, None]), axis=1)
        return np.asarray(flat @ self.basis)

    def design(self, expected: np.ndarray, surprise: np.ndarray) -> np.ndarray:
        """The coefficients' factors ``[B, K, P]``. ``surprise``: outcome - expectation, or 0, ``[M, B, K]``."""
        settings, ones = np.eye(expected.shape[2]), np.ones((expected.shape[1], 1))
        own = np.concatenate([ones, self.directions(expected)], axis=1)
        blocks = np.einsum("br,kj->bkrj", own, settings).reshape(len(ones), len(settings), -1)
        weights = np.moveaxis(np.concatenate([expected - self.centre[:, None], surprise]), 0, 2)
        return np.concatenate([blocks, weights], axis=2)

    def covariance(self, offset: float, multiple: float) -> np.ndarray:
        """Of the coefficients ``[P, P]``, where offsets and multiples have these standard deviations."""
        models, settings = self.centre.shape
        between = max(float(self.centre.std(axis=1).mean()), LEAST_SPREAD)
        parts = [offset**2 * self.alike + between**2 * self.open_]
        parts += [one**2 * (multiple**2 * self.alike + self.open_) for one in self.scale]
        out = np.zeros((settings * len(parts) + 2 * models,) * 2)
        for place, part in enumerate(parts):
            out[place * settings : (place + 1) * settings, place * settings : (place + 1) * settings] = part
        out[-2 * models :, -2 * models :] = np.diag(np.repeat([WEIGHT**2 / models, SURPRISE**2 / models], models))
        return out


@dataclass(frozen=True, eq=False)
class Posterior:
    """The coefficients after the labels: their mean ``[P]`` and covariance ``[P, P]``."""

    prior: Prior
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, prior: Prior, accuracy: np.ndarray, expected: np.ndarray, surprise: np.ndarray) -> Posterior:
        """From labels ``[N, K]``, NaN where there is none, and what is `Prior.design` for these samples.

        All standard deviations that are tried count as their likelihood says.
        """
        rest, design = accuracy - expected.mean(axis=0), prior.design(expected, surprise)
        tried = []
        for own in OWN_LUCK:
            noise = own * np.diag(np.diag(prior.noise)) + (1 - own) * prior.noise
            found = [_summed(r, d, noise) for r, d in zip(rest, design, strict=True) if np.isfinite(r).any()]
            gram, product, square, count, volume = (np.sum([one[place] for one in found], axis=0) for place in range(5))
            tried += [
                _solved(prior.covariance(offset, multiple), gram, product, square, count, volume, luck)
                for offset, multiple, luck in itertools.product(OFFSETS, MULTIPLES, LUCK)
            ]
        evidence = np.array([one[2] for one in tried])
        share = np.exp(evidence - evidence.max())
        share /= share.sum()
        mean = np.einsum("h,hp->p", share, [one[0] for one in tried])
        covariance = np.einsum("h,hpq->pq", share, [one[1] + np.outer(one[0] - mean, one[0] - mean) for one in tried])
        return cls(prior, mean, covariance)

    def accuracy(self, expected: np.ndarray, surprise: np.ndarray | None = None) -> np.ndarray:
        """Expected accuracies ``[B, K]`` from those of the earlier models ``[M, B, K]``."""
        models, settings = self.prior.centre.shape
        blocks, weights = self.mean[: -2 * models].reshape(-1, settings), self.mean[-2 * models :]
        own = blocks[0] + self.prior.directions(expected) @ blocks[1:]
        own += np.tensordot(weights[:models], expected - self.prior.centre[:, None], 1)
        if surprise is not None:
            own += np.tensordot(weights[models:], surprise, 1)
        return np.asarray(np.clip(expected.mean(axis=0) + own, 0.0, 1.0))

    @property
    def weights(self) -> np.ndarray:
        """How much of what varies in each earlier model's accuracies is carried over, ``[M]``."""
        models = len(self.prior.centre)
        return np.asarray(1 / models + self.mean[-2 * models : -models])

    @property
    def half_widths(self) -> np.ndarray:
        """Half of the 95% interval of each setting's mean accuracy, ``[K]``."""
        settings = self.prior.centre.shape[1]
        return np.asarray(1.96 * np.sqrt(np.diag(self.covariance)[:settings]))


def _summed(rest: np.ndarray, design: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a sample adds to the normal equations ``[P, P]``, ``[P]``, to the rest's square, to count and log volume."""
    known = np.isfinite(rest)
    own = noise[np.ix_(known, known)]
    weighed = np.linalg.solve(own, np.column_stack([design[known], rest[known]]))
    factors, last = weighed[:, :-1], weighed[:, -1]
    volume = np.linalg.slogdet(own)[1]
    return design[known].T @ factors, design[known].T @ last, rest[known] @ last, np.array(known.sum()), volume


def _solved(
    prior: np.ndarray, gram: np.ndarray, product: np.ndarray, square: float, count: int, volume: float, luck: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance after the labels, and the log of their likelihood up to a constant; before: ``prior``."""
    system = np.eye(len(prior)) + gram @ prior / luck
    after = np.linalg.solve(system.T, prior).T
    mean = after @ product / luck
    spread = count * np.log(luck) + volume + np.linalg.slogdet(system)[1]
    return mean, after, float(-0.5 * (spread + (square - product @ mean) / luck))


def held_out_errors(
    posterior: Posterior, accuracy: np.ndarray, expected: np.ndarray, surprise: np.ndarray
) -> np.ndarray:
    """Mean squared errors on labels, a fifth of which is held out at a time, ``[3]``.

    Of what is carried over, of the earlier models' expectations as they are, and of the means of the labels alone.
    """
    fold, errors = np.arange(len(accuracy)) % 5, []
    for number in range(5):
        rest, held_out = fold != number, fold == number
        own = Posterior.of(posterior.prior, accuracy[rest], expected[:, rest], surprise[:, rest])
        found = own.accuracy(expected[:, held_out]), expected[:, held_out].mean(axis=0), _means(accuracy[rest])
        errors.append([np.square(one - accuracy[held_out]) for one in found])
    return np.array([np.nanmean(np.concatenate(list(column))) for column in zip(*errors, strict=True)])


def _means(accuracy: np.ndarray) -> np.ndarray:
    return np.asarray(np.nan_to_num(np.nanmean(accuracy, axis=0), nan=float(np.nanmean(accuracy))))

"""The latency model: the time of every setting for a request, stage by stage, before anything runs.

Each stage's time is a sum of non-negative terms, shaped like the machine: a fixed part, a part for each token, for
each block, for each expert of each block, and so on. So it says something sensible of settings that were never
measured. A setting that was measured also has a correction, the ratio of what was measured to what the terms give,
drawn towards 1 where few samples support it.

A term is (a product of some knobs' values, each as a share of the largest) x (a function of the request's size):

    fixed                   one
    vision                  visual tokens v
    context, context^2      all prompt tokens t = v + l, l being the language tokens
    steps, steps x context  decoding steps n - 1 after the first of n output tokens, and the context each attends to

A knob that only changes the number of visual tokens acts through them and is in no product. The knob `model` is in all
of them, also of stages to which other knobs do nothing: a larger model has a larger vision tower as well.

Shapes: S samples, K settings, M functions of size, P products of knobs, R rows. Times in ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from budgetvlm.errors import DataError, KnobSpaceError
from budgetvlm.knobs import MODEL, KnobSpace
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 2
# "tiles" is 1 where the image is more than its overview, which is encoded first and by itself.
SIZES = ("fixed", "vision", "context", "context^2", "steps", "steps x context", "tiles")
# Which functions of size a stage's time can depend on, and whether the knobs do more to it than change the tokens.
_SHAPES: dict[str, tuple[tuple[str, ...], bool]] = {
    "preprocess": (("fixed", "vision", "tiles"), False),
    "vision": (("fixed", "vision", "tiles"), False),
    "prefill": (("fixed", "context", "context^2"), True),
    "decode": (("fixed", "steps", "steps x context"), True),
}
_REST = "rest"  # what the stages do not account for; everything, where the table knows no stages
DEPTH, WIDTH = "num_active_blocks", "top_k"  # experts are parts of blocks: they cost nothing but in one
PSEUDO_SAMPLES = 2.0  # that vote for a setting's correction being 1
ROUNDS = 4  # of reweighting, until outliers have lost their pull
HUBER = 1.5  # in robust standard deviations


@dataclass(frozen=True, eq=False)
class Sizes:
    """Token counts of requests at every setting, float64 ``[S, K]`` each; zeros where a table does not know them."""

    vision: np.ndarray
    language: np.ndarray
    output: np.ndarray

    @classmethod
    def of_table(cls, table: ProfileTable) -> Sizes:
        """The counts of a table; a setting that was not counted gets those of the same sample at others."""
        shape = (table.num_samples, table.num_settings)
        counts = (table.tokens.get(kind, np.zeros(shape)) for kind in ("vision", "language", "output"))
        vision, language, output = (np.asarray(c, dtype=np.float64) for c in counts)
        return cls(_filled_vision(vision, table.knob_space), _filled(language), _filled(output))

    def functions(self) -> np.ndarray:
        """The functions of size, in the order of `SIZES`, ``[M, S, K]``."""
        context, steps = self.vision + self.language, np.maximum(self.output - 1, 0)
        tiles = (self.vision > self.vision.min(axis=1, keepdims=True)).astype(np.float64)
        return np.stack([np.ones_like(context), self.vision, context, context**2, steps, steps * context, tiles])


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicts times of settings.

    Attributes:
        knob_space: of the table it was fitted on.
        compute_knobs: the knobs in the products; the others act through the visual tokens alone.
        stages: names, in the order of the weights.
        weights: non-negative, in ms, ``[stages, P, M]``; products are those of `knob_products`.
        correction: ``[K]``, above 0; 1 for settings that were not measured.
    """

    knob_space: KnobSpace
    compute_knobs: tuple[str, ...]
    stages: tuple[str, ...]
    weights: np.ndarray
    correction: np.ndarray

    @classmethod
    def fit(cls, table: ProfileTable, max_rows: int = 200_000) -> LatencyModel:
        """Fit on the measured cells of a table; relative errors count alike, outliers lose their weight.

        Args:
            max_rows: of more cells than this an evenly spread part is used.

        Raises:
            DataError: no latency was measured.
        """
        measured = np.isfinite(table.latency_ms)
        if not measured.any():
            raise DataError("no latency was measured on these samples; profile it (exp6) and prepare again")
        sizes = Sizes.of_table(table)
        compute = _compute_knobs(table.knob_space, sizes.vision)
        rows, columns = np.nonzero(measured)
        if len(rows) > max_rows:
            keep = np.linspace(0, len(rows) - 1, max_rows).astype(int)
            rows, columns = rows[keep], columns[keep]
        functions = sizes.functions()[:, rows, columns]
        products = knob_products(table.knob_space, table.knob_space, compute)[:, columns]
        subsets = _subsets(compute)
        allowed = np.array([DEPTH not in compute or WIDTH not in names or DEPTH in names for names in subsets])
        total = table.latency_ms[rows, columns].astype(np.float64)
        stages = dict(_stage_times(table, rows, columns, total))
        everywhere = np.array([set(names) <= {MODEL} for names in subsets])
        weights = np.stack(
            [
                _fit_stage(name, ms, total, functions, products, allowed if _acted_on(name) else everywhere)
                for name, ms in stages.items()
            ]
        )
        model = cls(table.knob_space, compute, tuple(stages), weights, np.ones(table.num_settings))
        predicted = np.einsum("spm,pr,mr->r", weights, products, functions)
        return model._corrected(_corrections(total / predicted, columns, table.num_settings))

    def _corrected(self, correction: np.ndarray) -> LatencyModel:
        return LatencyModel(self.knob_space, self.compute_knobs, self.stages, self.weights, correction)

    def predict(self, sizes: Sizes) -> np.ndarray:
        """Total time of requests at every setting of the model's own knob space, ``[S, K]``."""
        per_size = self.per_size.sum(axis=0)
        out: np.ndarray = np.einsum("mk,msk->sk", per_size, sizes.functions()) * self.correction
        return out

    def predict_table(self, table: ProfileTable) -> np.ndarray:
        """`predict` for the samples of a table of the same knob space. Raises KnobSpaceError."""
        table.knob_space.require_equal(self.knob_space, "the table")
        return self.predict(Sizes.of_table(table))

    def predict_stages(self, sizes: Sizes) -> dict[str, np.ndarray]:
        """As `predict`, for each stage."""
        functions = sizes.functions()
        parts = (np.einsum("mk,msk->sk", weights, functions) for weights in self.corrected_size)
        return dict(zip(self.stages, parts, strict=True))

    @cached_property
    def per_size(self) -> np.ndarray:
        """Weight of each function of size at each setting, ``[stages, M, K]``."""
        products = knob_products(self.knob_space, self.knob_space, self.compute_knobs)
        return np.einsum("gpm,pk->gmk", self.weights, products)

    @cached_property
    def corrected_size(self) -> np.ndarray:
        """Weight of each function of size at each setting, with the corrections, ``[stages, M, K]``."""
        return np.ascontiguousarray(self.per_size * self.correction)

    def for_space(self, space: KnobSpace) -> LatencyModel:
        """The same machine with other values of the same knobs; corrections hold for the settings both spaces have.

        Raises:
            KnobSpaceError: a knob is missing or unknown.
        """
        if space.names != self.knob_space.names:
            raise KnobSpaceError(f"the latency model knows the knobs {self.knob_space}, not those of {space}")
        known = {setting: k for k, setting in enumerate(self.knob_space.settings)}
        correction = np.array([self.correction[known[s]] if s in known else 1.0 for s in space.settings])
        scale = knob_products(space, self.knob_space, self.compute_knobs)[:, -1]
        return LatencyModel(space, self.compute_knobs, self.stages, self.weights * scale[None, :, None], correction)

    def stages_of(self, index: int, vision: np.ndarray, language: float, output: float) -> np.ndarray:
        """The time of each stage of one request at one setting, ``[stages]``.

        Args:
            vision: visual tokens at each setting, ``[K]``.
        """
        sizes = Sizes(vision[None], np.full((1, len(vision)), language), np.full((1, len(vision)), output))
        out: np.ndarray = self.corrected_size[:, :, index].dot(sizes.functions()[:, 0, index])
        return out

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document; `from_dict` takes it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "knobs": self.knob_space.to_dict(),
            "compute_knobs": list(self.compute_knobs),
            "stages": list(self.stages),
            "weights": self.weights.tolist(),
            "correction": self.correction.tolist(),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LatencyModel:
        """The model of a `to_dict` document.

        Raises:
            DataError: another schema version, a field that is missing or cannot be.
        """
        if document.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"a latency model of schema version {document.get('schema_version')!r} cannot be read; this version "
                f"reads {SCHEMA_VERSION}. Train again."
            )
        try:
            space = KnobSpace(document["knobs"])
            compute, stages = tuple(document["compute_knobs"]), tuple(document["stages"])
            weights, correction = np.array(document["weights"]), np.array(document["correction"])
        except KeyError as error:
            raise DataError(f"the latency model lacks the field {error.args[0]}; train again") from None
        shape = (len(stages), 2 ** len(compute), len(SIZES))
        if weights.shape != shape or correction.shape != (len(space),):
            raise DataError(f"the latency model's weights have shape {weights.shape}, not {shape}; train again")
        return cls(space, compute, stages, weights, correction)


def knob_products(space: KnobSpace, reference: KnobSpace, names: Sequence[str]) -> np.ndarray:
    """Products of every subset of the named knobs' values, as shares of ``reference``'s largest, ``[P, K]``."""
    shares = np.stack(
        [space.value_matrix[:, space.names.index(n)] / max(reference.values(n)) for n in names]
        or [np.ones(space.num_settings)]
    )
    return np.stack([shares[[names.index(n) for n in subset]].prod(axis=0) for subset in _subsets(names)])


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All of them, the smaller ones first."""
    return [subset for n in range(len(names) + 1) for subset in itertools.combinations(names, n)]


def relative_errors(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """|predicted - measured| / measured of the measured cells, in one row."""
    known = np.isfinite(measured)
    out: np.ndarray = np.abs(predicted[known] - measured[known]) / measured[known]
    return out


def _compute_knobs(space: KnobSpace, vision: np.ndarray) -> tuple[str, ...]:
    """The knobs that visual tokens do not tell, and `model`; all of them where no tokens are known."""
    counts = vision.mean(axis=0).reshape(space.sizes)
    told = [n for axis, n in enumerate(space.names) if np.ptp(counts, axis=axis).max() > 0]
    return tuple(n for n in space.names if n == MODEL or n not in told)


def _stage_times(
    table: ProfileTable, rows: np.ndarray, columns: np.ndarray, total: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Each stage's times ``[R]``, and what they leave of the total."""
    rest = total.copy()
    for name, values in table.stages_ms.items():
        times = values[rows, columns].astype(np.float64)
        if np.isfinite(times).all():
            rest -= times
            yield name, times
    if np.median(rest / total) > 1e-3:
        yield _REST, np.maximum(rest, 0.0)


def _acted_on(stage: str) -> bool:
    """Whether knobs do more to a stage than change the tokens."""
    return _SHAPES.get(stage, (SIZES, True))[1]


def _fit_stage(
    name: str, times: np.ndarray, total: np.ndarray, functions: np.ndarray, products: np.ndarray, allowed: np.ndarray
) -> np.ndarray:
    """Weights of one stage ``[P, M]`` from times ``[R]``, by non-negative least squares on errors / total.

    ``allowed``: the products that may have a weight, bool ``[P]``.
    """
    sizes, _ = _SHAPES.get(name, (SIZES, True))
    of_size, of_knobs = np.flatnonzero([size in sizes for size in SIZES]), np.flatnonzero(allowed)
    design = np.stack([products[p] * functions[m] for p in of_knobs for m in of_size], axis=1)
    solution = _robust_nnls(design / total[:, None], times / total)
    weights = np.zeros((len(products), len(SIZES)))
    weights[np.ix_(of_knobs, of_size)] = solution.reshape(len(of_knobs), len(of_size))
    return weights


def _robust_nnls(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin over x >= 0 of a Huber loss of design x - target, by reweighting (Holland and Welsch 1977)."""
    weight = np.ones(len(target))
    for _ in range(ROUNDS):
        solution = _nnls(design * weight[:, None], target * weight)
        residual = np.abs(design @ solution - target)
        scale = 1.4826 * np.median(residual)
        if scale <= 1e-9:
            break
        weight = np.sqrt(np.minimum(1.0, HUBER * scale / np.maximum(residual, 1e-12)))
    return solution


def _nnls(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin over x >= 0 of ||design x - target||, from the normal equations: many rows, few columns."""
    from scipy.linalg import cholesky, solve_triangular  # slow to import, and only fitting needs it
    from scipy.optimize import nnls

    norm = np.sqrt(np.einsum("rc,rc->c", design, design))
    norm = np.where(norm > 0, norm, 1.0)
    gram = (design / norm).T @ (design / norm)
    upper = cholesky(gram + 1e-9 * np.eye(len(gram)))
    found: np.ndarray = nnls(upper, solve_triangular(upper, (design / norm).T @ target, trans="T"))[0] / norm
    return found


def _corrections(ratio: np.ndarray, columns: np.ndarray, num_settings: int) -> np.ndarray:
    """exp of the median log ratio of each setting, drawn towards 1 by `PSEUDO_SAMPLES`, ``[K]``."""
    logs = np.log(np.maximum(ratio, 1e-6))
    order = np.argsort(columns, kind="stable")
    correction = np.ones(num_settings)
    for group in np.split(order, np.flatnonzero(np.diff(columns[order])) + 1):
        share = len(group) / (len(group) + PSEUDO_SAMPLES)
        correction[columns[group[0]]] = np.exp(share * np.median(logs[group]))
    return correction


def _filled(counts: np.ndarray) -> np.ndarray:
    """Counts ``[S, K]`` with a sample's mean where one is not known; 0 where none is."""
    known = np.isfinite(counts)
    mean = np.where(known, counts, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return np.where(known, counts, mean[:, None])


def _filled_vision(counts: np.ndarray, space: KnobSpace) -> np.ndarray:
    """As `_filled`, but from settings that share the value of a knob which the visual tokens follow.

    A sample that was counted at none of these gets what they have on average, scaled as its other counts are.
    """
    counts = counts.copy()
    for axis, name in enumerate(space.names):
        column = space.value_indices[:, axis]
        for index in range(len(space.values(name))):
            block = counts[:, column == index]
            known = np.isfinite(block)
            spread = np.where(known, block, -np.inf).max(axis=1) - np.where(known, block, np.inf).min(axis=1)
            if (known.sum(axis=1) > 1).any() and (spread <= 0).all():
                counts[:, column == index] = np.where(known.any(axis=1)[:, None], _filled(block), np.nan)
    known = np.isfinite(counts)
    if known.any(axis=0).all():
        means = np.where(known, counts, 0).sum(axis=0) / known.sum(axis=0)
        scale = np.where(known, counts, 0).sum(axis=1) / np.maximum((known * means).sum(axis=1), 1e-9)
        counts = np.where(known, counts, means * np.where(known.any(axis=1), scale, 1.0)[:, None])
    return _filled(counts)

"""Why a setting is chosen for one request: its rivals, other budgets, parts of the input, nearest training cases.

A value is on the accuracy scale. Its differences between settings are what training taught the controller; its level is
only as good as where training started, so a predicted accuracy is no promise.

Shapes: K settings, Di and Dl features. Budgets and bounds in ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from budgetvlm._extras import require
from budgetvlm.controller.decision import Decider
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import DataError
from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

STEPS = 64  # of the integral
NO_LIMIT_MS = 1e6
LIKE = 100


@dataclass(frozen=True, eq=False)
class Situation:
    """One budget, as the guard and the controller see it.

    Attributes:
        budget_ms: of the request. seen_ms: what the controller is told, on the clock of the profiled machine.
        bounds_ms: of every setting ``[K]``.
    """

    budget_ms: float
    seen_ms: float
    bounds_ms: np.ndarray

    @property
    def allowed(self) -> np.ndarray:
        """Settings that the budget allows, bool ``[K]``."""
        out: np.ndarray = np.isfinite(self.bounds_ms) & (self.bounds_ms <= self.budget_ms)
        return out


@dataclass(frozen=True)
class Option:
    """A setting for this request.

    Attributes:
        predicted_accuracy: the controller's value, kept within 0 to 1.
        measured_accuracy: mean of the `LIKE` validation samples whose prediction for this setting is nearest; None
            without data.
        bound_ms: None where the controller has no bounds.
    """

    setting: dict[str, float]
    index: int
    predicted_accuracy: float
    bound_ms: float | None
    allowed: bool
    measured_accuracy: float | None = None


@dataclass(frozen=True)
class Parts:
    """What sets the chosen value apart from the mean of the other allowed ones, in accuracy, by part of the input.

    By integrated gradients (Sundararajan et al. 2017) from the mean training image, the mean question and no limit.

    Attributes:
        image, question, budget: their contributions; with ``baseline`` they add up to the difference, but for ``gap``.
        baseline: the difference for an average input.
    """

    image: float
    question: float
    budget: float
    baseline: float
    gap: float

    @property
    def shares(self) -> dict[str, float]:
        """How much of all that moved it, in either direction."""
        sizes = {"image": abs(self.image), "question": abs(self.question), "budget": abs(self.budget)}
        total = sum(sizes.values())
        return {name: size / total if total > 0 else 0.0 for name, size in sizes.items()}


@dataclass(frozen=True)
class Neighbour:
    """A training sample that looks alike to the controller.

    Attributes:
        similarity: mean cosine of the standardised image and question features, -1 to 1.
        accuracy: measured, at the setting that was chosen for the request; None where it was not measured.
        cheapest_right: the setting with the least mean latency among those that were right on it; None: none was.
    """

    sample_id: str
    similarity: float
    labels: dict[str, str]
    accuracy: float | None
    cheapest_right: dict[str, float] | None


class Explainer:
    """Asks a controller about one request.

    Args:
        controller: trained.
        image, language: its features ``[Di]`` and ``[Dl]``.
        price: None: the controller's own.
    """

    def __init__(
        self, controller: GRPOController, image: np.ndarray, language: np.ndarray, price: float | None = None
    ) -> None:
        self.controller, self.decider = controller, Decider(controller)
        self.image, self.language = (np.asarray(part, dtype=np.float32) for part in (image, language))
        self.price = float(controller.default_price) if price is None else price

    def options(
        self, situation: Situation, *, average_image: bool = False, average_question: bool = False
    ) -> list[Option]:
        """All settings, the one that is chosen first, then the other allowed ones by value, then the rest by bound."""
        image = _mean(self.controller.image_input) if average_image else self.image
        language = _mean(self.controller.lang_input) if average_question else self.language
        values = self.decider.values(image, language, situation.seen_ms, self.price)
        reference = float(self.controller.latency_reference_ms)
        accuracy = values + self.price * self.controller.latency_ms.numpy() / reference
        allowed, bounds = situation.allowed, situation.bounds_ms
        order = sorted(range(len(values)), key=lambda k: (not allowed[k], -values[k] if allowed[k] else bounds[k]))
        return [
            Option(
                setting=dict(self.controller.knob_space.settings[k]),
                index=k,
                predicted_accuracy=float(np.clip(accuracy[k], 0.0, 1.0)),
                bound_ms=float(bounds[k]) if 0 < bounds[k] < np.inf else None,
                allowed=bool(allowed[k]),
            )
            for k in order
        ]

    def without(self, situation: Situation, unlimited: Situation) -> dict[str, Option]:
        """What is chosen where one part of the input says nothing."""
        return {
            "an average image": self.options(situation, average_image=True)[0],
            "an average question": self.options(situation, average_question=True)[0],
            "no limit": self.options(unlimited)[0],
        }

    def parts(self, situation: Situation) -> Parts | None:
        """Which part of the input mattered; None where the budget leaves no choice.

        Raises:
            ConfigError: captum is not installed.
        """
        require("captum", "explain", "attribution")
        from captum.attr import IntegratedGradients

        if situation.allowed.sum() < 2:
            return None
        difference = self._difference(situation)
        one = self._tensors(self.image, self.language, situation.seen_ms)
        base = self._tensors(
            _mean(self.controller.image_input), _mean(self.controller.lang_input), max(NO_LIMIT_MS, situation.seen_ms)
        )
        found = IntegratedGradients(difference).attribute(one, baselines=base, n_steps=STEPS)
        image, question, budget = (float(part.sum()) for part in found)
        with torch.no_grad():
            start, end = float(difference(*base)), float(difference(*one))
        return Parts(image, question, budget, start, end - start - image - question - budget)

    def _difference(self, situation: Situation) -> Any:
        """Chosen value minus the mean of the other allowed ones, as a function of tensors; the budget as a logarithm.

        Between "no limit" and a budget of some ms a straight line in ms would lie where nothing changes.
        """
        chosen = self.options(situation)[0].index
        others = situation.allowed.copy()
        others[chosen] = False
        weights = torch.zeros(self.controller.num_settings)
        weights[torch.from_numpy(others)] = -1.0 / float(others.sum())
        weights[chosen] = 1.0

        def difference(image: torch.Tensor, language: torch.Tensor, log_budget: torch.Tensor) -> torch.Tensor:
            logits = self.controller(image, language, log_budget.exp(), self.price)
            return self.controller.setting_logits(logits) @ weights / self.controller.logit_scale

        return difference

    def _tensors(self, image: np.ndarray, language: np.ndarray, budget_ms: float) -> tuple[torch.Tensor, ...]:
        """One state; a budget beyond all bounds is that of the largest, which looks the same to the controller."""
        bounds = self.controller.bounds_ms
        finite = bounds[bounds.isfinite()]
        reference = float(self.controller.latency_reference_ms)
        largest = float(finite.max()) if finite.numel() and finite.max() > 0 else 4.0 * reference
        log_budget = torch.tensor([[min(budget_ms, largest)]]).log()
        return torch.from_numpy(image)[None], torch.from_numpy(language)[None], log_budget

    def checked(self, option: Option, situation: Situation, data: tuple[ProfileTable, Features] | None) -> Option:
        """The option with what was measured where the controller predicted much the same."""
        if data is None or data[0].split is None or "validation" not in data[0].split:
            return option
        table = data[0].subset("validation")
        features = data[1].aligned(table.sample_ids)
        reference = float(self.controller.latency_reference_ms)
        paid = self.price * float(self.controller.latency_ms[option.index]) / reference
        predicted = np.array(
            [
                self.decider.values(image, language, situation.seen_ms, self.price)[option.index] + paid
                for image, language in zip(features.image, features.language, strict=True)
            ]
        ).clip(0.0, 1.0)
        order = np.argsort(np.abs(predicted - option.predicted_accuracy), kind="stable")[:LIKE]
        like = table.accuracy[order, option.index]
        return option if np.isnan(like).all() else replace(option, measured_accuracy=float(np.nanmean(like)))

    def nearest(self, table: ProfileTable, features: Features, chosen: int, count: int = 5) -> list[Neighbour]:
        """The training samples that look most alike to the controller.

        Raises:
            DataError: features of another width than the controller's.
        """
        train = table.subset("train")
        rows = features.aligned(train.sample_ids)
        if rows.image.shape[1] != len(self.image) or rows.language.shape[1] != len(self.language):
            raise DataError(
                f"the data has {rows.image.shape[1]} image and {rows.language.shape[1]} language features a sample, "
                f"this request {len(self.image)} and {len(self.language)}; give the data of this model"
            )
        similarity = (_cosine(rows.image, self.image) + _cosine(rows.language, self.language)) / 2
        order = np.argsort(-similarity, kind="stable")[:count]
        return [_neighbour(train, int(row), float(similarity[row]), chosen) for row in order]


def _mean(layer: Any) -> np.ndarray:
    """The mean training feature."""
    out: np.ndarray = layer.mean.detach().cpu().float().numpy()
    return out


def _cosine(rows: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Cosine of each standardised row with one standardised feature, ``[S]``."""
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    z, w = (rows - mean) / scale, (one - mean) / scale
    out: np.ndarray = z @ w / np.maximum(np.linalg.norm(z, axis=1) * np.linalg.norm(w), 1e-12)
    return out


def _neighbour(train: ProfileTable, row: int, similarity: float, chosen: int) -> Neighbour:
    right = np.flatnonzero(train.accuracy[row] >= 0.5)
    cost = np.nan_to_num(train.latency_ms[row], nan=np.inf)
    accuracy = float(train.accuracy[row, chosen])
    cheapest = train.knob_space.settings[right[cost[right].argmin()]] if len(right) else None
    return Neighbour(
        sample_id=train.sample_ids[row],
        similarity=similarity,
        labels={label: train.groups[label][row] for label in readable_labels(train)},
        accuracy=None if np.isnan(accuracy) else accuracy,
        cheapest_right=None if cheapest is None else dict(cheapest),
    )


@dataclass(frozen=True)
class Explanation:
    """All of it. ``budgets``: the choice at shares of the budget; ``nearest``: empty without data."""

    budget_ms: float
    feasible: bool
    allowed: int
    settings: int
    choice: Option
    next_best: tuple[Option, ...]
    budgets: dict[float, Option]
    without: dict[str, Option]
    parts: Parts | None
    nearest: tuple[Neighbour, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        document = asdict(self)
        document["budgets"] = [
            {"factor": factor, "budget_ms": factor * self.budget_ms, **asdict(option)}
            for factor, option in self.budgets.items()
        ]
        if self.parts is not None:
            document["parts"]["shares"] = self.parts.shares
        return document


def explain(
    explainer: Explainer,
    situations: dict[float, Situation],
    unlimited: Situation,
    data: tuple[ProfileTable, Features] | None = None,
    *,
    rivals: int = 3,
) -> Explanation:
    """Explain the choice at factor 1.0 of ``situations`` (factor of the budget -> situation).

    Raises:
        ConfigError: captum is not installed. DataError: see `Explainer.nearest`.
    """
    here = situations[1.0]
    ranked = explainer.options(here)
    choice = ranked[0]
    return Explanation(
        budget_ms=here.budget_ms,
        feasible=choice.allowed,
        allowed=int(here.allowed.sum()),
        settings=len(ranked),
        choice=explainer.checked(choice, here, data),
        next_best=tuple(explainer.checked(option, here, data) for option in _rivals(ranked, rivals)),
        budgets={
            factor: explainer.checked(explainer.options(s)[0], s, data)
            for factor, s in situations.items()
            if factor != 1.0
        },
        without=explainer.without(here, unlimited),
        parts=explainer.parts(here),
        nearest=tuple(explainer.nearest(*data, choice.index)) if data is not None else (),
    )


def _rivals(ranked: Sequence[Option], count: int) -> list[Option]:
    """The next allowed ones."""
    return [option for option in ranked[1:] if option.allowed][:count]

"""Why a setting is chosen for one request: its rivals, other budgets, parts of the input, nearest training cases.

A value is on the accuracy scale. Its differences between settings are what training taught the controller; its level is
only as good as where training started, so a predicted accuracy is no promise.

Shapes: K settings, Di and Dl features. Budgets and bounds are in ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budgetvlm._extras import require
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.explanation.explanation_records import Attribution, BudgetContext, Explanation, RankedSetting
from budgetvlm.explanation.nearest_cases import nearest_cases
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

INTEGRATION_STEPS = 64
NO_LIMIT_MS = 1e6
NUM_LIKE = 100  # validation samples that a prediction is held against


def explain(
    explainer: Explainer,
    contexts: dict[float, BudgetContext],
    unlimited: BudgetContext,
    data: tuple[ProfileTable, Features] | None = None,
    *,
    rivals: int = 3,
) -> Explanation:
    """Explain the choice at factor 1.0 of ``contexts`` (factor of the budget -> what is seen at it).

    Raises:
        ConfigError: captum is not installed.
        DataError: see `nearest_cases`.
    """
    here = contexts[1.0]
    ranked = explainer.ranked(here)
    choice = ranked[0]
    others = {factor: context for factor, context in contexts.items() if factor != 1.0}
    next_best = [other for other in ranked[1:] if other.allowed][:rivals]
    cases = nearest_cases(*data, explainer.image, explainer.language, choice.index) if data is not None else ()
    return Explanation(
        budget_ms=here.budget_ms,
        feasible=choice.allowed,
        allowed=int(here.allowed.sum()),
        settings=len(ranked),
        choice=explainer.checked(choice, here, data),
        next_best=tuple(explainer.checked(other, here, data) for other in next_best),
        budgets={f: explainer.checked(explainer.ranked(c)[0], c, data) for f, c in others.items()},
        without=explainer.without(here, unlimited),
        parts=explainer.attribution(here),
        nearest=tuple(cases),
    )


class Explainer:
    """Asks a controller about one request.

    Args:
        controller: a trained controller.
        image, language: the features of the request, ``[Di]`` and ``[Dl]``.
        price: the price of latency; None takes the controller's own.
    """

    def __init__(
        self, controller: GRPOController, image: np.ndarray, language: np.ndarray, price: float | None = None
    ) -> None:
        self.controller, self.network = controller, ValueNetwork(controller)
        self.image, self.language = (np.asarray(part, dtype=np.float32) for part in (image, language))
        self.price = float(controller.default_price) if price is None else price

    def ranked(
        self, context: BudgetContext, *, average_image: bool = False, average_question: bool = False
    ) -> list[RankedSetting]:
        """All settings: the chosen one first, then the other allowed ones by value, then the rest by bound."""
        image = _mean(self.controller.image_input) if average_image else self.image
        language = _mean(self.controller.lang_input) if average_question else self.language
        values = self.network.values(image, language, context.seen_ms, self.price)
        accuracy = values + self._paid()
        allowed, bounds = context.allowed, context.bounds_ms
        order = sorted(range(len(values)), key=lambda k: (not allowed[k], -values[k] if allowed[k] else bounds[k]))
        return [
            RankedSetting(
                setting=dict(self.controller.knob_space.settings[k]),
                index=k,
                predicted_accuracy=float(np.clip(accuracy[k], 0.0, 1.0)),
                bound_ms=float(bounds[k]) if 0 < bounds[k] < np.inf else None,
                allowed=bool(allowed[k]),
            )
            for k in order
        ]

    def without(self, context: BudgetContext, unlimited: BudgetContext) -> dict[str, RankedSetting]:
        """What would be chosen if one part of the input said nothing."""
        return {
            "an average image": self.ranked(context, average_image=True)[0],
            "an average question": self.ranked(context, average_question=True)[0],
            "no limit": self.ranked(unlimited)[0],
        }

    def checked(
        self, ranked: RankedSetting, context: BudgetContext, data: tuple[ProfileTable, Features] | None
    ) -> RankedSetting:
        """The setting with the accuracy measured on the validation samples for which much the same is predicted."""
        if data is None or "validation" not in (data[0].split or ()):
            return ranked
        table = data[0].subset("validation")
        features = data[1].aligned(table.sample_ids)
        values = [
            self.network.values(image, language, context.seen_ms, self.price)[ranked.index]
            for image, language in zip(features.image, features.language, strict=True)
        ]
        predicted = np.clip(np.array(values) + self._paid()[ranked.index], 0.0, 1.0)
        order = np.argsort(np.abs(predicted - ranked.predicted_accuracy), kind="stable")[:NUM_LIKE]
        like = table.accuracy[order, ranked.index]
        return ranked if np.isnan(like).all() else replace(ranked, measured_accuracy=float(np.nanmean(like)))

    def attribution(self, context: BudgetContext) -> Attribution | None:
        """Which part of the input mattered, or None where the budget leaves no choice.

        By integrated gradients (Sundararajan et al. 2017) from the mean training image, the mean question and no limit.

        Raises:
            ConfigError: captum is not installed.
        """
        require("captum", "explain", "attribution")
        from captum.attr import IntegratedGradients

        if context.allowed.sum() < 2:
            return None
        difference = self._difference(context)
        here = self._tensors(self.image, self.language, context.seen_ms)
        mean_image, mean_question = _mean(self.controller.image_input), _mean(self.controller.lang_input)
        average = self._tensors(mean_image, mean_question, max(NO_LIMIT_MS, context.seen_ms))
        found = IntegratedGradients(difference).attribute(here, baselines=average, n_steps=INTEGRATION_STEPS)
        image, question, budget = (float(part.sum()) for part in found)
        with torch.no_grad():
            start, end = float(difference(*average)), float(difference(*here))
        return Attribution(image, question, budget, start, end - start - image - question - budget)

    def _difference(self, context: BudgetContext) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The chosen value minus the mean of the other allowed ones, as a function of image, question and log budget.

        The budget is a logarithm because a straight line in ms from "no limit" to a budget would lie almost all where
        nothing changes.
        """
        chosen = self.ranked(context)[0].index
        others = context.allowed.copy()
        others[chosen] = False
        weights = torch.zeros(self.controller.num_settings)
        weights[torch.from_numpy(others)] = -1.0 / float(others.sum())
        weights[chosen] = 1.0

        def difference(image: Tensor, language: Tensor, log_budget: Tensor) -> Tensor:
            logits = self.controller(image, language, log_budget.exp(), self.price)
            return self.controller.setting_logits(logits) @ weights / self.controller.logit_scale

        return difference

    def _tensors(self, image: np.ndarray, language: np.ndarray, budget_ms: float) -> tuple[Tensor, ...]:
        """One state; a budget beyond all bounds is that of the largest, which looks the same to the controller."""
        bounds = self.controller.bounds_ms
        finite = bounds[bounds.isfinite()]
        reference = float(self.controller.latency_reference_ms)
        largest = float(finite.max()) if finite.numel() and finite.max() > 0 else 4.0 * reference
        log_budget = torch.tensor([[min(budget_ms, largest)]]).log()
        return torch.from_numpy(image)[None], torch.from_numpy(language)[None], log_budget

    def _paid(self) -> np.ndarray:
        """What each setting's latency costs in accuracy, ``[K]``: a value is the accuracy minus this."""
        paid: np.ndarray = self.price * self.controller.latency_ms.numpy() / float(self.controller.latency_reference_ms)
        return paid


def _mean(layer: Any) -> np.ndarray:
    """The mean training feature of an input layer."""
    mean: np.ndarray = layer.mean.detach().cpu().float().numpy()
    return mean

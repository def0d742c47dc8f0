"""Policies that may start with a cheap pass: the first step says whether, the second what to do after it.

The second step is a controller of the project that chooses among all settings, what is left of each being its latency;
the setting of the first pass itself stands for answering with what is there.
Shapes: S samples, K settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.provenance import CONFIG
from budgetvlm.controller.run_directory import fingerprint
from budgetvlm.controller.training import fit_controller
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.features import Features
from budgetvlm.guard.recourse import IMAGE_KNOB, SameImage
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import States
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

FOLDS = 3
DECISION_MS = 0.1  # to read the confidences and decide again

Context = tuple[float, float]  # budget in ms, price
Choices = dict[Context, np.ndarray]  # number of a setting in `Material.both`, for all samples


def rest_of(table: ProfileTable, first: int) -> ProfileTable:
    """What is left to do after a first pass; at ``first`` itself: to answer with what is there.

    A second pass reuses the image tokens of the first where it sees the same tiles, else those of the overview crop.
    """
    image, space = table.stages_ms["preprocess"] + table.stages_ms["vision"], table.knob_space
    has_overview = IMAGE_KNOB in space.names and space.values(IMAGE_KNOB)[0] == 1
    overview = image[:, :1] * np.float32(has_overview)
    reused = np.where(SameImage(space).of(first), image[:, [first]], overview)
    left = np.maximum(table.latency_ms - reused, 0) + np.float32(DECISION_MS)
    left[:, first] = DECISION_MS
    return replace(table, latency_ms=left, stages_ms={}, tokens={})


@dataclass(frozen=True, eq=False)
class Material:
    """What all policies share; ``confident`` and ``sure`` are the features with the confidences, or the truth."""

    table: ProfileTable
    first: int
    features: Features
    confident: Features
    sure: Features
    options: EvaluationOptions
    directory: Path

    @cached_property
    def rest(self) -> ProfileTable:
        return rest_of(self.table, self.first)

    @cached_property
    def both(self) -> ProfileTable:
        """All settings after a first pass, then all without one: ``[S, 2 K]``."""
        after = self.rest.latency_ms + self.table.latency_ms[:, [self.first]]
        return replace(
            self.rest,
            knob_space=KnobSpace({"straight": [1, 2], **self.table.knob_space.to_dict()}),
            accuracy=np.tile(self.table.accuracy, 2),
            latency_ms=np.concatenate([after, self.table.latency_ms], axis=1),
        )

    @cached_property
    def reference_ms(self) -> float:
        return SettingMeans.fit(self.table.subset("train")).reference_ms

    @property
    def contexts(self) -> list[Context]:
        budgets = (np.array(self.options.budget_shares) * self.reference_ms).tolist()
        return [(budget, self.options.price) for budget in budgets] + [(np.inf, p) for p in self.options.prices]

    @cached_property
    def fold(self) -> np.ndarray:
        """Fold of each training sample, by image; -1 for all others, int64 ``[S]``."""
        images, number = np.unique(self.table.groups["image_id"], return_inverse=True)
        folds = np.random.default_rng(0).permutation(len(images)) % FOLDS
        return np.where(self.split("train"), folds[number], -1)

    def split(self, *names: str) -> np.ndarray:
        return np.isin(np.array(self.table.split), names)


@dataclass(frozen=True, eq=False)
class Step:
    """Controllers that choose from a table: one of all training samples and, if asked for, one without each fold.

    A training sample is decided by the one that never saw it (``fold``). Prices are for one ``reference_ms``.
    """

    table: ProfileTable
    features: Features
    members: list[GRPOController]
    fold: np.ndarray
    reference_ms: float

    @cached_property
    def guard(self) -> StaticGuard:
        return StaticGuard.fit_table(self.table.subset("train"))

    def choose(self, budget_ms: np.ndarray | float, price: float) -> np.ndarray:
        """Setting of each sample under its budget, ``[S]``."""
        budget = np.maximum(np.full(len(self.table), budget_ms, dtype=np.float64), DECISION_MS)
        feasible, prices = self.guard.feasible_or_cheapest(budget), np.full(len(budget), self._own(price))

        def ask(member: GRPOController, rows: np.ndarray) -> np.ndarray:
            states = States(self.table, self.features, rows, budget[rows], feasible[rows], prices[rows])
            return ControllerPolicy(member).choose(states)

        return self._of_members(ask)

    def values(self, budget_ms: float, price: float) -> np.ndarray:
        """Expected accuracy of each setting less what its time is worth, ``[S, K]``."""

        @torch.no_grad()
        def ask(member: GRPOController, rows: np.ndarray) -> np.ndarray:
            seen = (torch.from_numpy(feature[rows]) for feature in (self.features.image, self.features.language))
            return member.setting_logits(member(*seen, budget_ms, self._own(price))).numpy() / member.logit_scale

        return self._of_members(ask)

    def _own(self, price: float) -> float:
        """A price for one reference latency of this table."""
        return price * self._reference_ms / self.reference_ms

    @cached_property
    def _reference_ms(self) -> float:
        return SettingMeans.fit(self.table.subset("train")).reference_ms

    def _of_members(self, ask: Callable[[GRPOController, np.ndarray], np.ndarray]) -> np.ndarray:
        """What each member says of the samples that are its own, in the order of the samples."""
        own = [np.flatnonzero(self.fold == number) for number in range(-1, len(self.members) - 1)]
        answers = [ask(member, rows) for member, rows in zip(self.members, own, strict=True)]
        return np.concatenate(answers)[np.argsort(np.concatenate(own))]


def train(work: Material, table: ProfileTable, features: Features, seed: int, folds: int, bar: tqdm[Any]) -> Step:
    """GRPO with the defaults of `budgetvlm train`; what an earlier run made of the very same data is used again."""
    fold, members = work.fold if folds else np.full(len(table), -1), []
    for left_out in range(-1, folds):
        part = table.subset((fold != left_out) | (fold == -1))
        seen = features.aligned(part.sample_ids)
        path = work.directory / f"{fingerprint(part, seen)[:16]}-seed{seed}"
        if not (path / CONFIG).exists():
            fit_controller(part, seen, TrainingConfig(seed=seed)).save_pretrained(path)
        members.append(load_controller(path))
        bar.update()
    return Step(table, features, members, fold, work.reference_ms)


def start_where(gain: np.ndarray, seen: np.ndarray, train: np.ndarray, judge: np.ndarray) -> np.ndarray:
    """Where to start with a first pass: nowhere, where a regression expects a gain, or everywhere. bool ``[S]``

    Args:
        gain: reward of starting with one less that of going straight, ``[S]``. seen: what it may depend on, ``[S, D]``.
        train, judge: samples that the regression is fitted on, and those that the three are judged by, bool ``[S]``.
    """
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.geomspace(10, 1e5, 9))).fit(seen[train], gain[train])
    ways = [np.zeros(len(gain), bool), ridge.predict(seen) > 0, np.ones(len(gain), bool)]
    return max(ways, key=lambda use: np.where(use, gain, 0)[judge].mean())


def two_steps(work: Material, one: Step, two: Step) -> tuple[Choices, Choices]:
    """Choices of the two-step policy, and those of one that starts with a pass wherever the budget allows it."""
    both, settings, rows = work.both, work.table.num_settings, np.arange(len(work.table))
    spent_ms, learnt = work.table.latency_ms[:, work.first], work.split("train", "validation")
    some, always = Choices(), Choices()
    for budget, price in work.contexts:
        chosen = np.stack([two.choose(budget - spent_ms, price), settings + one.choose(budget, price)])
        rewards = both.accuracy[rows, chosen] - price / work.reference_ms * both.latency_ms[rows, chosen]
        start = start_where(rewards[0] - rewards[1], one.values(budget, price), work.split("train"), learnt)
        possible = one.guard.bounds_ms[work.first] + DECISION_MS <= budget
        some[budget, price], always[budget, price] = (chosen[np.where(s & possible, 0, 1), rows] for s in (start, True))
    return some, always


def straight(work: Material, step: Step) -> Choices:
    """Choices of a policy that never starts with a pass."""
    return {context: work.table.num_settings + step.choose(*context) for context in work.contexts}


@dataclass(frozen=True, eq=False)
class Chosen:
    """A policy whose choices are known. ``row``: of each sample in them."""

    name: str
    choices: Choices
    row: dict[str, int]

    def choose(self, states: States) -> np.ndarray:
        choices = self.choices[float(states.budget_ms[0]), float(states.price[0])]
        return choices[[self.row[name] for name in states.table.sample_ids]]

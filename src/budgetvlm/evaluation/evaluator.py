"""Evaluation on held-out samples: accuracy under a budget, and mean latency at equal accuracy.

Everything that is learnt, fitted or picked comes from other splits than the one it is measured on. All policies choose
among the settings that the same guard allows, and a request is charged the measured cells of the chosen setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from budgetvlm._version import versions
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.data_sets import said_of_data_sets
from budgetvlm.evaluation.evaluation_data import EvaluationData, learning_part
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.frontier import mixing_path
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics, PriceSweep
from budgetvlm.evaluation.outcomes import (
    BEST_SETTING,
    BEST_SETTING_NOTE,
    BLIND,
    BLIND_NOTE,
    GROUP,
    LOOKUP,
    ORACLE,
    OWN,
    OWN_NOTE,
    PREDICT,
    Contender,
    Outcomes,
    outcomes,
)
from budgetvlm.evaluation.records import EvaluationReport, FrontierPoint, PolicyResult
from budgetvlm.features import Features
from budgetvlm.policies import Cheapest, Full, GroupLookup, LookupTable, Oracle, Policy, RandomFeasible
from budgetvlm.policies.argmax_policy import ArgmaxPolicy
from budgetvlm.policies.budget_grid import grid_and_notes
from budgetvlm.policies.predictor import PredictorConfig, fit_predictor
from budgetvlm.table import ProfileTable

RANDOM_RUNS = 5  # draws of the random policy that are averaged
Progress = Callable[[str], None]


def evaluate(
    table: ProfileTable,
    features: Features,
    policies: Mapping[str, Policy] | None = None,
    options: EvaluationOptions | None = None,
    progress: Progress = lambda text: None,
    own: Policy | None = None,
) -> EvaluationReport:
    """Compare policies with the simple alternatives on one split of a table.

    Args:
        table: a profile table with splits.
        features: the features of its samples (further ones may be there).
        policies: name -> policy, for example one `ControllerPolicy` for each seed; their mean is reported as
            "controller", and where there are several, each of them too.
        options: see `EvaluationOptions`.
        progress: called with the name of each step.
        own: where there are several data sets: controllers of their own, to tell which one a common controller
            sacrifices.

    Raises:
        DataError: a split, features or measurements are missing.
        ConfigError: the options cannot work.
    """
    options = options or EvaluationOptions()
    progress("reading splits")
    data = EvaluationData.of(table, features, options)
    options, notes = with_choice(data, options)
    contenders = list(_contenders(data, dict(policies or {}), options, progress))
    if own is not None:
        contenders.append(Contender(OWN, "labels", (own,), OWN_NOTE, priced=True))
    ceiling = CeilingMetrics.measure(data, options.budget_shares, under_budgets(data, contenders, options, progress))
    sweeps = sweep_prices(data, contenders, options, progress)
    progress("mean latency at equal accuracy")
    mean_budget = MeanBudgetMetrics.measure(data, options, sweeps)
    space = data.test.knob_space
    results = tuple(_results(contenders, ceiling, mean_budget, options))
    return EvaluationReport(
        **common_fields(data, options),
        notes=(*notes, *said_of_data_sets(results), *ceiling.notes(options.room_shares), *mean_budget.notes()),
        options={**asdict(options), "settings": [dict(setting) for setting in space.settings]},
        tuning_split=data.tuning_split,
        knobs=space.to_dict(),
        guard=data.guard.to_dict(),
        statics=_statics(data),
        policies=results,
    )


def under_budgets(
    data: EvaluationData,
    contenders: Iterable[Contender],
    options: EvaluationOptions,
    progress: Progress = lambda text: None,
) -> dict[str, Outcomes]:
    """Let every contender choose for every evaluated sample under every budget; outcomes by name."""
    requests, found = data.under_budgets(options.budget_shares, options.price), {}
    for contender in contenders:
        progress(f"under a budget: {contender.name}")
        found[contender.name] = outcomes(contender, requests)
    return found


def sweep_prices(
    data: EvaluationData,
    contenders: Iterable[Contender],
    options: EvaluationOptions,
    progress: Progress = lambda text: None,
) -> dict[str, PriceSweep]:
    """Let every contender that takes a price choose at every price, without a budget; sweeps by name."""
    prices = options.swept
    ask = partial(data.at_prices, prices, ceiling=options.ceiling)
    tuning, test, found = ask(tuning=True), ask(), {}
    for contender in contenders:
        if contender.priced:
            progress(f"without a budget: {contender.name}")
            found[contender.name] = PriceSweep(prices, outcomes(contender, tuning), outcomes(contender, test))
    return found


def _contenders(
    data: EvaluationData, policies: dict[str, Policy], options: EvaluationOptions, progress: Progress
) -> Iterator[Contender]:
    """The policies given and those they are measured against, fitted on the training split."""
    if policies:
        yield Contender("controller", "controller", tuple(policies.values()), "mean of its runs", priced=True)
    if len(policies) > 1:
        for name, policy in policies.items():
            yield Contender(f"controller {name}", "run", (policy,), "one run", priced=True)
    progress("training predict + argmax")
    predictors = tuple(_predictor(data, options.seed + run) for run in range(max(1, len(policies))))
    yield Contender(PREDICT, "baseline", predictors, "a network predicts each setting's accuracy", priced=True)
    yield Contender(LOOKUP, "baseline", (LookupTable(data.means),), "best single setting for each budget")
    yield Contender("full setting", "baseline", (Full(data.means),), "ignores the budget")
    yield Contender("cheapest", "baseline", (Cheapest(data.means),), "always the cheapest setting")
    random = tuple(RandomFeasible(options.seed + run) for run in range(RANDOM_RUNS))
    yield Contender("random feasible", "baseline", random, "any setting within the budget")
    if labels := tuple(label for label in options.labels if label in data.train.groups):
        group = GroupLookup.fit(data.train, labels, data.means)
        note = f"a lookup table for each group ({' x '.join(labels)}) of training samples; no request tells it"
        yield Contender(GROUP, "labels", (group,), note, priced=True)
    note = "knows the outcome: a bound, partly luck; charged each setting's expected latency"
    yield Contender(ORACLE, "bound", (Oracle(data.means),), note, priced=True, charged_expected=True)


def _predictor(data: EvaluationData, seed: int) -> ArgmaxPolicy:
    """Stopped early on the tuning split, or on a part of the training split that is held out from it."""
    features, tuning_features = data.train_features, data.tuning_features
    assert features is not None and tuning_features is not None
    config = PredictorConfig(seed=seed)
    if data.tuning_split != "train":
        return fit_predictor(data.train, features, data.tuning, tuning_features, config)
    sides = learning_part(data.train, seed)
    train, rest = sides.subset("train"), sides.subset("validation")
    return fit_predictor(train, features.aligned(train.sample_ids), rest, features.aligned(rest.sample_ids), config)


def _results(
    contenders: Sequence[Contender], ceiling: CeilingMetrics, mean_budget: MeanBudgetMetrics, options: EvaluationOptions
) -> Iterator[PolicyResult]:
    """Everything about each contender; the blind mix keeps no budget for a request, so it has only a frontier."""
    for contender in contenders:
        name = contender.name
        yield PolicyResult(
            name=name,
            role=contender.role,
            runs=len(contender.runs),
            note=contender.note,
            at_budget=ceiling.at_budgets(name),
            room=ceiling.room(name, options.room_shares),
            on_dataset=ceiling.on_datasets(name, options.room_shares),
            frontier=mean_budget.frontier(name),
            at_accuracy=mean_budget.at_accuracy(name),
            at_mean_budget=mean_budget.at_mean_budget(name),
        )
    yield PolicyResult(
        name=BLIND,
        role="baseline",
        runs=1,
        note=BLIND_NOTE,
        frontier=mean_budget.frontier(BLIND),
        at_accuracy=mean_budget.at_accuracy(BLIND),
        at_mean_budget=mean_budget.at_mean_budget(BLIND),
    )
    best = mean_budget.best_setting()
    yield PolicyResult(name=BEST_SETTING, role="baseline", runs=1, note=BEST_SETTING_NOTE, at_mean_budget=best)


def with_choice(data: EvaluationData, options: EvaluationOptions) -> tuple[EvaluationOptions, tuple[str, ...]]:
    """The options with budgets that leave a choice, where they name none of their own, and what is to be said."""
    shares, notes = grid_and_notes(options.budget_shares, data.test_bounds_ms, data.means.reference_ms)
    if shares != options.budget_shares:
        options = replace(options, budget_shares=shares, room_range=(0.0, math.inf))
    best = data.means.said_of_best(data.train.knob_space)
    return options, tuple([*notes, best] if best else notes)


def common_fields(data: EvaluationData, options: EvaluationOptions) -> dict[str, Any]:
    """The fields of a `HeldOutReport`, without its options."""
    settings = data.test.knob_space.settings
    return {
        "split": options.split,
        "unit": data.test.unit_name,
        "counts": data.counts,
        "latency_reference_ms": data.means.reference_ms,
        "full_accuracy": data.full_accuracy,
        "best_setting": None if data.best == data.means.full else dict(settings[data.best]),
        "best_accuracy": float(data.test_means.accuracy[data.best]),
        "room_budget_shares": options.room_shares,
        "versions": versions("numpy", "torch"),
    }


def _statics(data: EvaluationData) -> tuple[FrontierPoint, ...]:
    """Every measured setting on the evaluated split; ``vertex``: its place on the blind mix's path."""
    latency, accuracy = data.test_means.latency_ms, data.test_means.accuracy
    path = mixing_path(data.means.latency_ms, data.means.accuracy)
    rank = {int(k): place for place, k in enumerate(path)}
    columns = np.flatnonzero(data.guard.measured)
    return tuple(FrontierPoint(None, None, float(latency[k]), float(accuracy[k]), rank.get(int(k))) for k in columns)

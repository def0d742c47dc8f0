"""Evaluation on held-out samples: accuracy under a budget, and mean latency at equal accuracy.

Everything that is learnt, fitted or picked comes from other splits than the one it is measured on. All policies choose
among the settings that the same guard allows, and a request is charged the measured cells of the chosen setting.
Shapes: S samples, K settings, P budgets or prices, R resamples.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import numpy as np

from budgetvlm._version import __version__
from budgetvlm.errors import DataError
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.frontier import mixing_path
from budgetvlm.evaluation.intervals import Bootstrap
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics
from budgetvlm.evaluation.outcomes import BLIND, GROUP, LOOKUP, ORACLE, PREDICT, Contender, EvaluationData
from budgetvlm.evaluation.records import EvaluationReport, FrontierPoint, PolicyResult
from budgetvlm.evaluation.task_properties import complete_rows
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies import (
    Cheapest,
    Full,
    GroupLookup,
    LookupTable,
    Oracle,
    Policy,
    RandomFeasible,
)
from budgetvlm.policies.predictor import PredictArgmax, PredictorConfig
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

RANDOM_RUNS = 5  # draws of the random policy that are averaged


def evaluate(
    table: ProfileTable,
    features: Features,
    policies: Mapping[str, Policy] | None = None,
    options: EvaluationOptions | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> EvaluationReport:
    """Compare policies with the simple alternatives on one split of a table.

    Args:
        table: a profile table with splits.
        features: of its samples (more may be there).
        policies: name -> policy, for example one `ControllerPolicy` a seed; their mean is reported as "controller",
            and where there are several, each of them too.
        options: see `EvaluationOptions`.
        progress: called with the name of each step.

    Raises:
        DataError: a split, features or measurements are missing.
        ConfigError: options that cannot work.
    """
    options = options or EvaluationOptions()
    progress("reading splits")
    bench = evaluation_data(table, features, options)
    contenders = list(_contenders(bench, dict(policies or {}), options, progress))
    budget_face = CeilingMetrics.measure(bench, contenders, options.budget_shares, options.price, progress)
    progress("mean latency at equal accuracy")
    price_face = MeanBudgetMetrics.measure(bench, contenders, options.prices, options.accuracy_shares, progress)
    results = [_result(contender, budget_face, price_face, options) for contender in contenders]
    return _report(bench, [*results, _blind_mix(price_face)], options)


def _result(
    contender: Contender, budget_face: CeilingMetrics, price_face: MeanBudgetMetrics, options: EvaluationOptions
) -> PolicyResult:
    name = contender.name
    return PolicyResult(
        name=name,
        role=contender.role,
        runs=len(contender.runs),
        note=contender.note,
        at_budget=budget_face.at_budgets(name),
        room=budget_face.room(name, options.room_shares),
        frontier=price_face.frontier(name),
        at_accuracy=price_face.at_accuracy(name),
    )


def _blind_mix(price_face: MeanBudgetMetrics) -> PolicyResult:
    """The best input-blind mix has no budget for each request, only a frontier."""
    note = "settings drawn at random, whatever the input; picked on the training samples"
    frontier, at_accuracy = price_face.frontier(BLIND), price_face.at_accuracy(BLIND)
    return PolicyResult(BLIND, "baseline", 1, note, frontier=frontier, at_accuracy=at_accuracy)


def evaluation_data(table: ProfileTable, features: Features | None, options: EvaluationOptions) -> EvaluationData:
    """The splits, averages, guard and resamples that all policies share.

    Raises:
        DataError: a split or the features of a sample are missing, or no sample was measured at every setting.
    """
    if table.split is not None and options.split not in table.split:
        sides = ", ".join(sorted(set(table.split)))
        raise DataError(f"no {options.split} samples to evaluate on; this table has: {sides}. Choose another split.")
    train = table.subset("train")
    tuning_split = "validation" if _has(table, "validation") and options.split != "validation" else "train"
    expected, guard = SettingMeans.fit(train), StaticGuard.fit_table(train, options.guard_quantile)
    measured = expected.measured & guard.measured
    if not measured.any():
        raise DataError(
            "no setting has both accuracy and latency measured on the training samples; profile both and prepare again"
        )
    guard = StaticGuard(np.where(measured, guard.bounds_ms, np.inf), guard.quantile)
    evaluated = table.subset(options.split)
    test, tuning = complete_rows(evaluated, measured), complete_rows(table.subset(tuning_split), measured)
    images = test.groups.get("image_id", test.sample_ids)
    return EvaluationData(
        train=train,
        tuning=tuning,
        test=test,
        train_features=_aligned(features, train),
        tuning_features=_aligned(features, tuning),
        test_features=_aligned(features, test),
        tuning_split=tuning_split,
        left_out=evaluated.num_samples - test.num_samples,
        expected=expected,
        guard=guard,
        bootstrap=Bootstrap.draw(images, options.resamples, options.level, options.seed),
    )


def _aligned(features: Features | None, table: ProfileTable) -> Features | None:
    return None if features is None else features.aligned(table.sample_ids)


def _has(table: ProfileTable, split: str) -> bool:
    return table.split is not None and split in table.split


def _contenders(
    bench: EvaluationData, policies: dict[str, Policy], options: EvaluationOptions, progress: Callable[[str], None]
) -> Iterator[Contender]:
    """The policies given and those they are measured against, fitted on the training split."""
    if policies:
        yield Contender("controller", "controller", tuple(policies.values()), "mean of its runs", priced=True)
    if len(policies) > 1:
        for name, policy in policies.items():
            yield Contender(f"controller {name}", "run", (policy,), "one run", priced=True)
    progress("training predict + argmax")
    predictors = tuple(_predictor(bench, options.seed + run) for run in range(max(1, len(policies))))
    yield Contender(PREDICT, "baseline", predictors, "a network predicts each setting's accuracy", priced=True)
    expected = bench.expected
    yield Contender(LOOKUP, "baseline", (LookupTable(expected),), "best single setting for each budget")
    yield Contender("full setting", "baseline", (Full(),), "ignores the budget")
    yield Contender("cheapest", "baseline", (Cheapest(expected),), "always the cheapest setting")
    random = tuple(RandomFeasible(options.seed + run) for run in range(RANDOM_RUNS))
    yield Contender("random feasible", "baseline", random, "any setting within the budget")
    if set(options.labels) <= set(bench.train.groups):
        group = GroupLookup.fit(bench.train, options.labels, expected)
        note = f"knows the group ({' x '.join(options.labels)}): a bound on what is visible, no competitor"
        yield Contender(GROUP, "bound", (group,), note, priced=True)
    note = "knows the outcome: a bound, partly luck; charged each setting's expected latency"
    yield Contender(ORACLE, "bound", (Oracle(expected),), note, priced=True, charged_expected=True)


def _predictor(bench: EvaluationData, seed: int) -> PredictArgmax:
    """Stopped early on the tuning split, or on a part of the training split that is held out from it."""
    config = PredictorConfig(seed=seed)
    all_features, tuning_features = bench.train_features, bench.tuning_features
    assert all_features is not None and tuning_features is not None
    if bench.tuning_split != "train":
        return PredictArgmax.fit(bench.train, all_features, bench.tuning, tuning_features, config)
    images = np.asarray(bench.train.groups.get("image_id", bench.train.sample_ids))
    names = np.unique(images)
    held_out = np.isin(images, np.random.default_rng(seed).permutation(names)[: max(1, len(names) // 7)])
    if held_out.all():
        raise DataError("the training split has a single image; predict + argmax needs some to stop early on")
    part, rest = bench.train.subset(~held_out), bench.train.subset(held_out)
    return PredictArgmax.fit(
        part, all_features.aligned(part.sample_ids), rest, all_features.aligned(rest.sample_ids), config
    )


def _report(bench: EvaluationData, results: list[PolicyResult], options: EvaluationOptions) -> EvaluationReport:
    return EvaluationReport(
        split=options.split,
        tuning_split=bench.tuning_split,
        counts=bench.counts,
        latency_reference_ms=bench.expected.reference_ms,
        full_accuracy=float(bench.test.accuracy[:, -1].mean(dtype=np.float64)),
        room_budget_shares=options.room_shares,
        options={**asdict(options), "settings": [dict(setting) for setting in bench.test.knob_space.settings]},
        versions=versions(),
        knobs=bench.test.knob_space.to_dict(),
        guard=bench.guard.to_dict(),
        statics=_statics(bench),
        policies=tuple(results),
    )


def _statics(bench: EvaluationData) -> tuple[FrontierPoint, ...]:
    """Every measured setting on the evaluated split; ``vertex``: its place on the blind mix's path."""
    accuracy, latency = bench.test_means
    path = mixing_path(bench.expected.latency_ms, bench.expected.accuracy)
    rank = {int(k): place for place, k in enumerate(path)}
    columns = np.flatnonzero(bench.measured)
    return tuple(FrontierPoint(None, None, float(latency[k]), float(accuracy[k]), rank.get(int(k))) for k in columns)


def versions() -> dict[str, str]:
    """What a report was made with."""
    import torch

    return {
        "budgetvlm": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }

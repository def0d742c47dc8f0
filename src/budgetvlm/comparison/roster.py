"""The policies that `budgetvlm compare` compares: what each is called, what it needs, how it is fitted.

Others take part when their entries are handed to `budgetvlm.comparison.compare`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from budgetvlm.evaluation.outcomes import GROUP, LOOKUP, ORACLE, PREDICT
from budgetvlm.policies import Full, GroupLookup, LookupTable, Oracle, Policy

if TYPE_CHECKING:
    from budgetvlm.comparison.fitting_data import FittingData
    from budgetvlm.controller.training_options import TrainingConfig

Fit = Callable[["FittingData", int], Policy]  # from the data and a seed to a policy


@dataclass(frozen=True)
class Entry:
    """One policy of a comparison.

    Attributes:
        key: its name on the command line and in file names. name: its name in tables.
        fit: fits it; see `Fit`. note: what it does, in a few words.
        role: "controller" (the project's own), "baseline", "variant" (of GRPO), "labels" (knows the true ones) or
            "bound" (knows the outcome).
        features, labels: whether it reads the features, and the labels of the groups.
        drawn: whether another seed gives another policy.
        priced: whether it takes a price and so has a frontier.
        quick: whether ``--quick`` includes it.
    """

    key: str
    name: str
    fit: Fit
    note: str
    role: str = "baseline"
    features: bool = True
    labels: bool = False
    drawn: bool = True
    priced: bool = True
    quick: bool = False


def training_config(data: FittingData, seed: int, grpo: dict[str, Any], **network: Any) -> TrainingConfig:
    """The defaults of `budgetvlm train` for at most the comparison's number of epochs, with changes."""
    from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig

    return TrainingConfig(grpo=GRPOConfig(**{"num_epochs": data.num_epochs, **grpo}), seed=seed, **network)


def _controller(data: FittingData, seed: int) -> Policy:
    from budgetvlm.controller.policy import ControllerPolicy
    from budgetvlm.controller.training import fit_controller

    config = training_config(data, seed, {}, teachers=1)
    return ControllerPolicy(fit_controller(data.table, data.given, config))


def _ensemble(data: FittingData, seed: int) -> Policy:
    from budgetvlm.controller.policy import ControllerPolicy
    from budgetvlm.controller.training import fit_controller

    config = training_config(data, seed, {}, hidden_dim=128)
    return ControllerPolicy(fit_controller(data.table, data.given, config, members=data.members))


def _predictor(data: FittingData, seed: int) -> Policy:
    from budgetvlm.policies.predictor import PredictorConfig, fit_predictor

    config = PredictorConfig(num_epochs=min(PredictorConfig.num_epochs, data.num_epochs), seed=seed)
    return fit_predictor(*data.sides, config)


def _nearest(data: FittingData, seed: int) -> Policy:
    from budgetvlm.policies.nearest import fit_nearest

    return fit_nearest(*data.sides)


def _group(data: FittingData, seed: int) -> Policy:
    return GroupLookup.fit(data.train, data.labels, data.means)


_ENTRIES = (
    Entry("grpo", "GRPO", _controller, "the project's controller", "controller", quick=True),
    Entry("grpo_ensemble", "GRPO, ensemble", _ensemble, "several small controllers averaged in one", "controller"),
    Entry("lookup", LOOKUP, lambda data, seed: LookupTable(data.means), "best single setting for each budget",
          features=False, drawn=False, priced=False, quick=True),
    Entry("full", "full setting", lambda data, seed: Full(data.means), "ignores the budget",
          features=False, drawn=False, priced=False, quick=True),
    Entry("knn", "kNN", _nearest, "accuracy of the nearest samples", drawn=False, quick=True),
    Entry("predict", PREDICT, _predictor, "a network predicts each setting's accuracy", quick=True),
    Entry("group", GROUP, _group, "knows the true labels, which no request tells", "labels",
          features=False, labels=True, drawn=False, quick=True),
    Entry("oracle", ORACLE, lambda data, seed: Oracle(data.means), "knows the outcome: a bound, partly luck", "bound",
          features=False, drawn=False, quick=True),
)  # fmt: skip
ROSTER: dict[str, Entry] = {entry.key: entry for entry in _ENTRIES}
ALWAYS = ("lookup", "group", "oracle")  # what others are measured by

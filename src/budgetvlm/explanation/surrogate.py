"""A small decision tree that imitates a controller: it shows the whole policy at a glance, and how faithful it is.

The tree sees the budget and the table's readable labels (which the controller never sees as such), or, where there are
none, the first principal components of its features. Shapes: S samples, P budgets, F inputs of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.errors import DataError
from budgetvlm.evaluation.evaluation_data import complete_rows
from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.features import Features
from budgetvlm.guard.input_bounds import fit_guard
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies import States
from budgetvlm.policies.budget_grid import BUDGET_SHARES, grid_with_choice
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

COMPONENTS = 4  # of each feature, where there are no labels
LEAVES = 16
Describe = Callable[[ProfileTable, Features], np.ndarray]


@dataclass(frozen=True)
class Surrogate:
    """The tree and how faithful it is.

    Attributes:
        text: one line for each node. leaves: the number of leaves. inputs: what the tree sees.
        split: the held-out samples on which the rest is measured, over all budgets.
        fidelity: share of the requests for which the tree chooses the same setting as the controller.
        one_setting: the same share for the controller's most frequent choice at each budget.
        accuracy, controller_accuracy: measured accuracy of the tree's and of the controller's choices.
    """

    text: str
    leaves: int
    inputs: tuple[str, ...]
    split: str
    fidelity: float
    one_setting: float
    accuracy: float
    controller_accuracy: float


def surrogate(
    controller: GRPOController, table: ProfileTable, features: Features, *, leaves: int = LEAVES, seed: int = 0
) -> Surrogate:
    """Fit the tree on the controller's choices for the training split, and measure it on "test" (or "validation").

    Raises:
        DataError: there are no training or held-out samples, or nothing was measured on them.
    """
    from sklearn.tree import DecisionTreeClassifier

    # Choices of the controller on the training and on the held-out samples.
    side = _held_out_split(table)
    train = table.subset("train")
    train_features, reference_ms = features.aligned(train.sample_ids), SettingMeans.fit(train).reference_ms
    guard = fit_guard(train, train_features)
    shares = grid_with_choice(BUDGET_SHARES, guard.bounds_of(train_features), reference_ms)
    budgets_ms = [share * reference_ms for share in shares]
    rest = complete_rows(table.subset(side), guard.measured)
    sides = [(part, features.aligned(part.sample_ids)) for part in (train, rest)]
    fitted, held_out = (_choices(controller, *side, guard, budgets_ms) for side in sides)
    # The tree learns the former and is measured on the latter.
    names, describe = _describer(*sides[0])
    inputs = [_with_budgets(describe(*side), shares) for side in sides]
    tree = DecisionTreeClassifier(max_leaf_nodes=leaves, random_state=seed)
    tree.fit(inputs[0], fitted.reshape(-1))
    guess = tree.predict(inputs[1]).reshape(held_out.shape)
    frequent = np.stack([np.bincount(row).argmax() for row in fitted])[:, None]
    return Surrogate(
        text=_readable(tree, names, [_short(table, int(k)) for k in tree.classes_], leaves),
        leaves=int(tree.get_n_leaves()),
        inputs=("budget (× full)", *names),
        split=side,
        fidelity=float((guess == held_out).mean()),
        one_setting=float((frequent == held_out).mean()),
        accuracy=_accuracy(rest, guess),
        controller_accuracy=_accuracy(rest, held_out),
    )


def _held_out_split(table: ProfileTable) -> str:
    for side in ("test", "validation"):
        if side in (table.split or ()):
            return side
    raise DataError("a surrogate tree is measured on held-out samples, and the data has no test or validation split")


def _accuracy(table: ProfileTable, chosen: np.ndarray) -> float:
    """Mean accuracy of the settings chosen ``[P, S]``."""
    return float(table.accuracy[np.arange(table.num_samples), chosen].mean(axis=1).mean())


def _choices(
    controller: GRPOController, table: ProfileTable, features: Features, guard: StaticGuard, budgets_ms: Sequence[float]
) -> np.ndarray:
    """Settings chosen, ``[P, S]``."""
    policy, price = ControllerPolicy(controller), float(controller.default_price)
    return np.stack([policy.choose(States.under_budget(table, features, guard, b, price)) for b in budgets_ms])


def _with_budgets(inputs: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Every sample ``[S, F]`` under every budget, ``[P * S, 1 + F]``."""
    budgets = np.repeat(shares, len(inputs))[:, None]
    return np.hstack([budgets, np.tile(inputs, (len(shares), 1))])


def _describer(train: ProfileTable, features: Features) -> tuple[list[str], Describe]:
    """The names of the tree's inputs besides the budget, and what computes them ``[S, F]`` for other samples too."""
    labels = readable_labels(train)
    if labels:
        pairs = [(label, value) for label, values in labels.items() for value in values]

        def one_hot(table: ProfileTable, features: Features) -> np.ndarray:
            return np.stack([np.array(table.groups[label]) == value for label, value in pairs], axis=1).astype(float)

        return [f"{label}={value}" for label, value in pairs], one_hot
    from sklearn.decomposition import PCA

    sides = {what: getattr(features, what) for what in ("image", "language")}
    fits = {what: PCA(min(COMPONENTS, *x.shape), random_state=0).fit(x) for what, x in sides.items()}

    def components(table: ProfileTable, features: Features) -> np.ndarray:
        return np.hstack([pca.transform(getattr(features, what)) for what, pca in fits.items()])

    return [f"{what} component {i + 1}" for what, pca in fits.items() for i in range(pca.n_components_)], components


def _short(table: ProfileTable, index: int) -> str:
    return " / ".join(f"{value:g}" for value in table.knob_space.settings[index].values())


def _readable(tree: Any, names: Sequence[str], classes: Sequence[str], depth: int) -> str:
    """The tree with "kind=read" and "not kind=read" in place of comparisons with a half."""
    from sklearn.tree import export_text

    text = export_text(tree, feature_names=["budget", *names], class_names=classes, decimals=2, max_depth=depth)
    for name in names:
        text = text.replace(f"{name} <= 0.50", f"not {name}").replace(f"{name} >  0.50", name)
    return str(text.replace("class: ", "→ ").rstrip())

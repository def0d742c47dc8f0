"""Every policy that is compared: what it is called, what it needs, how it is fitted.

To add one, write a function from `FittingData` and a seed to a policy and give it a line in `ROSTER`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from budgetvlm.evaluation.outcomes import GROUP, LOOKUP, ORACLE, PREDICT
from budgetvlm.policies import (
    BestStatic,
    Cheapest,
    Full,
    Greedy,
    GroupLookup,
    LookupTable,
    Oracle,
    Policy,
    RandomFeasible,
)

if TYPE_CHECKING:
    from budgetvlm.comparison.fitting_data import FittingData
    from budgetvlm.controller.training import MakeLoss
    from budgetvlm.controller.training_options import TrainingConfig

Fit = Callable[["FittingData", int], Policy]


@dataclass(frozen=True)
class Entry:
    """One policy.

    Attributes:
        name: in tables. fit: see `Fit`. note: what it does, in a few words.
        role: "controller" (the project's own), "baseline", "variant" (of GRPO) or "bound" (knows what cannot be known).
        features: whether it reads them. drawn: whether another seed gives another policy. priced: whether it takes a
            price and so has a frontier. quick: whether ``--quick`` has it.
    """

    name: str
    fit: Fit
    note: str
    role: str = "baseline"
    features: bool = True
    drawn: bool = True
    priced: bool = True
    quick: bool = False


def _config(material: FittingData, seed: int, grpo: dict[str, Any], **network: Any) -> TrainingConfig:
    from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig

    return TrainingConfig(grpo=GRPOConfig(**{"num_epochs": material.num_epochs, **grpo}), seed=seed, **network)


def _trained(make_loss: str | None = None, teachers: int = 0, **grpo: Any) -> Fit:
    """A controller trained by the project's trainer, with another loss (a name of `_losses`) or other options."""

    def fit(material: FittingData, seed: int) -> Policy:
        from budgetvlm.controller.fitting import fit_controller
        from budgetvlm.controller.policy import ControllerPolicy

        loss = _losses()[make_loss] if make_loss else None
        config = _config(material, seed, grpo, teachers=teachers)
        return ControllerPolicy(fit_controller(material.table, material.given, config, loss).controller)

    return fit


def _losses() -> dict[str, MakeLoss]:
    from budgetvlm.controller import losses
    from budgetvlm.controller.network import GRPOController

    def ppo(controller: GRPOController) -> losses.PPO:
        basis = controller.budget_embedding.linear.in_features + controller.price_embedding.linear.in_features
        return losses.PPO(controller.feature_layer.in_features + basis)

    def dpo(controller: GRPOController) -> losses.DPO:
        start = controller.heads.bias[controller.head_sum.shape[0] :] * controller.logit_scale
        return losses.DPO(start.detach().clone())

    return {
        "reinforce": lambda controller: losses.Reinforce(),
        "ppo": ppo,
        "dpo": dpo,
        "cross_entropy": lambda controller: losses.OracleCrossEntropy(),
        "regret": lambda controller: losses.OracleCrossEntropy(by_regret=True),
    }


def _ensemble(material: FittingData, seed: int) -> Policy:
    from budgetvlm.controller.fitting import fit_ensemble
    from budgetvlm.controller.policy import ControllerPolicy

    config = _config(material, seed, {}, hidden_dim=128)
    return ControllerPolicy(fit_ensemble(material.table, material.given, config, material.members))


def _network(members: bool = False) -> Fit:
    def fit(material: FittingData, seed: int) -> Policy:
        from dataclasses import replace

        from budgetvlm.controller.fitting import member_seeds
        from budgetvlm.policies.predictor import PredictArgmax, PredictorConfig, PredictorEnsemble

        train, validation, features = material.train, material.validation, material.given
        known = features.aligned(train.sample_ids), features.aligned(validation.sample_ids)
        config = PredictorConfig(num_epochs=min(PredictorConfig.num_epochs, material.num_epochs))
        seeds = member_seeds(seed, material.members) if members else (seed,)
        fitted = [PredictArgmax.fit(train, known[0], validation, known[1], replace(config, seed=s)) for s in seeds]
        return PredictorEnsemble(tuple(fitted)) if members else fitted[0]

    return fit


def _learnt(method: str) -> Fit:
    def fit(material: FittingData, seed: int) -> Policy:
        from budgetvlm.policies import supervised as learnt

        train, validation, features = material.train, material.validation, material.given
        known = features.aligned(train.sample_ids), features.aligned(validation.sample_ids)
        policy: Policy = getattr(learnt, method)(train, known[0], validation, known[1])
        return policy

    return fit


def _bandit(material: FittingData, seed: int) -> Policy:
    from budgetvlm.policies.bandit import ContextualBandit

    return ContextualBandit.fit(material.train, material.given.aligned(material.train.sample_ids), seed)


def _lookup_by(count: int | None) -> Fit:
    """A lookup table for each group, by the first so many labels."""

    def fit(material: FittingData, seed: int) -> Policy:
        return GroupLookup.fit(material.train, material.labels[:count], material.expected)

    return fit


def _blind(make: Fit) -> dict[str, Any]:
    """Of a policy that reads no input."""
    return {"fit": make, "features": False, "drawn": False}


ROSTER: dict[str, Entry] = {
    "grpo": Entry("GRPO", _trained(teachers=1), "the project's controller", "controller", quick=True),
    "grpo_cold": Entry("GRPO, cold start", _trained(), "starts from the lookup table", "variant"),
    "grpo_ensemble": Entry("GRPO, ensemble", _ensemble, "several small controllers averaged in one", "controller"),
    "lookup": Entry(LOOKUP, note="best single setting for each budget", priced=False, quick=True,
                    **_blind(lambda m, seed: LookupTable(m.expected))),
    "full": Entry("full setting", note="ignores the budget", priced=False, quick=True,
                  **_blind(lambda m, seed: Full())),
    "cheapest": Entry("cheapest", note="always the cheapest setting", priced=False, quick=True,
                      **_blind(lambda m, seed: Cheapest(m.expected))),
    "static": Entry("best static", note="one setting for all budgets", priced=False, quick=True,
                    **_blind(lambda m, seed: BestStatic.fit(m.expected, m.guard, m.budgets_ms))),
    "random": Entry("random affordable", lambda m, seed: RandomFeasible(seed), "any setting within the budget",
                    features=False, priced=False, quick=True),
    "greedy": Entry("greedy", note="visual tokens, then depth, then width", priced=False, quick=True,
                    **_blind(lambda m, seed: Greedy.of(m.table.knob_space, m.expected))),
    "knn": Entry("kNN", _learnt("knn"), "accuracy of the nearest samples", drawn=False, quick=True),
    "logistic": Entry("logistic + argmax", _learnt("logistic"), "predicts each setting's accuracy", drawn=False,
                      quick=True),
    "trees": Entry("boosted trees + argmax", _learnt("boosted_trees"), "predicts each setting's accuracy", drawn=False),
    "predict": Entry(PREDICT, _network(), "a network predicts each setting's accuracy", quick=True),
    "predict_ensemble": Entry("predict, ensemble", _network(members=True), "several such networks averaged"),
    "cross_entropy": Entry("cross-entropy on oracle", _trained("cross_entropy", entropy_coef=0.0),
                           "imitates the best choice in hindsight"),
    "regret": Entry("regret-weighted classes", _trained("regret", entropy_coef=0.0),
                    "the same, weighted by what a random choice loses"),
    "exact": Entry("exact policy gradient", _trained(entropy_coef=0.0), "all settings, no entropy bonus", "variant"),
    "reinforce": Entry("REINFORCE", _trained("reinforce", num_generations=8), "8 drawn settings, moving baseline"),
    "ppo": Entry("PPO", _trained("ppo", num_generations=8, num_iterations=2),
                 "8 drawn settings, clipped, value network"),
    "dpo": Entry("DPO", _trained("dpo", entropy_coef=0.0), "pairs of settings, better and worse"),
    "bandit": Entry("contextual bandit (VW)", _bandit, "sees one setting's answer a sample and pass"),
    "grpo_8": Entry("GRPO G=8", _trained(num_generations=8), "8 drawn settings", "variant"),
    "grpo_8_batch": Entry("GRPO G=8 batch std", _trained(num_generations=8, scale_rewards="batch"),
                          "scale_rewards=batch", "variant"),
    "grpo_8_group": Entry("GRPO G=8 group std", _trained(num_generations=8, scale_rewards="group"),
                          "scale_rewards=group, as the textbook", "variant"),
    "grpo_8_cispo": Entry("GRPO G=8 cispo", _trained(num_generations=8, loss_type="cispo"), "loss_type=cispo",
                          "variant"),
    "grpo_8_iterations": Entry("GRPO G=8 4 iterations", _trained(num_generations=8, num_iterations=4, epsilon=0.2),
                               "num_iterations=4, epsilon=0.2", "variant"),
    "grpo_8_beta": Entry("GRPO G=8 beta=0.04", _trained(num_generations=8, beta=0.04), "KL to the lookup table",
                         "variant"),
    "grpo_32": Entry("GRPO G=32", _trained(num_generations=32), "32 drawn settings", "variant"),
    "kind": Entry("lookup by first label", _lookup_by(1), "knows the first label", "bound", features=False,
                  drawn=False),
    "group": Entry(GROUP, _lookup_by(None), "knows all labels: a bound on what is visible", "bound",
                   features=False, drawn=False, quick=True),
    "oracle": Entry(ORACLE, lambda m, seed: Oracle(m.expected), "knows the outcome: a bound, partly luck", "bound",
                    features=False, drawn=False, quick=True),
}  # fmt: skip
ALWAYS = ("lookup", "group", "oracle")  # what others are measured by
QUICK = tuple(key for key, entry in ROSTER.items() if entry.quick)

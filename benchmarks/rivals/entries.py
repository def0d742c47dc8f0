"""The rivals as entries of a comparison: `compare(table, features, entries=RIVALS)`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.rivals import losses
from benchmarks.rivals.bandit import ContextualBandit
from benchmarks.rivals.simple import BestStatic, Greedy
from benchmarks.rivals.supervised import boosted_trees, logistic
from budgetvlm.comparison import Entry, FittingData
from budgetvlm.comparison.roster import Fit, training_config
from budgetvlm.controller.ensemble import member_seeds
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.controller.training import MakeLoss, fit_controller
from budgetvlm.policies import Cheapest, GroupLookup, Policy, RandomFeasible
from budgetvlm.policies.argmax_policy import ArgmaxPolicy
from budgetvlm.policies.predictor import PredictorConfig, fit_predictors


def trained(make_loss: MakeLoss | None = None, **grpo: Any) -> Fit:
    """A controller trained by the project's trainer from the lookup table, with another loss or other options."""

    def fit(data: FittingData, seed: int) -> Policy:
        config = training_config(data, seed, grpo, teachers=0)
        return ControllerPolicy(fit_controller(data.table, data.given, config, make_loss))

    return fit


def ppo_loss(controller: GRPOController) -> losses.PPO:
    """PPO with a value network as wide as the controller's input."""
    basis = controller.budget_embedding.linear.in_features + controller.price_embedding.linear.in_features
    return losses.PPO(controller.feature_layer.in_features + basis)


def dpo_loss(controller: GRPOController) -> losses.DPO:
    """DPO whose reference is the untrained controller, which chooses as the lookup table does."""
    start = controller.heads.bias[controller.head_sum.shape[0] :] * controller.logit_scale
    return losses.DPO(start.detach().clone())


def predictor_ensemble(data: FittingData, seed: int) -> Policy:
    """The mean of several networks' predicted accuracies, then argmax."""
    config = PredictorConfig(num_epochs=min(PredictorConfig.num_epochs, data.num_epochs))
    seeds = member_seeds(seed, data.members)
    members = fit_predictors(*data.sides, config, seeds)

    def predict(image: np.ndarray, language: np.ndarray) -> np.ndarray:
        mean: np.ndarray = np.mean([member.predict(image, language) for member in members], axis=0)
        return mean

    return ArgmaxPolicy(data.means, predict, "predict, ensemble")


def _bandit(data: FittingData, seed: int) -> Policy:
    train, features, _, _ = data.sides
    return ContextualBandit.fit(train, features, seed)


def _blind(key: str, name: str, fit: Fit, note: str, *, drawn: bool = False) -> Entry:
    """The entry of a policy that reads no input and takes no price."""
    return Entry(key, name, fit, note, features=False, drawn=drawn, priced=False, quick=True)


RIVALS = (
    _blind("cheapest", "cheapest", lambda data, seed: Cheapest(data.means), "always the cheapest setting"),
    _blind("static", "best static", lambda data, seed: BestStatic.fit(data.means, data.guard, data.budgets_ms),
           "one setting for all budgets"),
    _blind("random", "random affordable", lambda data, seed: RandomFeasible(seed), "any setting within the budget",
           drawn=True),
    _blind("greedy", "greedy", lambda data, seed: Greedy.of(data.table.knob_space, data.means),
           "visual tokens, then depth, then width"),
    Entry("logistic", "logistic + argmax", lambda data, seed: logistic(*data.sides),
          "predicts each setting's accuracy", drawn=False, quick=True),
    Entry("trees", "boosted trees + argmax", lambda data, seed: boosted_trees(*data.sides),
          "predicts each setting's accuracy", drawn=False),
    Entry("predict_ensemble", "predict, ensemble", predictor_ensemble, "several predicting networks averaged"),
    Entry("cross_entropy", "cross-entropy on oracle",
          trained(lambda controller: losses.OracleCrossEntropy(), entropy_coef=0.0),
          "imitates the best choice in hindsight"),
    Entry("regret", "regret-weighted classes",
          trained(lambda controller: losses.OracleCrossEntropy(by_regret=True), entropy_coef=0.0),
          "the same, weighted by what a random choice loses"),
    Entry("reinforce", "REINFORCE", trained(lambda controller: losses.Reinforce(), num_generations=8),
          "8 drawn settings, moving baseline"),
    Entry("ppo", "PPO", trained(ppo_loss, num_generations=8, num_iterations=2),
          "8 drawn settings, clipped, value network"),
    Entry("dpo", "DPO", trained(dpo_loss, entropy_coef=0.0), "pairs of settings, better and worse"),
    Entry("bandit", "contextual bandit (VW)", _bandit, "sees one setting's answer for each sample and pass"),
    Entry("grpo_cold", "GRPO, cold start", trained(), "starts from the lookup table", "variant"),
    Entry("exact", "exact policy gradient", trained(entropy_coef=0.0), "all settings, no entropy bonus", "variant"),
    Entry("grpo_8", "GRPO G=8", trained(num_generations=8), "8 drawn settings", "variant"),
    Entry("grpo_8_batch", "GRPO G=8 batch std", trained(num_generations=8, scale_rewards="batch"),
          "scale_rewards=batch", "variant"),
    Entry("grpo_8_group", "GRPO G=8 group std", trained(num_generations=8, scale_rewards="group"),
          "scale_rewards=group, as the textbook", "variant"),
    Entry("grpo_8_cispo", "GRPO G=8 cispo", trained(num_generations=8, loss_type="cispo"), "loss_type=cispo",
          "variant"),
    Entry("grpo_8_iterations", "GRPO G=8 4 iterations", trained(num_generations=8, num_iterations=4, epsilon=0.2),
          "num_iterations=4, epsilon=0.2", "variant"),
    Entry("grpo_8_beta", "GRPO G=8 beta=0.04", trained(num_generations=8, beta=0.04), "KL to the lookup table",
          "variant"),
    Entry("grpo_32", "GRPO G=32", trained(num_generations=32), "32 drawn settings", "variant"),
    Entry("kind", "lookup by first label",
          lambda data, seed: GroupLookup.fit(data.train, data.labels[:1], data.means), "knows the first label",
          "labels", features=False, labels=True, drawn=False),
)  # fmt: skip

"""A candidate: the present controller, trained on from what served requests were worth, off-policy.

What each setting would have scored is estimated doubly robustly: by the outcome model, and where a score is known
corrected by what the model got wrong there, times the clipped importance weight. The controller goes on learning: first
by what the model expects, towards the best policy (that of reward plus entropy), which tells it of all settings at
once; then doubly robust, by the exact gradient of GRPO, in which the noise of single scores averages. Where a profile
is given its samples are learnt beside the requests, so that what the controller knew stays known.
Shapes: N requests, S samples of a profile, K settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import Batch
from budgetvlm.controller.trainer import GRPOTrainer
from budgetvlm.controller.training_options import GRPOConfig, StatePlan
from budgetvlm.controller.training_states import MeasuredOutcomes, TrainingData
from budgetvlm.features import Features
from budgetvlm.feedback.off_policy import importance
from budgetvlm.feedback.outcome_model import OutcomeModel
from budgetvlm.feedback.served_log import ServedLog
from budgetvlm.table import ProfileTable

MOST_WEIGHT = 2.0  # of a score's correction; more of it is noise in single requests
MOST_REQUESTS = 1000  # the newest, that are learnt
TOWARDS_BEST = GRPOConfig(learning_rate=1e-3, num_epochs=10, entropy_coef=0.0)
EXACT = GRPOConfig(learning_rate=2e-4, num_epochs=5)


@dataclass(frozen=True)
class BestPolicy:
    """A loss: cross-entropy to softmax(logit_scale x reward) over the allowed settings, the optimum with entropy."""

    logit_scale: float

    @property
    def parameters(self) -> list[Tensor]:
        return []

    def __call__(
        self, batch: Batch, log_policy: Tensor, settings: Tensor | None, old_log_probs: Tensor | None
    ) -> Tensor:
        target = (self.logit_scale * batch.ranked).softmax(dim=-1)
        return -(target * log_policy).sum(dim=-1).mean()


def train_candidate(
    present: GRPOController,
    log: ServedLog,
    model: OutcomeModel,
    profile: tuple[ProfileTable, Features] | None = None,
    seed: int = 0,
) -> GRPOController:
    """Train the present controller on, from a log and perhaps its profile's training samples.

    ``model``: of the log's outcomes. Bounds, latencies and standardisation stay the present controller's.
    """
    recent = log.rows(np.arange(len(log))[-MOST_REQUESTS:])
    expected, robust = model.predict(recent), doubly_robust_outcomes(recent, model)
    latency = np.where(present.latency_ms > 0, present.latency_ms, np.nan)
    parts = [(expected, robust, np.broadcast_to(latency, expected.shape), recent.image, recent.language)]
    if profile is not None:
        table = profile[0].subset("train")
        known = ServedLog.unserved(profile[1].aligned(table.sample_ids), present)
        parts.append((model.predict(known), table.accuracy, table.latency_ms, known.image, known.language))
    columns = (np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True))
    expected, robust, latency, *features = columns
    image, language = map(torch.from_numpy, features)
    bounds = None if present.input_bounds is None else present.bounds_of(image, language)
    plan = StatePlan(default_price=float(present.default_price))
    candidate = present
    for outcomes, config, loss in (
        (expected, TOWARDS_BEST, BestPolicy(present.logit_scale)),
        (robust, EXACT, None),
    ):
        data = TrainingData(MeasuredOutcomes.from_arrays(outcomes, latency), image, language, bounds_ms=bounds)
        trainer = GRPOTrainer(config, [candidate], data, plan, seeds=[seed], policy_loss=loss)
        trainer.train(0, config.num_epochs, lambda epoch, losses: True)
        candidate = trainer.averaged_controller(0)
    return candidate


def doubly_robust_outcomes(log: ServedLog, model: OutcomeModel) -> np.ndarray:
    """What each setting would have scored in each request, ``[N, K]``."""
    outcomes, rows = model.predict(log), np.flatnonzero(log.is_scored)
    scored, known = log.rows(rows).as_scored_log, outcomes[rows]
    weight = np.minimum(scored.of_chosen(importance(scored, np.ones(known.shape))), MOST_WEIGHT)
    outcomes[rows, scored.chosen] += weight * (scored.scores - scored.of_chosen(known))
    return outcomes

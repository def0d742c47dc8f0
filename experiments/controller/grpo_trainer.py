"""GRPO under the guide's name; it lives in `budgetvlm.controller.grpo` and its neighbours."""

from budgetvlm.controller.grpo import compute_advantages, grpo_loss
from budgetvlm.controller.reward import constrained_reward, guide_reward
from budgetvlm.controller.trainer import GRPOTrainer
from budgetvlm.controller.training import TrainingResult, train
from budgetvlm.controller.training_options import GRPOConfig, RewardWeights, TrainingConfig

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "RewardWeights",
    "TrainingConfig",
    "TrainingResult",
    "compute_advantages",
    "constrained_reward",
    "grpo_loss",
    "guide_reward",
    "train",
]

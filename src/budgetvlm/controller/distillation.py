"""A start for GRPO: the controller's values are fitted to the accuracies that a few supervised networks predict.

Predicting every setting's accuracy learns from all cells of the table at once and takes seconds, while the policy
gradient learns only from settings that the policy likes. So the teachers (`policies.predictor`, averaged) bring the
values close, and GRPO goes on from there with the budgets, the prices and its own objective. With one network's size
the controller decides as quickly as before. Distillation after Hinton et al. 2015, arXiv 1503.02531.
Shapes: S samples, K settings.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from budgetvlm.controller.network import GRPOController
from budgetvlm.features import Features
from budgetvlm.policies.predictor import PredictArgmax, PredictorConfig
from budgetvlm.table import ProfileTable

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 60, 128, 1e-3, 1e-2
PATIENCE = 10
MOST_SAMPLES = 20_000  # that teachers see: it is a start, and GRPO goes on with all


def distil(
    controller: GRPOController,
    train: ProfileTable,
    validation: ProfileTable,
    features: Features,
    teachers: int,
    seed: int,
) -> None:
    """Fit the controller's values, in place; its feature statistics are already set.

    The epoch with the least squared error to the teachers' predictions on the validation samples is kept.
    """
    train, validation = train.thinned(MOST_SAMPLES), validation.thinned(MOST_SAMPLES)
    known, held_out = features.aligned(train.sample_ids), features.aligned(validation.sample_ids)
    seeds = range(seed * teachers, (seed + 1) * teachers)
    fitted = [PredictArgmax.fit(train, known, validation, held_out, PredictorConfig(seed=s)) for s in seeds]
    data = _encoded(controller, known), _taught(fitted, known)
    rest = _encoded(controller, held_out), _taught(fitted, held_out)
    device = controller.heads.weight.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _fit(controller, *(tensor.to(device) for tensor in (*data, *rest)))


def _encoded(controller: GRPOController, features: Features) -> Tensor:
    device = controller.heads.weight.device
    image, language = torch.from_numpy(features.image).to(device), torch.from_numpy(features.language).to(device)
    return controller.encode(image, language)


def _taught(teachers: list[PredictArgmax], features: Features) -> Tensor:
    """Mean predicted accuracy, ``[S, K]``."""
    mean = np.mean([teacher.predict(features.image, features.language) for teacher in teachers], axis=0)
    return torch.from_numpy(mean.astype(np.float32))


def _values(controller: GRPOController, encoded: Tensor) -> Tensor:
    """Values before anything is known of budget and price, ``[S, K]``: their layer starts at zero."""
    return controller.summed(controller.heads(controller.trunk(controller.feature_layer(encoded))))


def _fit(controller: GRPOController, encoded: Tensor, target: Tensor, held_out: Tensor, wanted: Tensor) -> None:
    layers = (controller.feature_layer, controller.trunk, controller.heads)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, since, kept = _error(controller, held_out, wanted), 0, copy.deepcopy(controller.state_dict())
    for _ in range(EPOCHS):
        controller.train()
        for rows in torch.randperm(len(encoded)).split(BATCH):
            optimiser.zero_grad(set_to_none=True)
            (_values(controller, encoded[rows]) - target[rows]).square().mean().backward()
            optimiser.step()
        error = _error(controller, held_out, wanted)
        since = 0 if error < best else since + 1
        if error < best:
            best, kept = error, copy.deepcopy(controller.state_dict())
        if since >= PATIENCE:
            break
    controller.load_state_dict(kept)
    controller.eval()


@torch.no_grad()
def _error(controller: GRPOController, held_out: Tensor, wanted: Tensor) -> float:
    controller.eval()
    return float((_values(controller, held_out) - wanted).square().mean())

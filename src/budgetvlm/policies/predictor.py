"""The strong simple baseline: predict every setting's accuracy, then take the best affordable one.

A network on the controller's features is trained on all cells of the table with binary cross-entropy, weight decay,
dropout, and early stopping on the validation split. Shapes: M networks, B samples, K settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from budgetvlm.features import Features
from budgetvlm.policies.argmax_policy import ArgmaxPolicy, FeatureScaler, Predict
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.stacked_networks import SupervisedOptions, stack_networks, train_stacked, unstack_networks
from budgetvlm.table import ProfileTable


@dataclass(frozen=True)
class PredictorConfig(SupervisedOptions):
    """The size of the network and its dropout, besides how it is trained."""

    hidden_dim: int = 256
    num_hidden_layers: int = 2
    dropout: float = 0.2
    seed: int = 0


def fit_predictor(
    train: ProfileTable,
    train_features: Features,
    validation: ProfileTable,
    validation_features: Features,
    config: PredictorConfig | None = None,
) -> ArgmaxPolicy:
    """Train a network on one split and stop early on another; the same seed gives the same network."""
    config = config or PredictorConfig()
    return fit_predictors(train, train_features, validation, validation_features, config, (config.seed,))[0]


def fit_predictors(
    train: ProfileTable,
    train_features: Features,
    validation: ProfileTable,
    validation_features: Features,
    config: PredictorConfig,
    seeds: Sequence[int],
) -> list[ArgmaxPolicy]:
    """Train one network for each seed, all at once; ``config.seed`` is not used. Equal seeds give equal results."""
    means, scaler = SettingMeans.fit(train), FeatureScaler.fit(train_features)
    x, y = torch.from_numpy(scaler.of(train_features)), torch.from_numpy(train.accuracy)
    held_out_x = torch.from_numpy(scaler.of(validation_features)).expand(len(seeds), -1, -1)
    held_out_y = torch.from_numpy(validation.accuracy)
    networks = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append(_network(x.shape[1], means.accuracy, config))
        torch.manual_seed(seeds[0])
        stack = stack_networks(networks)

        @torch.no_grad()
        def validate() -> Tensor:
            return _loss(stack.eval()(held_out_x), held_out_y)

        def loss(rows: Tensor) -> Tensor:
            return _loss(stack.train()(x[rows]), y[rows])

        train_stacked(list(stack.parameters()), len(x), loss, validate, config)
    unstack_networks(stack, networks)
    return [ArgmaxPolicy(means, _prediction(network.eval(), scaler), "predict + argmax") for network in networks]


def _prediction(network: nn.Module, scaler: FeatureScaler) -> Predict:
    """A network as a function from features to accuracies, float64 ``[B, K]``."""

    @torch.no_grad()
    def predict(image: np.ndarray, language: np.ndarray) -> np.ndarray:
        return torch.sigmoid(network(torch.from_numpy(scaler(image, language))).double()).numpy()

    return predict


def _network(width: int, accuracy: np.ndarray, config: PredictorConfig) -> nn.Sequential:
    """A perceptron whose untrained output is each setting's mean accuracy, as a logit."""
    layers: list[nn.Module] = []
    for _ in range(config.num_hidden_layers):
        layers += [nn.Linear(width, config.hidden_dim), nn.SiLU(), nn.Dropout(config.dropout)]
        width = config.hidden_dim
    head = nn.Linear(width, len(accuracy))
    nn.init.zeros_(head.weight)
    share = torch.from_numpy(np.nan_to_num(accuracy, nan=0.5)).clamp(0.01, 0.99)
    with torch.no_grad():
        head.bias.copy_(torch.logit(share))
    return nn.Sequential(*layers, head)


def _loss(logits: Tensor, accuracy: Tensor) -> Tensor:
    """Each network's mean binary cross-entropy over measured cells, ``[M, B, K]`` -> ``[M]``."""
    measured = ~torch.isnan(accuracy)
    target = accuracy.nan_to_num().expand_as(logits)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * measured).sum(dim=(-2, -1)) / measured.sum(dim=(-2, -1)).clamp(min=1)

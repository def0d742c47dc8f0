"""The strong simple baseline: predict every setting's accuracy, then take the best affordable one.

A network on the same features as the controller's, trained on all cells of the table with binary cross-entropy,
weight decay, dropout, and early stopping on the validation split. Shapes: S samples, K settings, D input dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from budgetvlm.features import Features
from budgetvlm.policies import States
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.stacked_linear import stack_networks, unstack_networks
from budgetvlm.policies.stacked_training import SupervisedOptions, train_stacked
from budgetvlm.table import ProfileTable


@dataclass(frozen=True)
class PredictorConfig:
    """How the predictor is trained; the best epoch on the validation split is kept."""

    hidden_dim: int = 256
    num_hidden_layers: int = 2
    dropout: float = 0.2
    weight_decay: float = 1e-2
    lr: float = 1e-3
    batch_size: int = 256
    num_epochs: int = 60
    patience: int = 8
    seed: int = 0


@dataclass(frozen=True, eq=False)
class PredictArgmax:
    """Predicted accuracy minus price times mean latency, at its largest among the feasible settings.

    Attributes:
        network: features ``[B, D]`` -> logits ``[B, K]``.
        mean, std: of the training features, ``[D]``.
        validation_loss: of the epoch that was kept.
    """

    expected: SettingMeans
    network: nn.Module
    mean: np.ndarray
    std: np.ndarray
    validation_loss: float
    name: str = "predict + argmax"

    @classmethod
    def fit(
        cls,
        train: ProfileTable,
        train_features: Features,
        validation: ProfileTable,
        validation_features: Features,
        config: PredictorConfig | None = None,
    ) -> PredictArgmax:
        """Train on one split, stop early on another; the same result for the same seed."""
        config = config or PredictorConfig()
        return fit_predictors(train, train_features, validation, validation_features, config, (config.seed,))[0]

    def predict(self, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        """Features ``[B, Di]``, ``[B, Dl]`` -> predicted accuracy of every setting, float64 ``[B, K]``."""
        with torch.no_grad():
            logits = self.network(_standardised(_inputs(image, language), self.mean, self.std))
        return torch.sigmoid(logits.double()).numpy()

    def choose(self, states: States) -> np.ndarray:
        predicted = states.by_sample(self.predict)
        return self.expected.choose(predicted, states.feasible, states.price)


@dataclass(frozen=True, eq=False)
class PredictorEnsemble:
    """The mean of several predictors' accuracies, then argmax."""

    members: tuple[PredictArgmax, ...]
    name: str = "predict, ensemble"

    def choose(self, states: States) -> np.ndarray:
        predicted = np.mean([states.by_sample(member.predict) for member in self.members], axis=0)
        return self.members[0].expected.choose(predicted, states.feasible, states.price)


def fit_predictors(
    train: ProfileTable,
    train_features: Features,
    validation: ProfileTable,
    validation_features: Features,
    config: PredictorConfig,
    seeds: Sequence[int],
) -> list[PredictArgmax]:
    """Train one predictor for each seed, all at once; ``config.seed`` is not used. Equal seeds give equal results."""
    raw = _inputs(train_features.image, train_features.language)
    held_out_raw = _inputs(validation_features.image, validation_features.language)
    mean, std = raw.mean(axis=0), raw.std(axis=0)
    std = np.where(std > 1e-6, std, 1.0)
    x, y = _standardised(raw, mean, std), torch.from_numpy(train.accuracy)
    held_out_x, held_out_y = _standardised(held_out_raw, mean, std), torch.from_numpy(validation.accuracy)
    means = SettingMeans.fit(train)
    networks = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append(_network(raw.shape[1], means.accuracy, config))
        torch.manual_seed(seeds[0])
        stack = stack_networks(networks)

        @torch.no_grad()
        def validate() -> Tensor:
            inputs = held_out_x.expand(len(seeds), -1, -1)
            return _loss(stack.eval()(inputs), held_out_y)

        def loss(rows: Tensor) -> Tensor:
            return _loss(stack.train()(x[rows]), y[rows])

        options = SupervisedOptions(
            config.lr, config.weight_decay, config.batch_size, config.num_epochs, config.patience
        )
        best = train_stacked(list(stack.parameters()), len(x), loss, validate, options)
    unstack_networks(stack, networks)
    pairs = zip(networks, best.tolist(), strict=True)
    return [PredictArgmax(means, network.eval(), mean, std, error) for network, error in pairs]


def _inputs(image: np.ndarray, language: np.ndarray) -> np.ndarray:
    return np.concatenate([image, language], axis=1)


def _standardised(raw: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Tensor:
    return torch.from_numpy(((raw - mean) / std).astype(np.float32))


def _network(width: int, accuracy: np.ndarray, config: PredictorConfig) -> nn.Sequential:
    """A perceptron whose untrained output is each setting's mean accuracy."""
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

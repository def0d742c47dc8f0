"""The strong simple baseline: predict every setting's accuracy, then take the best affordable one.

A network on the same features as the controller's, trained on all cells of the table with binary cross-entropy,
weight decay, dropout, and early stopping on the validation split. Shapes: S samples, K settings, D input dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from budgetvlm.features import Features
from budgetvlm.policies import States
from budgetvlm.policies.setting_means import SettingMeans
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
        raw = _inputs(train_features.image, train_features.language)
        held_out_raw = _inputs(validation_features.image, validation_features.language)
        mean, std = raw.mean(axis=0), raw.std(axis=0)
        std = np.where(std > 1e-6, std, 1.0)
        data = (_standardised(raw, mean, std), torch.from_numpy(train.accuracy))
        held_out = (_standardised(held_out_raw, mean, std), torch.from_numpy(validation.accuracy))
        expected = SettingMeans.fit(train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = _network(raw.shape[1], expected.accuracy, config)
            loss = _train(network, data, held_out, config)
        return cls(expected, network, mean, std, loss)

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
    """Mean binary cross-entropy of ``[B, K]`` over measured cells."""
    measured = ~torch.isnan(accuracy)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, accuracy.nan_to_num(), reduction="none")
    return (losses * measured).sum() / measured.sum().clamp(min=1)


def _train(
    network: nn.Module, data: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], config: PredictorConfig
) -> float:
    """Train in place and restore the best epoch's weights; returns its validation loss."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    best, since, kept = _validate(network, held_out), 0, _copy(network)
    for _ in range(config.num_epochs):
        network.train()
        for rows in torch.randperm(len(data[0])).split(config.batch_size):
            optimiser.zero_grad(set_to_none=True)
            _loss(network(data[0][rows]), data[1][rows]).backward()
            optimiser.step()
        loss = _validate(network, held_out)
        since = 0 if loss < best else since + 1
        if loss < best:
            best, kept = loss, _copy(network)
        if since >= config.patience:
            break
    network.load_state_dict(kept)
    network.eval()
    return best


def _validate(network: nn.Module, held_out: tuple[Tensor, Tensor]) -> float:
    network.eval()
    with torch.no_grad():
        return float(_loss(network(held_out[0]), held_out[1]))


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}

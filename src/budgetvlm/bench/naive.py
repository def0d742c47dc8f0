"""GRPO as it is usually written first: a `DataLoader` over JSON rows, a dictionary of outcomes, a loop over the rows.

The network, the optimiser, the reward, the batch size and the size of the groups are those of the package's trainer,
so that what differs is how the data gets to the update. A row is a state: sample, features, budget.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from budgetvlm.controller.grpo import compute_advantages, grpo_loss
from budgetvlm.controller.network import GRPOController
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

BUDGET_FACTORS = (0.8, 1.0, 1.2)


class Rows(Dataset[dict[str, Any]]):
    """The rows of a JSON file."""

    def __init__(self, path: Path) -> None:
        self.rows = json.loads(path.read_text())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {
            "sample_id": row["sample_id"],
            "image": torch.tensor(row["image"]),
            "language": torch.tensor(row["language"]),
            "budget_ms": torch.tensor(row["budget_ms"]),
        }


def write_rows(table: ProfileTable, features: Features, path: Path) -> int:
    """Three states a sample, as JSON; returns how many."""
    middle = table.num_settings // 2
    rows = [
        {
            "sample_id": name,
            "image": features.image[i].tolist(),
            "language": features.language[i].tolist(),
            "budget_ms": factor * float(table.latency_ms[i, middle]),
        }
        for i, name in enumerate(table.sample_ids)
        for factor in BUDGET_FACTORS
    ]
    path.write_text(json.dumps(rows))
    return len(rows)


def outcomes_of(table: ProfileTable) -> dict[tuple[str, int], tuple[float, float]]:
    """(sample, setting) -> accuracy and latency in ms."""
    accuracy, latency = table.accuracy.tolist(), table.latency_ms.tolist()
    return {
        (name, k): (accuracy[i][k], latency[i][k])
        for i, name in enumerate(table.sample_ids)
        for k in range(table.num_settings)
    }


class NaiveTrainer:
    """One epoch after the other over the rows.

    Args:
        controller: trained in place. path: the rows. outcomes: of `outcomes_of`.
    """

    def __init__(
        self,
        controller: GRPOController,
        path: Path,
        outcomes: dict[tuple[str, int], tuple[float, float]],
        batch_size: int = 64,
        group_size: int = 8,
        price: float = 0.01,
    ) -> None:
        self.controller, self.outcomes = controller, outcomes
        self.group_size, self.price = group_size, price
        self.loader = DataLoader(Rows(path), batch_size=batch_size, shuffle=True)
        self.optimizer = torch.optim.AdamW(controller.parameters(), lr=1e-4)

    def train_batches(self, count: int) -> int:
        """Update on so many batches, or an epoch's if these are fewer; returns how many states these were."""
        states = 0
        for batch, _ in zip(self.loader, range(count), strict=False):
            self._update(batch)
            states += len(batch["sample_id"])
        return states

    def _update(self, batch: dict[str, Any]) -> None:
        logits = self.controller(batch["image"], batch["language"], batch["budget_ms"])
        log_policy = self.controller.log_policy(logits)
        settings = torch.multinomial(log_policy.detach().exp(), self.group_size, replacement=True)
        rewards = torch.tensor(
            [
                [self._reward(name, k) for k in group]
                for name, group in zip(batch["sample_id"], settings.tolist(), strict=True)
            ]
        )
        log_probs: Tensor = log_policy.gather(1, settings)
        advantages = compute_advantages(rewards, "none")
        loss = grpo_loss(log_probs, log_probs.detach(), advantages)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _reward(self, sample_id: str, setting: int) -> float:
        accuracy, latency_ms = self.outcomes[sample_id, setting]
        return accuracy - self.price * latency_ms / float(self.controller.latency_reference_ms)

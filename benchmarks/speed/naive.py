"""GRPO as prototypes have it: a `DataLoader` over rows of measured settings; a group is all rows of one state.

A row is a sample, a budget, a setting that was measured, and what came of it; its features are looked up by sample.
Two things are better than in the prototypes, so that it learns what the package's trainer learns (a test compares the
gradients): the rows of a group belong to one state, and advantages go to the rows that they were computed from.
The network and the optimiser are the package's; what differs is how the data gets to the update.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from budgetvlm.controller.network import GRPOController
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

BUDGET_FACTORS = (0.8, 1.0, 1.2)


def write_rows(table: ProfileTable, features: Features, path: Path) -> int:
    """All that was measured, as JSON: a row for each sample, budget and setting; returns how many.

    A budget is a share of the sample's latency at the setting in the middle of the space. Nothing may be missing in the
    table, so that all groups have one size.
    """
    middle = table.num_settings // 2
    rows = [
        {
            "sample_id": name,
            "budget_ms": factor * float(table.latency_ms[i, middle]),
            "setting": k,
            "accuracy": float(table.accuracy[i, k]),
            "latency_ms": float(table.latency_ms[i, k]),
        }
        for i, name in enumerate(table.sample_ids)
        for factor in BUDGET_FACTORS
        for k in range(table.num_settings)
    ]
    image, language = features.image.tolist(), features.language.tolist()
    known = {name: (image[i], language[i]) for i, name in enumerate(features.sample_ids)}
    path.write_text(json.dumps({"rows": rows, "features": known}))
    return len(rows)


class Rows(Dataset[dict[str, Any]]):
    """The rows of a JSON file, with tensors of their features."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text())
        self.rows = document["rows"]
        self.features = {
            name: (torch.tensor(image), torch.tensor(language))
            for name, (image, language) in document["features"].items()
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image, language = self.features[row["sample_id"]]
        return {
            "sample_id": row["sample_id"],
            "image": image,
            "language": language,
            "budget_ms": torch.tensor(row["budget_ms"], dtype=torch.float32),
            "setting": torch.tensor(row["setting"], dtype=torch.long),
            "accuracy": torch.tensor(row["accuracy"], dtype=torch.float32),
            "latency_ms": torch.tensor(row["latency_ms"], dtype=torch.float32),
        }


class Groups(Sampler[int]):
    """Row numbers, group after group, the groups in a random order."""

    def __init__(self, num_rows: int, group_size: int) -> None:
        self.num_rows, self.group_size = num_rows, group_size

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        for group in torch.randperm(self.num_rows // self.group_size).tolist():
            yield from range(group * self.group_size, (group + 1) * self.group_size)


class NaiveTrainer:
    """One epoch after the other over the rows.

    Args:
        controller: trained in place. path: the rows. groups: whole ones in a batch.
    """

    def __init__(self, controller: GRPOController, path: Path, groups: int = 2, price: float = 0.01) -> None:
        self.controller, self.group_size, self.price = controller, controller.num_settings, price
        rows = Rows(path)
        order = Groups(len(rows), self.group_size)
        self.loader = DataLoader(rows, batch_size=groups * self.group_size, sampler=order)
        self.optimizer = torch.optim.AdamW(controller.parameters(), lr=1e-4)

    def train_batches(self, count: int) -> int:
        """Update on this many batches, or on one epoch if that has fewer; returns how many states were updated."""
        rows = 0
        for batch, _ in zip(self.loader, range(count), strict=False):
            self.optimizer.zero_grad()
            self.loss(batch).backward()
            self.optimizer.step()
            rows += len(batch["sample_id"])
        return rows // self.group_size

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """- mean of log-probability x advantage over the rows ``[B * G]``."""
        logits = self.controller(batch["image"], batch["language"], batch["budget_ms"])
        log_probs = self.controller.log_policy(logits).gather(1, batch["setting"][:, None])[:, 0]
        reference_ms = float(self.controller.latency_reference_ms)
        rewards = batch["accuracy"] - self.price * batch["latency_ms"] / reference_ms
        return -(log_probs * self._advantages(rewards, batch["sample_id"])).mean()

    def _advantages(self, rewards: Tensor, names: Sequence[str]) -> Tensor:
        """Rewards less the mean of their group ``[B * G]``."""
        advantages = torch.zeros_like(rewards)
        for start in range(0, len(names), self.group_size):
            group = slice(start, start + self.group_size)
            advantages[group] = rewards[group] - rewards[group].mean()
        return advantages

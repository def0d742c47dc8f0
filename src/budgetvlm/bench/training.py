"""Training: state updates a second, of the package's trainer and of a plain one over JSON rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from budgetvlm.bench.figures import Figure, timed_s
from budgetvlm.bench.material import Material, made_up
from budgetvlm.bench.naive import NaiveTrainer, outcomes_of, write_rows
from budgetvlm.controller.grpo import GRPOConfig
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.training import Run, TrainingConfig
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

GROUP_SIZE = 8
LARGE_BATCH = 4096
TIMES_FASTER, EPOCHS_S = 100.0, 60.0
HUNDRED_EPOCHS = 100 * 4000 * 3  # states


def measure(material: Material) -> list[Figure]:
    """Both train the same network with AdamW, groups of 8 and batches of 64 on the same table, taking turns."""
    rounds, samples, batches = (2, 1000, 30) if material.options.quick else (5, 4000, 150)
    table, features = made_up(samples, seed=material.options.seed)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.json"
        write_rows(table, features, path)
        plain = NaiveTrainer(_controller(table, features), path, outcomes_of(table), group_size=GROUP_SIZE)
        ours, large = (_run(table, features, size) for size in (64, LARGE_BATCH))
        rates = [(_rate(ours), _rate(large), _plain_rate(plain, batches)) for _ in range(rounds + 1)][1:]
    ours_s, large_s, plain_s = zip(*rates, strict=True)
    faster = [a / b for a, b in zip(ours_s, plain_s, strict=True)]
    most = [a / b for a, b in zip(large_s, plain_s, strict=True)]
    return [
        Figure.of("plain trainer over JSON rows, batches of 64", "states/s", plain_s),
        Figure.of("ours, batches of 64", "states/s", ours_s),
        Figure.of(f"ours, batches of {LARGE_BATCH}", "states/s", large_s),
        Figure.of("times faster at the same batch size", "x", faster, at_least=TIMES_FASTER),
        Figure.of(f"times faster with batches of {LARGE_BATCH}", "x", most),
        Figure.of(
            "100 epochs over 4,000 samples x 3 budgets, batches of 64", "s", [HUNDRED_EPOCHS / r for r in ours_s],
            at_most=EPOCHS_S,
        ),
    ]  # fmt: skip


def _run(table: ProfileTable, features: Features, batch_size: int) -> Run:
    config = TrainingConfig(grpo=GRPOConfig(num_generations=GROUP_SIZE, batch_size=batch_size), patience=None)
    return Run(table, features, config)


def _rate(run: Run) -> float:
    """States a second of one epoch."""
    states = len(run.trainer.outcomes) * len(run.trainer.plan.budget_factors)
    seconds = timed_s(lambda: run.trainer.train_epoch(run.epoch))
    run.epoch += 1
    return states / seconds


def _plain_rate(plain: NaiveTrainer, batches: int) -> float:
    states: list[int] = []
    seconds = timed_s(lambda: states.append(plain.train_batches(batches)))
    return states[0] / seconds


def _controller(table: ProfileTable, features: Features) -> GRPOController:
    latency = np.nanmean(table.latency_ms, axis=0).tolist()
    controller = GRPOController(
        features.image.shape[1],
        features.language.shape[1],
        knob_values=table.knob_space.to_dict(),
        latency_reference_ms=latency[-1],
        latency_ms=latency,
        bounds_ms=latency,
    )
    controller.fit_features(torch.from_numpy(features.image), torch.from_numpy(features.language))
    return controller.train()

"""Training: state updates a second, of the package's trainer and of one over rows as prototypes have it.

A state's update covers all its measured settings on both sides, so an epoch is the same data on both sides.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.speed.bench_data import Material, fresh_controller, made_up
from benchmarks.speed.figures import Figure, timed_s
from benchmarks.speed.naive import NaiveTrainer, write_rows
from budgetvlm.controller.ensemble import member_seeds
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.controller.training_run import TrainingRun
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

ROWS = 64  # of the plain trainer's batches, or the nearest whole number of groups
BATCH, LARGE_BATCH = 64, 4096  # states of ours
MEMBERS, WIDTH, MEMBER_WIDTH = 5, 256, 128  # as `budgetvlm train --ensemble 5` has them
FULL, QUICK = (5, 4000, 300), (2, 1000, 30)  # rounds, samples, batches of the plain trainer
TIMES_FASTER, EPOCHS_S, ENSEMBLE_COST = 40.0, 60.0, 2.5
HUNDRED_EPOCHS = 100 * 4000 * 3  # states


def measure(material: Material) -> list[Figure]:
    """All train the same network with AdamW on the same table, taking turns."""
    rounds, samples, batches = QUICK if material.options.quick else FULL
    table, features = made_up(samples, seed=material.options.seed)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.json"
        trained_on = table.subset("train")
        write_rows(trained_on, features.aligned(trained_on.sample_ids), path)
        settings = table.num_settings
        groups = max(1, round(ROWS / settings))
        plain = NaiveTrainer(fresh_controller(table, features, bounded=False).train(), path, groups)
        runs = [training_run(table, features, size) for size in (groups, BATCH, LARGE_BATCH)]
        narrow = training_run(table, features, BATCH, 1, MEMBER_WIDTH)
        ensemble = training_run(table, features, BATCH, MEMBERS, MEMBER_WIDTH)
        runs += [narrow, ensemble]
        rates = [(_plain_rate(plain, batches), *map(_rate, runs)) for _ in range(rounds + 1)][1:]
    rows, same, ours, large, member, several = zip(*rates, strict=True)
    return [
        Figure.of(f"plain trainer: {groups} states x {settings} rows a batch", "states/s", rows),
        Figure.of(f"ours, the same small batches: {groups} states", "states/s", same),
        Figure.of(f"ours as it trains: {BATCH} states", "states/s", ours),
        Figure.of(f"ours, {LARGE_BATCH} states", "states/s", large),
        Figure.of("times faster, the same small batches", "x", _ratios(same, rows)),
        Figure.of("times faster as it trains", "x", _ratios(ours, rows), at_least=TIMES_FASTER),
        Figure.of(f"times faster, {LARGE_BATCH} states", "x", _ratios(large, rows)),
        Figure.of(f"time of {MEMBERS} members of width {MEMBER_WIDTH} / one of width {WIDTH}", "x",
                  _ratios(ours, several), at_most=ENSEMBLE_COST),
        Figure.of(f"time of {MEMBERS} members / one of the same width", "x", _ratios(member, several)),
        Figure.of(
            "100 epochs over 4,000 samples x 3 budgets, as it trains", "s", [HUNDRED_EPOCHS / rate for rate in ours],
            at_most=EPOCHS_S,
        ),
    ]  # fmt: skip


def _ratios(ours: tuple[float, ...], theirs: tuple[float, ...]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def training_run(
    table: ProfileTable, features: Features, batch_size: int, members: int = 1, hidden_dim: int = WIDTH
) -> TrainingRun:
    """A run of the package's trainer, as `budgetvlm train` makes it, but without teachers."""
    config = TrainingConfig(grpo=GRPOConfig(batch_size=batch_size), patience=None, teachers=0, hidden_dim=hidden_dim)
    return TrainingRun(table, features, config, member_seeds(0, members))


def _rate(run: TrainingRun) -> float:
    """States a second that each member sees in one epoch."""
    trainer = run.trainer
    states = len(trainer.data.outcomes) * len(trainer.plan.budget_factors)
    return states / timed_s(lambda: trainer.train(0, 1, lambda epoch, losses: True))


def _plain_rate(plain: NaiveTrainer, batches: int) -> float:
    states: list[int] = []
    seconds = timed_s(lambda: states.append(plain.train_batches(batches)))
    return states[0] / seconds

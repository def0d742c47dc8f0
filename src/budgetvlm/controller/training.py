"""A whole training run: (profile table, features) -> a directory with the best controller, figures and logs.

The directory holds ``best_checkpoint.pt`` (best validation reward), ``config.json`` and ``model.safetensors`` (the same
controller), ``guard.json`` (bounds on latency, not calibrated yet), ``last_checkpoint.pt`` (for resuming),
``metrics.json`` (all figures) and ``tensorboard/``.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from budgetvlm._io import write_json
from budgetvlm.controller.building import new_controller
from budgetvlm.controller.checkpoint import BEST, GUARD, LAST, controller_document, save_pretrained, write_checkpoint
from budgetvlm.controller.distillation import distil
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import PolicyLoss
from budgetvlm.controller.run_directory import METRICS, EventLog, open_output, read_last
from budgetvlm.controller.trainer import GRPOTrainer
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.controller.training_states import Outcomes
from budgetvlm.controller.validation import Validation
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

Say = Callable[[str], None]
MakeLoss = Callable[[GRPOController], PolicyLoss]
SAVE_SECONDS = 5.0  # between two writings of what a resumed run needs
LEAST_GAIN = 1e-6  # of validation reward, to count as better


@dataclass(frozen=True)
class TrainingResult:
    """What came out: where it lies, the best epoch (0: the untrained lookup policy) and its figures."""

    output_dir: Path
    controller: GRPOController
    best_epoch: int
    metrics: dict[str, float | None]
    epochs_run: int


def train(
    table: ProfileTable,
    features: Features,
    config: TrainingConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = tqdm.write,
    progress: bool = True,
    brief: bool = False,
) -> TrainingResult:
    """Train a controller on the table's "train" split, keep the best on its "validation" split.

    Equal seeds give equal bits on one machine with one number of threads, also across an interruption and ``resume``.

    Args:
        table: with splits, or they are drawn by ``config.train_split`` (by image where the table knows images).
        features: of the table's samples, in any order.
        output_dir: see the module.
        resume, overwrite: what to do with an earlier run there: continue it, or replace it.
        say: takes the lines for the user. progress: show a bar. brief: say how it ended, and nothing of each epoch.

    Raises:
        DataError: a side of the split is empty, or samples lack features.
        OutputError: an earlier run lies there and neither was chosen, or nothing can be written.
        ConfigError: a run that is to be resumed had other options or data.
        KeyboardInterrupt: after saving the last finished epoch.
    """
    if table.split is None:
        table = table.with_splits({"train": config.train_split, "validation": 1 - config.train_split}, config.seed)
    run = Run(table, features.aligned(table.sample_ids), config)
    open_output(output_dir, resume=resume, overwrite=overwrite)
    last = read_last(output_dir, run.origin) if resume else None
    if not brief:
        say(config.maximised)
    guard_path = Path(output_dir) / GUARD
    if not guard_path.exists():  # a run that is resumed may have been calibrated
        write_json(guard_path, AdaptiveGuard.fit(table.subset("train"), features, config.alpha).to_dict())
    if last is not None:
        say(f"resuming after epoch {last['epoch']}")
        run.restore(last)
    return _loop(run, config, Path(output_dir), say, progress, brief)


class Run:
    """The moving parts of a run. ``make_loss``: see `budgetvlm.controller.fitting.fit_controller`."""

    def __init__(
        self, table: ProfileTable, features: Features, config: TrainingConfig, make_loss: MakeLoss | None = None
    ):
        train_table, validation_table = table.subset("train"), table.subset("validation")
        guard, expected = StaticGuard.fit_table(train_table, config.guard_quantile), SettingMeans.fit(train_table)
        image, language = _feature_tensors(features, config.device)
        rows = torch.from_numpy(table.rows_of("train")).to(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.controller = new_controller(table, features, config, guard, expected)
            policy_loss = make_loss(self.controller) if make_loss else None
        self.controller.to(config.device)
        self.controller.fit_features(image, language, rows)
        if config.teachers:
            distil(self.controller, train_table, validation_table, features, config.teachers, config.seed)
        outcomes = Outcomes.from_arrays(train_table.accuracy, train_table.latency_ms, config.device)
        self.trainer = GRPOTrainer(
            config.grpo,
            self.controller,
            outcomes,
            image,
            language,
            config.plan,
            config.weights,
            config.seed,
            policy_loss,
            rows,
        )
        held_out = torch.from_numpy(table.rows_of("validation")).to(config.device)
        encoded = self.controller.encode(image[held_out], language[held_out])
        price = config.plan.default_price
        self.validation = Validation(
            validation_table, encoded, expected, guard, config.grpo.objective, config.weights, price
        )
        self.guard, self.epoch, self.history = guard, 0, list[dict[str, Any]]()
        self.best: dict[str, Any] = {}
        self.best_state: dict[str, torch.Tensor] = {}
        self.origin = _origin(table, features, config)

    def validate(self, loss: float | None) -> bool:
        """Measure the averaged weights; True if they are the best so far."""
        with self.trainer.averaged():
            metrics = self.validation.measure(self.controller.eval())
            self.history.append({"epoch": self.epoch, "loss": loss, **metrics})
            reward = metrics["reward_mean"] or 0.0
            better = not self.best or reward > self.best["reward_mean"] + LEAST_GAIN
            if better:
                self.best = self.history[-1]
                self.best_state = copy.deepcopy(self.controller.state_dict())
        return better

    @property
    def epochs_since_best(self) -> int:
        return self.epoch - int(self.best["epoch"])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, copied."""
        parts = {"epoch": self.epoch, "trainer": self.trainer.state_dict(), "history": self.history}
        return copy.deepcopy({**parts, "best": self.best, "best_state": self.best_state})

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.best_state = state["best_state"]
        self.trainer.load_state_dict(state["trainer"])


def _loop(run: Run, config: TrainingConfig, output_dir: Path, say: Say, progress: bool, brief: bool) -> TrainingResult:
    """Epochs until the end, the patience or the user's interruption; what is finished is kept."""
    writer = _Writer(output_dir, run, config, (lambda line: None) if brief else say)
    bar = tqdm(total=config.grpo.num_epochs, initial=run.epoch, desc="training", unit="epoch", disable=not progress)
    try:
        with bar:
            if not run.history:
                writer.record(run.validate(None))
            while run.epoch < config.grpo.num_epochs and not out_of_patience(run, config):
                loss = run.trainer.train_epoch(run.epoch)["loss"]
                run.epoch += 1
                writer.record(run.validate(loss))
                bar.update()
    except KeyboardInterrupt:
        writer.finish()
        say(f"interrupted; epoch {writer.saved_epoch} is saved in {output_dir / LAST}, and --resume goes on from there")
        raise
    if out_of_patience(run, config):
        say(f"stopped after epoch {run.epoch}: no better validation reward in {config.patience} epochs")
    writer.finish()
    run.controller.load_state_dict(run.best_state)
    figures = {name: value for name, value in run.best.items() if name not in ("epoch", "loss")}
    say(f"best: {_line(run.best)}; saved as {output_dir / BEST}")
    return TrainingResult(output_dir, run.controller.eval(), run.best["epoch"], figures, run.epoch)


def out_of_patience(run: Run, config: TrainingConfig) -> bool:
    return config.patience is not None and run.epochs_since_best >= config.patience


class _Writer:
    """Writes the run's files: the best controller when there is a new one, the rest now and then and at the end."""

    def __init__(self, output_dir: Path, run: Run, config: TrainingConfig, say: Say):
        self.output_dir, self.run, self.config, self.say = output_dir, run, config, say
        self.events = EventLog(output_dir, run.epoch)
        self.state = run.state() if run.history else None
        self.written = time.monotonic()

    @property
    def saved_epoch(self) -> int:
        return self.state["epoch"] if self.state else 0

    def record(self, better: bool) -> None:
        """Note a finished epoch."""
        run = self.run
        self.say(_line(run.history[-1]) + ("  (best so far)" if better else ""))
        self.events.write(run.history[-1])
        self.state = run.state()
        if better:
            self._write_best()
        if better or time.monotonic() - self.written > SAVE_SECONDS:
            self._write_last()

    def finish(self) -> None:
        self._write_last()
        self.events.close()

    def _write_best(self) -> None:
        run = self.run
        figures = {name: value for name, value in run.best.items() if name != "epoch"}
        document = controller_document(run.controller, run.best_state)
        extra = {"guard": run.guard.to_dict(), "metrics": figures, "epoch": run.best["epoch"]}
        write_checkpoint(self.output_dir / BEST, {**document, **extra, "training": asdict(self.config)})
        with run.trainer.averaged():
            save_pretrained(run.controller, self.output_dir)

    def _write_last(self) -> None:
        if self.state is None:
            return
        write_checkpoint(self.output_dir / LAST, {**self.state, "origin": self.run.origin})
        summary = {"schema_version": 1, "maximised": self.config.maximised, "training": asdict(self.config)}
        write_json(self.output_dir / METRICS, {**summary, "best": self.state["best"], "history": self.state["history"]})
        self.written = time.monotonic()


def in_words(figures: Mapping[str, Any]) -> str:
    """A validation's figures in one line, without their epoch."""
    room = "n/a" if figures["room_closed"] is None else f"{figures['room_closed']:.1%}"
    return (
        f"reward_mean {figures['reward_mean']:.4f}  accuracy_mean {figures['accuracy_mean']:.4f}  latency_mean "
        f"{figures['latency_mean']:.2f} ms  violation_rate {figures['violation_rate']:.2%}  room_closed {room}"
    )


def _line(figures: Mapping[str, Any]) -> str:
    return f"epoch {figures['epoch']:3d}  {in_words(figures)}"


def _origin(table: ProfileTable, features: Features, config: TrainingConfig) -> dict[str, Any]:
    """Options and data that a resumed run has to share; how long to train may differ."""
    options = asdict(config)
    options["grpo"].pop("num_epochs")
    for name in ("patience", "device", "alpha"):
        options.pop(name)
    return {**options, "data": fingerprint(table, features)}


def fingerprint(table: ProfileTable, features: Features | None) -> str:
    """A digest of what was measured and of the features; equal data have equal ones."""
    digest = hashlib.sha256(repr((table.knob_space.to_dict(), table.sample_ids, table.split)).encode())
    given = () if features is None else (features.image, features.language)
    for array in (table.accuracy, table.latency_ms, *given):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _feature_tensors(features: Features, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and language features; no copy on the CPU."""
    return torch.from_numpy(features.image).to(device), torch.from_numpy(features.language).to(device)

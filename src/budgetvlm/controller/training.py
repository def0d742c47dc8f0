"""Training: (profile table, features) -> a directory with the best controller, figures and logs.

The directory holds ``best_checkpoint.pt`` (what is kept, see `budgetvlm.controller.kept`), ``config.json`` and
``model.safetensors`` (the same controller), ``guard.json`` (bounds on latency, not calibrated yet),
``last_checkpoint.pt`` (for resuming), ``metrics.json`` (all figures), ``tensorboard/`` and, where features were made
from text and image, what made them (``extractor.json``). An ensemble's directory holds the average of its members, and
``members/<number>/`` holds each member's best controller, figures and logs.

Members train at once, as one batched network, and are averaged in one controller (`budgetvlm.controller.ensemble`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from budgetvlm._io import write_json
from budgetvlm.controller.checkpoint import BEST, GUARD, LAST
from budgetvlm.controller.ensemble import member_seeds
from budgetvlm.controller.kept import Kept, keep
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.run_directory import open_output, origin_of, read_last
from budgetvlm.controller.run_files import RunFiles, figures_line
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.controller.training_run import MakeLoss, TrainingRun
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.features.cheap import EXTRACTOR
from budgetvlm.table import ProfileTable

Say = Callable[[str], None]


class GuardDocument(Protocol):
    """A fitted guard that can be written as JSON."""

    def to_dict(self) -> dict[str, object]: ...


FitGuard = Callable[[ProfileTable, Features, float], GuardDocument]
"""From the training samples, all features and the allowed share of violations to a guard."""


@dataclass(frozen=True)
class TrainingResult:
    """What came out: its directory, the controller, the epoch that it is of (0: its start) and its figures."""

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
    members: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = tqdm.write,
    progress: bool = True,
    fit_guard: FitGuard | None = None,
) -> TrainingResult:
    """Train on the table's "train" split and keep what does best on its "validation" split, see `kept`.

    Equal seeds give equal bits on one machine with one number of threads, also across an interruption and ``resume``.

    Args:
        table: with splits, or they are drawn, see `with_splits`.
        features: of the table's samples, in any order.
        output_dir: see the module.
        members: controllers that are trained and averaged; their seeds follow from ``config.seed``.
        resume, overwrite: what to do with an earlier run there: continue it, or replace it.
        say: takes the lines for the user. progress: show a bar.
        fit_guard: fits the guard that is written beside the controller, for example `AdaptiveGuard.fit`; None writes
            none.

    Raises:
        DataError: a side of the split is empty, or samples lack features.
        OutputError: an earlier run lies there and neither was chosen, or nothing can be written.
        ConfigError: no member, or a run that is to be resumed had other options or data.
        KeyboardInterrupt: after saving the last finished epoch.
    """
    seeds = member_seeds(config.seed, members)
    directory = Path(output_dir)
    table = with_splits(table, config)
    features = features.aligned(table.sample_ids)
    for side in ("train", "validation"):
        table.subset(side)  # an empty one is refused before anything is written
    origin = origin_of(table, features, config, members)
    open_output(directory, resume=resume, overwrite=overwrite)
    last = read_last(directory, origin) if resume else None
    say(config.maximised)
    run = TrainingRun(table, features, config, seeds, say=say)
    for note in (run.guard.why, *run.validation.notes):
        say(f"note: {note}")
    if fit_guard is not None and not (directory / GUARD).exists():  # a run that is resumed may have been calibrated
        write_json(directory / GUARD, fit_guard(table.subset("train"), features, config.alpha).to_dict())
    if "extractor" in features.metadata:  # what made the features makes those of a request
        write_json(directory / EXTRACTOR, features.metadata["extractor"])
    if last is not None:
        run.restore(last)
        say(f"resuming after epoch {run.epoch}")
    kept = _train_and_save(run, RunFiles(directory, run, origin), say, progress)
    return _result(run, kept, directory, say)


def with_splits(table: ProfileTable, config: TrainingConfig | None = None) -> ProfileTable:
    """The table with the splits that training uses: its own, or drawn ones, which are the same for every seed.

    A fifth is held out for testing where there are enough samples. Raises DataError: too few samples to split.
    """
    if table.split is not None:
        return table
    try:
        return table.with_splits(table.shares_of_splits((config or TrainingConfig()).train_split))
    except ConfigError as error:
        raise DataError(f"the table has no splits and they cannot be drawn: {error}") from error


def _train_and_save(run: TrainingRun, files: RunFiles, say: Say, progress: bool) -> Kept:
    """Train until the end, the patience or the user's interruption; finished epochs are always saved."""
    epochs = run.config.grpo.num_epochs
    bar = tqdm(total=epochs, initial=run.epoch, desc="training", unit="epoch", disable=not progress)

    def on_epoch() -> None:
        files.record()
        if len(run.members) == 1:
            member = run.members[0]
            best = "  (best so far)" if member.best is member.history[-1] else ""
            say(figures_line(member.history[-1]) + best)
        bar.update(run.epoch - bar.n)

    try:
        with bar:
            run.train(on_epoch)
    except KeyboardInterrupt:
        files.finish()
        say(
            f"interrupted; epoch {files.saved_epoch} is saved in {files.directory / LAST}, and --resume goes on from "
            "there"
        )
        raise
    kept = keep(run)
    files.finish(kept)
    return kept


def _result(run: TrainingRun, kept: Kept, directory: Path, say: Say) -> TrainingResult:
    """Say how each member ended, and what is kept."""
    for number, member in enumerate(run.members):
        who = "" if len(run.members) == 1 else f"member {number + 1} of {len(run.members)}, seed {member.seed}: "
        if member.stopped:
            patience = run.config.patience
            say(f"{who}stopped after epoch {member.epochs_run}: no better validation reward in {patience} epochs")
        say(f"{who}best: {figures_line(member.best)}")
    say(f"{kept.why[0].upper()}{kept.why[1:]}.")
    say(f"kept: {figures_line(kept.figures)}; saved as {directory / BEST}")
    epochs_run = sum(member.epochs_run for member in run.members)
    return TrainingResult(directory, kept.controller, kept.epoch, kept.figures, epochs_run)


def fit_controller(
    table: ProfileTable,
    features: Features,
    config: TrainingConfig,
    make_loss: MakeLoss | None = None,
    members: int = 1,
) -> GRPOController:
    """Train as `train` does, but write nothing; comparisons use it.

    ``make_loss``: from the untrained controller to a loss in place of GRPO's, see `budgetvlm.controller.policy_loss`.
    Raises ConfigError: no member. DataError: a side of the split is empty, or samples lack features.
    """
    seeds, features = member_seeds(config.seed, members), features.aligned(table.sample_ids)
    run = TrainingRun(table, features, config, seeds, make_loss)
    run.train()
    return keep(run).controller

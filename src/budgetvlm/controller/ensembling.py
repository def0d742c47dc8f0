"""Training an ensemble: several runs that differ in their seeds, averaged in one checkpoint that loads as any other.

Each member is a training run of its own in ``members/<number>/``, so that an interrupted ensemble goes on where it
stopped; what `budgetvlm.controller.training` puts into a directory lies above them, of the average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from budgetvlm._io import write_json
from budgetvlm.controller.checkpoint import BEST, GUARD, controller_document, save_pretrained, write_checkpoint
from budgetvlm.controller.ensemble import merge
from budgetvlm.controller.fitting import member_seeds
from budgetvlm.controller.run_directory import MEMBERS, METRICS, open_output
from budgetvlm.controller.training import Run, TrainingResult, in_words, train
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import ConfigError
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.table import ProfileTable


def train_ensemble(
    table: ProfileTable,
    features: Features,
    config: TrainingConfig,
    output_dir: str | Path,
    members: int,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = tqdm.write,
    progress: bool = True,
) -> TrainingResult:
    """As `training.train`, for the average of so many controllers; their seeds follow from ``config.seed``.

    Raises:
        ConfigError: fewer than 2 members. As `training.train` otherwise.
    """
    if members < 2:
        raise ConfigError(f"an ensemble of {members} cannot be averaged; give 2 or more, or leave it out")
    directory = Path(output_dir)
    if table.split is None:  # all members share one split
        table = table.with_splits({"train": config.train_split, "validation": 1 - config.train_split}, config.seed)
    open_output(directory, resume=resume, overwrite=overwrite)
    say(config.maximised)
    results = []
    for number, seed in enumerate(member_seeds(config.seed, members)):
        say(f"member {number + 1} of {members}, seed {seed}")
        results.append(
            train(
                table, features, replace(config, seed=seed), directory / MEMBERS / str(number), resume=resume,
                say=say, progress=progress, brief=True,
            )
        )  # fmt: skip
    merged = merge([result.controller for result in results])
    run = Run(table, features.aligned(table.sample_ids), config)
    metrics = run.validation.measure(merged)
    epoch = max(result.best_epoch for result in results)
    extra = {"guard": run.guard.to_dict(), "metrics": metrics, "epoch": epoch, "members": members}
    document = {**controller_document(merged), **extra, "training": asdict(config)}
    write_checkpoint(directory / BEST, document)
    save_pretrained(merged, directory)
    if not (directory / GUARD).exists():
        write_json(directory / GUARD, AdaptiveGuard.fit(table.subset("train"), features, config.alpha).to_dict())
    figures = {"schema_version": 1, "maximised": config.maximised, "training": asdict(config), "members": members}
    write_json(directory / METRICS, {**figures, "best": {"epoch": epoch, **metrics}})
    say(f"ensemble of {members}: {in_words(metrics)}; saved as {directory / BEST}")
    return TrainingResult(directory, merged, epoch, metrics, sum(result.epochs_run for result in results))

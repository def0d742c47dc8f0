"""The directory of a training run: whether it may be used, what lies there, and the events for TensorBoard."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import require_writable
from budgetvlm.controller.checkpoint import BEST, GUARD, LAST, PRICES
from budgetvlm.controller.checkpoint_files import WEIGHTS, read_checkpoint
from budgetvlm.controller.provenance import CONFIG
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.errors import CheckpointError, ConfigError, OutputError
from budgetvlm.features import Features
from budgetvlm.features.cheap import EXTRACTOR
from budgetvlm.table import ProfileTable

METRICS, EVENTS = "metrics.json", "tensorboard"
MEMBERS = "members"  # of an ensemble: a directory for each
EACH = "each"  # of several data sets: a directory with the own controller of each
VERSIONS = "versions"  # see `budgetvlm.controller.versions`


def open_output(directory: str | Path, *, resume: bool = False, overwrite: bool = False, remove: bool = True) -> None:
    """Make the directory, or check that it may be used again; an earlier run is removed with ``overwrite``.

    ``remove``: False only checks, so that a mistake shows before any long work. Raises OutputError: a run lies there
    and neither flag was given, or the directory cannot be written; ConfigError: both flags.
    """
    directory = Path(directory)
    if resume and overwrite:
        raise ConfigError("--resume continues the run that lies in --output_dir and --overwrite replaces it; give one")
    present = [name for name in (BEST, LAST, MEMBERS) if (directory / name).exists()]
    if present and not (resume or overwrite):
        raise OutputError(
            f"{directory} already holds a training run ({', '.join(present)}); add --resume to continue it, "
            "--overwrite to replace it, or give another --output_dir"
        )
    require_writable(directory, "--output_dir")
    if overwrite and remove:
        _remove_run(directory)


def members_of(directory: Path) -> list[Path]:
    """The directories of an ensemble's members, in their order; empty if this is no ensemble."""
    return sorted((directory / MEMBERS).glob("[0-9]*"), key=lambda path: int(path.name))


def _remove_run(directory: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    for name in (BEST, LAST, CONFIG, WEIGHTS, METRICS, GUARD, PRICES, EXTRACTOR):
        (directory / name).unlink(missing_ok=True)
    for name in (EVENTS, MEMBERS, EACH, VERSIONS):
        shutil.rmtree(directory / name, ignore_errors=True)


def read_last(directory: str | Path, origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what a run needs to go on; None if no run was started there.

    ``origin``: options and data of the run that is to go on; they must equal those of the earlier one. Raises
    ConfigError: they differ; the message names what; CheckpointError: the file is damaged, or of an earlier version.
    """
    path = Path(directory) / LAST
    if not path.exists():
        return None
    document = read_checkpoint(path)
    if "members" not in document:
        raise CheckpointError(f"{path} was written by an earlier version of budgetvlm; start anew with --overwrite")
    differing = list(_differences(document.get("origin", {}), origin))
    if differing:
        raise ConfigError(
            f"the run in {directory} cannot be resumed: it had {'; '.join(differing)}. Give the same options and data, "
            "or --overwrite to start anew."
        )
    return document


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += _differences(before, now)
        elif before != now and not (isinstance(now, tuple) and list(now) == list(before or [])):
            found.append("other data" if name == "data" else f"{name} {before} instead of {now}")
    return found


def origin_of(table: ProfileTable, features: Features, config: TrainingConfig, members: int) -> dict[str, Any]:
    """Options and data that a resumed run has to share with the earlier one; how long to train may differ."""
    options = asdict(config)
    options["grpo"].pop("num_epochs")
    for name in ("patience", "device", "alpha"):
        options.pop(name)
    return {**options, "ensemble": members, "data": fingerprint(table, features)}


def fingerprint(table: ProfileTable, features: Features | None) -> str:
    """A digest of the measurements and the features; equal data have equal digests."""
    digest = hashlib.sha256(repr((table.knob_space.to_dict(), table.sample_ids, table.split)).encode())
    given = () if features is None else (features.image, features.language)
    for array in (table.accuracy, table.latency_ms, *given):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class EventLog:
    """Writes TensorBoard scalars, one point for each epoch. Raises OutputError: the events cannot be written."""

    def __init__(self, directory: str | Path, epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when training

        self.directory = Path(directory) / EVENTS
        try:
            self.writer = SummaryWriter(str(self.directory), purge_step=epoch + 1 if epoch else None)
        except OSError as error:
            raise self._error(error) from error

    def write(self, figures: Mapping[str, float | None]) -> None:
        """Write the figures of an epoch: the loss under "train/", all others under "validation/"."""
        try:
            for name, value in figures.items():
                if value is not None and name != "epoch":
                    side = "train" if name == "loss" else "validation"
                    self.writer.add_scalar(f"{side}/{name}", value, int(figures["epoch"] or 0))
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        try:
            self.writer.close()
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write TensorBoard events to {self.directory}: {error.strerror or error}")

"""The files that a training run writes while it goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from budgetvlm._io import time_text, write_json
from budgetvlm.controller.checkpoint import BEST, LAST, controller_document
from budgetvlm.controller.checkpoint_files import write_checkpoint
from budgetvlm.controller.kept import Kept
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.run_directory import MEMBERS, METRICS, EventLog
from budgetvlm.controller.training_options import TrainingConfig
from budgetvlm.controller.training_run import TrainingRun

SAVE_SECONDS = 5.0  # between two writings of what a resumed run needs


class RunFiles:
    """Writes a run's state, its members' best controllers and their figures, now and then and at the end.

    Args:
        directory: of the run; several members get directories of their own below it.
        run: may have been restored.
        origin: options and data, to check when the run is resumed.
    """

    def __init__(self, directory: Path, run: TrainingRun, origin: Mapping[str, Any]):
        self.directory, self.run, self.origin = directory, run, origin
        count = len(run.members)
        self.places = [directory] if count == 1 else [directory / MEMBERS / str(number) for number in range(count)]
        for place in self.places:
            place.mkdir(parents=True, exist_ok=True)
        pairs = zip(self.places, run.members, strict=True)
        self.events = [EventLog(place, member.epochs_run) for place, member in pairs]
        self.state = run.state() if run.members[0].history else None
        self.saved_best = [member.best.get("epoch") for member in run.members]  # of a restored run: written already
        self.saved_epoch, self.written = run.epoch, time.monotonic()

    def record(self) -> None:
        """Note a finished epoch."""
        for events, member in zip(self.events, self.run.members, strict=True):
            if member.epochs_run == self.run.epoch:
                events.write(member.history[-1])
        self.state, self.saved_epoch = self.run.state(), self.run.epoch
        if self.run.epoch == 0 or time.monotonic() - self.written > SAVE_SECONDS:
            self._write()

    def finish(self, kept: Kept | None = None) -> None:
        """Write the last finished epoch, and what the run keeps if it has ended, and close the logs."""
        self._write()
        if kept is not None:
            self._write_kept(kept)
        for events in self.events:
            events.close()

    def _write(self) -> None:
        if self.state is None:
            return
        for number, place in enumerate(self.places):
            self._write_member(number, place)
        write_checkpoint(self.directory / LAST, {**self.state, "origin": self.origin})
        self.written = time.monotonic()

    def _write_member(self, number: int, place: Path) -> None:
        member, run = self.run.members[number], self.run
        config = replace(run.config, seed=member.seed)
        if self.saved_best[number] != member.best["epoch"]:
            extra = {"metrics": {"loss": member.best["loss"], **member.metrics}, "epoch": member.best["epoch"]}
            _write_controller(place, run, run.controller(number), {**extra, "training": asdict(config)})
            self.saved_best[number] = member.best["epoch"]
        write_json(place / METRICS, {**_summary(config), "best": member.best, "history": member.history})

    def _write_kept(self, kept: Kept) -> None:
        run, fields = self.run, {"kept": kept.why, "members": len(self.run.members)}
        extra = {**fields, "metrics": kept.figures, "epoch": kept.epoch, "training": asdict(run.config)}
        _write_controller(self.directory, run, kept.controller, extra)
        alone = {"history": run.members[0].history} if len(run.members) == 1 else {}
        best = {"epoch": kept.epoch, **kept.figures}
        write_json(self.directory / METRICS, {**_summary(run.config), **fields, "best": best, **alone})


def _write_controller(place: Path, run: TrainingRun, controller: GRPOController, extra: Mapping[str, Any]) -> None:
    write_checkpoint(place / BEST, {**controller_document(controller), "guard": run.guard.to_dict(), **extra})
    controller.save_pretrained(place)


def _summary(config: TrainingConfig) -> dict[str, Any]:
    return {"schema_version": 1, "maximised": config.maximised, "training": asdict(config)}


def figures_line(figures: Mapping[str, Any]) -> str:
    """A validation's figures in one line, with their epoch if there is one."""
    room = "–" if figures["room_closed"] is None else f"{figures['room_closed']:.1%}"
    epoch = f"epoch {figures['epoch']:3d}  " if "epoch" in figures else ""
    return (
        f"{epoch}reward_mean {figures['reward_mean']:.4f} over all budgets and prices; over the budgets: accuracy_mean "
        f"{figures['accuracy_mean']:.4f}  latency_mean {time_text(figures['latency_mean'])}  violation_rate "
        f"{figures['violation_rate']:.2%}  room_closed {room}"
    )

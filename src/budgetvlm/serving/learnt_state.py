"""What the guard learns in service, kept in a file, so that a replica that dies goes on where it was.

The calibrated guard's own file is never written: a state says which calibration it grew from, and counts only as long
as that one is there. Replicas share the file; each of them learns the same of the same machine.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm._io import read_json, write_json
from budgetvlm.errors import BudgetVLMError
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.saved import guard_file, this_machine

if TYPE_CHECKING:
    from budgetvlm.runtime import AdaptiveVLM

STATE_FILE = "guard_state.json"
SCHEMA_VERSION = 1
EVERY_REQUESTS, EVERY_S = 10, 5.0
_log = logging.getLogger(__name__)


class LearntState:
    """Takes up and saves what a replica's guard learns.

    Args:
        controller: the controller's directory or a file in it.
        directory: where the state is kept; None: where the guard of this controller would be saved.
    """

    def __init__(self, controller: Path, directory: Path | None = None) -> None:
        self._calibrated = guard_file(controller)
        self.path = (directory or guard_file(controller, saving=True).parent) / STATE_FILE
        self._began_as, self._unsaved, self._saved_s = self._digest(), 0, time.monotonic()
        self._complained = False

    def restored(self) -> AdaptiveGuard | None:
        """The guard as it was last saved; None where there is no state, or one of another calibration or machine."""
        if not self.path.exists():
            return None
        try:
            document = read_json(self.path)
            if document.get("schema_version") != SCHEMA_VERSION or document.get("machine") != this_machine():
                return None
            return AdaptiveGuard.from_dict(document["guard"]) if document.get("began_as") == self._began_as else None
        except (BudgetVLMError, KeyError, TypeError, AttributeError) as error:
            _log.warning("the guard's state in %s is not usable and starts anew: %s", self.path, error)
            return None

    def answered(self, model: AdaptiveVLM) -> None:
        """Count a request, and save after some of them or some time."""
        self._unsaved += 1
        if self._unsaved >= EVERY_REQUESTS or self.due_s() == 0:
            self.save(model)

    def due_s(self) -> float | None:
        """How long the next saving may wait; None: nothing new was learnt."""
        return max(0.0, self._saved_s + EVERY_S - time.monotonic()) if self._unsaved else None

    def save(self, model: AdaptiveVLM) -> None:
        """Write what is new; a disk that takes nothing stops no service."""
        guard = model.guard.to_dict() if self._unsaved and self._digest() == self._began_as else None
        self._unsaved, self._saved_s = 0, time.monotonic()
        if not guard:
            return
        state = {"schema_version": SCHEMA_VERSION, "machine": this_machine(), "began_as": self._began_as}
        try:
            write_json(self.path, {**state, "guard": guard})
        except BudgetVLMError as error:
            if not self._complained:
                _log.warning("what the guard learns is not kept: %s", error)
            self._complained = True

    def _digest(self) -> str | None:
        """Of the calibrated guard's file, if there is one."""
        return hashlib.sha256(self._calibrated.read_bytes()).hexdigest() if self._calibrated.exists() else None

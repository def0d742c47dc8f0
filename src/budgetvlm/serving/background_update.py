"""Improves the controller while the server runs: `budgetvlm update` in a process of its own, at the lowest priority."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from budgetvlm.serving.replicas import ReplicaError
from budgetvlm.serving.serve_options import ServeOptions

LOWEST = 19  # priority
_log = logging.getLogger(__name__)


class Updates:
    """Runs an update now and then, and has the controller read anew where another version serves or is on trial.

    Attributes:
        results: how often an update ended with what: its "action", or "failed".
        drift: what the last one said of it.

    Args:
        versions: what the replicas serve and have on trial, as `versions.standing` says it.
        reload: reads the controller anew; no request is dropped.
    """

    def __init__(
        self, options: ServeOptions, versions: Callable[[], dict[str, Any]], reload: Callable[[], Awaitable[None]]
    ) -> None:
        self._options, self._versions, self._reload = options, versions, reload
        self.results: Counter[str] = Counter()
        self.drift: dict[str, Any] = {}
        self._said = ""
        self._process: asyncio.subprocess.Process | None = None
        self._task = asyncio.create_task(self._run(options.update_every or 0.0))

    async def close(self) -> None:
        """End it, whatever it is at: versions are whole at any moment."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _run(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._update()
            except (OSError, ValueError, KeyError, TypeError) as error:  # no process, or one that said something else
                self._failed(f"{type(error).__name__}: {error}")

    async def _update(self) -> None:
        self._process = process = await asyncio.create_subprocess_exec(
            *update_command(self._options), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST)
        said, errors = await process.communicate()
        if process.returncode:
            last_line = errors.decode(errors="replace").strip().rpartition("\n")[2]
            self._failed(f"{last_line or 'it said nothing'} (exit status {process.returncode})")
            return
        told = json.loads(said)
        action, why, self.drift, versions = (told[name] for name in ("action", "why", "drift", "versions"))
        self.results[str(action)] += 1
        self._say(str(why))
        if versions != self._versions():
            with contextlib.suppress(ReplicaError):  # it is in the log, and is tried again after the next update
                await self._reload()

    def _failed(self, why: str) -> None:
        self.results["failed"] += 1
        self._say(f"the controller could not be updated: {why}")

    def _say(self, text: str) -> None:
        """Write a line into the log, where it is not the same as the last one."""
        if text != self._said:
            _log.warning("update: %s", text)
        self._said = text


def update_command(options: ServeOptions) -> list[str]:
    """The words of the command."""
    words = [sys.executable, "-m", "budgetvlm.cli", "update", "--json", "--checkpoint", str(options.checkpoint)]
    words += ["--requests", str(options.log_requests)]
    return words + (["--data", str(options.update_data)] if options.update_data else [])

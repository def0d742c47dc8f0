"""Workers on Ray: actors on this machine or on a cluster. The only module that imports Ray."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from budgetvlm.cluster import watcher
from budgetvlm.cluster.cluster_options import LOCAL, ClusterOptions
from budgetvlm.cluster.hand_out import News, Worker
from budgetvlm.errors import BudgetVLMError, WorkerError

Say = Callable[[str], None]
PATIENCE_S = 60.0  # without a word of any worker, before the user hears what is waited for
LAST_WORDS_S, CONNECT_S = 10.0, 10.0
PRINTS = "print_to_stdstream"  # the function of Ray's that prints what its threads hear
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextmanager
def connected(options: ClusterOptions) -> Iterator[None]:
    """Be connected to a cluster: one of this machine, which is started and ended, or one at an address.

    Raises WorkerError: there is none at that address, or it cannot be started.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    local = {"num_cpus": options.local_cpus, "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    with _silence(), ExitStack() as own:
        if options.address == LOCAL:
            local |= {"_temp_dir": own.enter_context(_own_directory()), "object_store_memory": 100 * 2**20}
        try:
            _require_listener(options.address)
            ray.init(
                address=options.address, log_to_driver=False, logging_level=logging.CRITICAL,
                **(local if options.address == LOCAL else {}),
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise WorkerError(
                f"there is no Ray cluster at {options.address!r}: {_first_line(error)}. Give the address of its head, "
                "HOST:6379, or `auto` on one of its machines; `--ray local` starts one on this machine."
            ) from error
        own.callback(ray.shutdown)
        yield


def _require_listener(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Ray from printing each worker's death, at length, into a progress bar; no setting of its own does."""
    printing = getattr(ray._private.worker, PRINTS, None)
    setattr(ray._private.worker, PRINTS, lambda *given, **more: None)
    try:
        yield
    finally:
        setattr(ray._private.worker, PRINTS, printing)


@contextmanager
def _own_directory() -> Iterator[str]:
    """Yield a directory for a cluster's sessions, which a watcher removes, with all of its processes, in any case."""
    directory = tempfile.mkdtemp(prefix="bvlm-")  # short, because paths of sockets are
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one into the user's home
    process = subprocess.Popen(
        [sys.executable, "-S", watcher.__file__, directory],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip
    try:
        yield directory
    finally:
        process.communicate()  # closes its input and waits


def _machines() -> dict[str, dict[str, float]]:
    """Return what each machine has that workers can run on, by its id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}


def _places(options: ClusterOptions) -> Sequence[str | None]:
    """Return where workers are to run, one entry each: the id of a machine, or None for anywhere."""
    gpus, machines = options.gpus_per_worker, _machines()
    if options.alone:
        return [*(name for name, has in machines.items() if has.get("GPU", 0) >= gpus)][: options.workers]
    fit = sum(
        int(min(has["CPU"] // options.cpus_per_worker, has.get("GPU", 0) // gpus if gpus else has["CPU"]))
        for has in machines.values()
    )
    return [None] * (options.workers or fit)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip()


class _Actor:
    """A worker in its process. What it says travels with the pieces of its work."""

    def __init__(self, alone: bool) -> None:
        self.said: list[str] = []
        if alone:  # PyTorch, which is not imported yet, then chooses as it does without Ray
            os.environ.pop("OMP_NUM_THREADS", None)

    def build(self, build: Callable[[Say], Worker]) -> list[str]:
        self.worker = build(self.said.append)
        return self._said()

    def work(self, message: Any) -> Iterator[tuple[list[str], Any]]:
        for piece in self.worker.work(message):
            yield self._said(), piece

    def close(self) -> list[str]:
        self.worker.close()
        return self._said()

    def _said(self) -> list[str]:
        said, self.said[:] = list(self.said), []
        return said


@contextmanager
def ray_crew(options: ClusterOptions, build: Callable[[Say], Worker], say: Say) -> Iterator[RayCrew]:
    """Start workers and end them. Raises WorkerError: no cluster, or none of its machines can hold a worker."""
    with connected(options):
        crew = RayCrew(options, build, say)
        yield crew
        crew.close()


class RayCrew:
    """Actors, one for each worker.

    Attributes:
        awaited: what is under way -> number of the worker, and what it is: None while it is built.
    """

    def __init__(self, options: ClusterOptions, build: Callable[[Say], Worker], say: Say) -> None:
        self.options, self.say = options, say
        self.build = ray.put(build)
        self.events = deque[News]()
        self.awaited: dict[Any, int] = {}
        self.actors: dict[int, Any] = {}
        self.told = False
        self.places = _places(options)
        if not self.places:
            raise WorkerError(
                f"no machine of the cluster has {options.needs} for a worker. Give other --cpus_per_worker or --device."
            )
        say(f"workers: {len(self.places)}, {options.needs} each, on a cluster of machines: {len(_machines())}")
        for worker in range(len(self.places)):
            self._start(worker)

    def give(self, worker: int, message: Any) -> None:
        """Send a message to a worker that has nothing to do."""
        self.awaited[self.actors[worker].work.options(num_returns="streaming").remote(message)] = worker

    def hear(self) -> News:
        """Wait for the next event. Raises what a worker's own code raised; WorkerError: no worker is left."""
        while not self.events:
            if not self.awaited:
                raise WorkerError("no worker is left, because their machines are gone. What is finished is kept.")
            waiting = list(self.awaited)
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            if not ready:
                ready, _ = ray.wait(waiting, num_returns=1, timeout=PATIENCE_S)
            starting = sum(isinstance(one, ray.ObjectRef) for one in waiting)
            if not ready and starting and not self.told:
                self.say(f"workers that still open the model, or wait for room in the cluster: {starting}")
                self.told = True
            for one in ready:
                self._hear(one)
        return self.events.popleft()

    def replace(self, worker: int) -> None:
        """Start another worker in place of a dead one, unless its machine, which it has to have, is gone."""
        if self.places[worker] is None or self.places[worker] in _machines():
            self._start(worker)
        else:
            self.say(f"the machine of worker {worker + 1} is gone")

    def close(self) -> None:
        """Let the workers say their last words."""
        for words in [actor.close.remote() for actor in self.actors.values()]:
            with suppress(RayError):  # it may be gone, or not there yet
                self._repeat(ray.get(words, timeout=LAST_WORDS_S))

    def _start(self, worker: int) -> None:
        place = self.places[worker]
        where = {} if place is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(place, soft=False)}
        cpus = self.options.cpus_per_worker if place is None else _machines()[place]["CPU"]
        self.actors[worker] = ray.remote(num_cpus=cpus, num_gpus=self.options.gpus_per_worker, **where)(_Actor).remote(
            self.options.alone
        )
        self.awaited[self.actors[worker].build.remote(self.build)] = worker

    def _hear(self, one: Any) -> None:
        """Make an event of what is ready: the end of a worker's building, or the next piece of its work, or its end."""
        worker = self.awaited[one]
        try:
            if isinstance(one, ray.ObjectRef):
                said, event = ray.get(one), News(worker, "ready")
            else:
                said, value = ray.get(next(one))
                event = News(worker, "piece", value)
        except StopIteration:
            said, event = [], News(worker, "done")
        except RayTaskError as error:
            if isinstance(error.cause, BudgetVLMError):
                raise error.cause from None
            raise
        except RayError as error:
            ray.kill(self.actors.pop(worker))
            said, event = [], News(worker, "dead", _first_line(error))
        if event.what != "piece":
            del self.awaited[one]
        self._repeat(said)
        self.events.append(event)

    def _repeat(self, said: list[str]) -> None:
        for line in said:
            self.say(line)

"""Where workers run, how many there are, and what each of them gets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from budgetvlm.errors import ConfigError

LOCAL = "local"


@dataclass(frozen=True)
class ClusterOptions:
    """Where workers run and what each of them gets.

    Attributes:
        address: "local" for this machine alone, or the address of a Ray cluster: "auto" on one of its machines, or
            HOST:PORT of its head.
        workers: processes that hold the model (default: one for each GPU with --device cuda, else as many as the
            cluster's processors allow), if not given
        cpus_per_worker: processors, and threads, of each worker.
        gpus_per_worker: GPUs of each worker.
        alone: one worker on each machine, which gets all of its processors.
    """

    address: str = LOCAL
    workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    alone: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} has to be 1 at least"
            for name, value in (("ray_workers", self.workers), ("cpus_per_worker", self.cpus_per_worker))
            if value is not None and value < 1
        ]
        if self.address.startswith("ray://"):
            problems.append(
                f"--ray {self.address} is the address of a client, which cannot stream results; run on a machine of "
                "the cluster with --ray auto, or as a job with `ray job submit`"
            )
        if problems:
            raise ConfigError("cannot use a cluster: " + "; ".join(problems))

    @property
    def needs(self) -> str:
        """What a worker needs, in words."""
        if self.alone:
            return "a machine" + (" with a GPU" if self.gpus_per_worker else "")
        gpus = f" and {self.gpus_per_worker} GPU" if self.gpus_per_worker else ""
        return f"{self.cpus_per_worker} CPU{'s' if self.cpus_per_worker > 1 else ''}{gpus}"

    @property
    def local_cpus(self) -> int:
        """Processors that a cluster of this machine has: those there are, or more where more workers are asked for."""
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(own, self.cpus_per_worker * (1 if self.alone else self.workers or 1))

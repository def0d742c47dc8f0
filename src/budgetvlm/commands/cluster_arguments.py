"""The flags that have work done by several processes, on this machine or on a cluster."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm._extras import require
from budgetvlm.cluster.cluster_options import LOCAL, ClusterOptions
from budgetvlm.commands.flags import OptionFlags
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.cluster.hand_out import StartCrew

WORKERS = OptionFlags(ClusterOptions, "cpus_per_worker", workers="ray_workers")


def add_ray_flags(parser: Any) -> None:
    """Add the flags to a parser."""
    group = parser.add_argument_group("several processes or machines")
    group.add_argument(
        "--ray", nargs="?", const=LOCAL, metavar="ADDRESS",
        help="share the work among processes: of this machine (no address, or local), or of the Ray cluster at an "
        "address (HOST:6379, or auto on one of its machines). Needs the extra ray",
    )  # fmt: skip
    WORKERS.add(group)


def ray_crew_of(args: argparse.Namespace, *, alone: bool = False) -> StartCrew | None:
    """Return what starts the workers that the flags ask for; None where they ask for none.

    Raises ConfigError: flags that cannot work. MissingExtraError: Ray is not installed.
    """
    if args.ray is None:
        if args.ray_workers:
            raise ConfigError("--ray_workers says how many processes share the work; add --ray")
        return None
    gpus = int(getattr(args, "device", "cpu").startswith("cuda"))
    options = ClusterOptions(args.ray, gpus_per_worker=gpus, alone=alone, **WORKERS.read(args))
    require("ray", "ray", "cluster")
    from budgetvlm.cluster.on_ray import ray_crew

    return partial(ray_crew, options)


def own_path(path: str) -> str:
    """Return a path of this machine's file system as it is called from any working directory; a name as it is."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path

"""What a sweep measures and where its results go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from budgetvlm.errors import ConfigError


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures and where its results go; a ConfigError names all that cannot work.

    Attributes:
        splits: splits of the task.
        output_dir: the exp5 or exp6 directory.
        num_samples: samples drawn with the seed: one number for each split, or one for all together, which is shared in
            proportion to their sizes; None for all there are.
        max_new_tokens: largest number of tokens in an answer; None: what the task asks for.
        seed: seed that draws samples, settings and orders.
        strict: stop at a sample that cannot be used, instead of skipping, counting and naming it.
        overwrite: measure anew what is there, instead of resuming the sweep.
        model_fingerprint: tells one set of weights from another; a sweep of other weights is not resumed.
        task_options: how the task was opened, for later steps; they cannot go on with another.
        rank: number of this process, where several share the samples; it takes every ``world_size``-th sample.
        world_size: number of processes that share the samples.
        concurrency: requests in flight of a latency sweep, each timed by this side's clock, where the model is served
            elsewhere.
    """

    splits: tuple[str, ...]
    output_dir: Path
    num_samples: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    strict: bool = False
    overwrite: bool = False
    model_fingerprint: str | None = None
    task_options: Mapping[str, str] = field(default_factory=dict)
    rank: int = 0
    world_size: int = 1
    concurrency: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not self.splits or len(set(self.splits)) < len(self.splits):
            problems.append(f"split={'+'.join(self.splits)!r} has to name each split once")
        if self.num_samples is not None and len(self.num_samples) not in (1, len(self.splits)):
            problems.append(
                f"{len(self.num_samples)} numbers of samples for {len(self.splits)} splits; give 1 or one each"
            )
        if self.num_samples is not None and min(self.num_samples, default=0) < 1:
            problems.append(f"num_samples={list(self.num_samples)} has to be 1 at least")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} has to be 1 at least")
        if self.seed < 0:
            problems.append(f"seed={self.seed} has to be 0 or more")
        if not 0 <= self.rank < self.world_size:
            problems.append(f"rank={self.rank} has to be from 0 to below world_size={self.world_size}")
        if problems:
            raise ConfigError("cannot profile: " + "; ".join(problems))

    @property
    def file_rank(self) -> int | None:
        """The rank in file names; None where one process does it all."""
        return self.rank if self.world_size > 1 else None

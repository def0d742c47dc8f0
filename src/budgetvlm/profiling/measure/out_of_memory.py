"""When memory runs out: half the batch, and say so."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from budgetvlm.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


def for_each_batch(
    items: Sequence[T],
    batch_size: int,
    run: Callable[[Sequence[T], int], Iterable[R]],
    say: Callable[[str], None],
    together: int = 1,
) -> Generator[R, None, int]:
    """Yield what running over all items in batches gives; halve them, with a message, whenever memory runs out.

    ``run`` gets the items of ``together`` batches and the size of one, which is how many may take memory at once. It is
    called again with items of which it gave some already. The generator returns the batch size that fitted. Raises
    ConfigError: a single item did not fit.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + batch_size * together]
        try:
            yield from run(batch, batch_size)
        except (MemoryError, RuntimeError) as error:
            # on a CPU, torch says in words only that memory ran out
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(
                error
            ):
                raise
            if batch_size == 1:
                raise ConfigError("out of memory on one single sample: free memory, or use a smaller model") from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            say(f"out of memory: going on with batches of {batch_size // 2} instead of {batch_size}")
            batch_size //= 2
        else:
            start += len(batch)
    return batch_size


def in_parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in parts of a size; the last one may be smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))

"""When memory runs out: half the batch, and say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from budgetvlm.errors import ConfigError

T = TypeVar("T")


def for_each_batch(
    items: Sequence[T], batch_size: int, run: Callable[[Sequence[T]], None], say: Callable[[str], None]
) -> int:
    """Run over all items in batches; halve them, with a message, whenever memory runs out.

    Returns:
        The batch size that fitted.

    Raises:
        ConfigError: a single item did not fit.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + batch_size]
        try:
            run(batch)
        except (MemoryError, RuntimeError) as error:
            batch_size = halved(batch_size, error, say)
            continue
        start += len(batch)
    return batch_size


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out; on a CPU, torch says so in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halved(batch_size: int, error: MemoryError | RuntimeError, say: Callable[[str], None]) -> int:
    """Return the next batch size after an out-of-memory error; raise any other error again.

    Raises:
        ConfigError: a single sample did not fit.
    """
    if not is_out_of_memory(error):
        raise error
    if batch_size == 1:
        raise ConfigError("out of memory on one single sample: free memory, or use a smaller model") from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"out of memory: going on with batches of {batch_size // 2} instead of {batch_size}")
    return batch_size // 2

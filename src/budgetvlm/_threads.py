"""How many threads PyTorch uses, and work that several threads do side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Limit this process's PyTorch to a number of threads inside the ``with`` block; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(work: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[tuple[T, R]]:
    """Yield each item with what ``work`` makes of it, as they are done, at most ``count`` under way in threads.

    One at a time is done in this thread. Where this ends early, what is under way is waited for and lost.
    """
    if count == 1:
        for item in items:
            yield item, work(item)
        return
    left, under_way = iter(items), dict[Future[R], T]()
    with ThreadPoolExecutor(count) as threads:
        while True:
            under_way |= {threads.submit(work, item): item for item in islice(left, count - len(under_way))}
            if not under_way:
                return
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(done), done.result()

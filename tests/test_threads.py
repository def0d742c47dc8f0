"""Work that several threads do side by side."""

import threading

import pytest

from budgetvlm._threads import side_by_side


@pytest.mark.parametrize("count", [1, 3])
def test_all_is_done_once_and_as_much_side_by_side_as_may_be(count):
    together = threading.Barrier(count)
    lock, under_way, most = threading.Lock(), [0], [0]

    def work(item):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        together.wait(10)
        with lock:
            under_way[0] -= 1
        return item * item

    assert sorted(side_by_side(work, range(6), count)) == [(n, n * n) for n in range(6)]
    assert most[0] == count


@pytest.mark.parametrize("count", [1, 2])
def test_a_fault_is_the_callers(count):
    def work(item):
        if item == 2:
            raise ValueError("two")
        return item

    with pytest.raises(ValueError, match="two"):
        list(side_by_side(work, range(9), count))

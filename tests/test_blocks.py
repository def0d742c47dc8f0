"""Which blocks stay, with planted importances."""

import pytest
import torch

from benchmarks.block_orders import (
    best_order,
    change_by_block,
    order_by_addition,
    order_by_importance,
    order_by_score,
)
from budgetvlm.errors import ConfigError
from budgetvlm.vlm.blocks import active_blocks, check_order, default_order


def test_a_depth_runs_the_most_important_blocks_in_their_usual_order():
    order = (0, 5, 3, 1, 4, 2)
    assert active_blocks(order, 2) == (0, 5)
    assert active_blocks(order, 3) == (0, 3, 5)
    assert active_blocks(order, 6) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("depth", [0, 1, 7])
def test_a_depth_that_cannot_run(depth):
    with pytest.raises(ConfigError, match="Choose 2 to 6"):
        active_blocks((0, 5, 3, 1, 4, 2), depth)


def test_first_and_last_lead_the_order_however_unimportant():
    assert order_by_importance([0.0, 0.2, 0.9, 0.4, 0.0]) == (0, 4, 2, 3, 1)
    assert default_order(5) == (0, 4, 1, 2, 3)
    assert default_order(1) == (0,)


@pytest.mark.parametrize("order", [(0, 2), (0, 1, 2), (0, 2, 2), (0, 3, 1)])
def test_an_order_that_is_none(order):
    with pytest.raises(ConfigError, match="the first and the last in front"):
        check_order(order, 3)


def test_an_order_may_name_the_ends_either_way_round():
    assert check_order([2, 0, 1], 3) == (2, 0, 1)


def test_change_is_one_minus_the_cosine():
    right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    diagonal = torch.tensor([[1.0, 1.0]])
    changes = change_by_block([right, 3 * right, up, diagonal])
    assert changes == pytest.approx([0.0, 1.0, 1 - 0.5**0.5], abs=1e-6)


def test_elimination_finds_the_planted_order():
    worth = {0: 1.0, 1: 0.3, 2: 0.9, 3: 0.1, 4: 0.5, 5: 0.0}
    assert order_by_score(6, lambda blocks: sum(worth[b] for b in blocks)) == (0, 5, 2, 4, 1, 3)


def test_elimination_sees_blocks_that_only_work_together():
    """Blocks 1 and 2 are worth nothing apart, so judging each alone on top of the ends would call both useless."""

    def score(blocks):
        return 1.0 * ({1, 2} <= set(blocks)) + 0.2 * (3 in blocks)

    assert order_by_score(5, score)[:2] == (0, 4)
    assert set(order_by_score(5, score)[2:4]) == {1, 2}


def test_addition_starts_from_the_ends_and_adds_what_helps_most():
    gain = {1: 1.0, 2: 5.0, 3: 3.0}
    order = order_by_addition(5, lambda active: sum(gain.get(b, 0.0) for b in active))
    assert order == (0, 4, 2, 3, 1)


def test_the_best_order_is_best_at_the_depths_in_use():
    """Blocks 1 and 2 help only together: the order that has both at depth 4 wins at 4, and loses nothing at 5."""
    pair = {(0, 1, 2, 4): 9.0}
    orders = [(0, 4, 3, 1, 2), (0, 4, 1, 2, 3)]
    assert best_order(orders, [4, 5], lambda active: pair.get(active, 0.0)) == orders[1]
    assert best_order(orders, [5], lambda active: pair.get(active, 0.0)) == orders[0]

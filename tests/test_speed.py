"""How fast each stage runs: drift is followed slowly, a jump at once, a hiccup not at all."""

import math

import numpy as np
import pytest

from budgetvlm.errors import DataError
from budgetvlm.guard.kernels import pace_after
from budgetvlm.guard.learning import NUM_AGREEING, follow_speed
from budgetvlm.guard.speed import StageSpeed

STAGES = ("vision", "decode")
PREDICTED = [10.0, 20.0]


def run(speed, vision, decode, count=1):
    """Whether a jump was seen."""
    return sum(follow_speed(speed, PREDICTED, [10 * vision, 20 * decode]) for _ in range(count)) > 0


def test_a_slow_drift_is_followed_without_a_jump():
    speed = StageSpeed(STAGES)
    assert not any(run(speed, 1 + 0.002 * number, 1.0) for number in range(150))
    np.testing.assert_allclose(np.exp(speed.log_scale), [1.3, 1.0], rtol=0.05)
    assert set(speed.drift) == {"vision"}


def test_a_jump_is_believed_once_requests_agree():
    speed = StageSpeed(STAGES)
    assert not run(speed, 1.0, 10.0, NUM_AGREEING - 1)
    assert run(speed, 1.0, 10.0)
    np.testing.assert_allclose(np.exp(speed.log_scale), [1.0, 10.0], rtol=0.05)
    assert run(speed, 1.0, 1.0, NUM_AGREEING)
    assert speed.drift == {}


def test_one_hiccup_moves_little():
    speed = StageSpeed(STAGES)
    run(speed, 1.0, 1.0, 10)
    assert not run(speed, 50.0, 50.0)
    assert np.exp(speed.log_scale).max() < 1.02


def test_noise_is_no_jump_and_no_drift():
    rng, speed = np.random.default_rng(0), StageSpeed(STAGES)
    jumps = sum(run(speed, *np.exp(0.15 * rng.standard_normal(2))) for _ in range(2000))
    assert jumps == 0 and speed.drift == {}


def test_the_recent_slowdown_follows_the_last_requests_and_the_overview():
    speed = StageSpeed(STAGES)
    run(speed, 1.2, 1.2, 3)
    assert 1.08 < math.exp(speed.pace[0]) < 1.2
    assert np.exp(speed.log_scale).max() < 1.03
    assert pace_after(speed.pace[0], 10.0, 12.0) > math.exp(speed.pace[0]) > pace_after(speed.pace[0], 10.0, 10.0)
    slowdown = speed.pace[0]
    assert pace_after(slowdown, 10.0, 12.0) > math.exp(slowdown) > pace_after(slowdown, 10.0, 10.0)
    assert pace_after(slowdown, 10.0, 0.0) == pytest.approx(math.exp(slowdown))  # no part is over
    run(speed, 1.0, 1.0, 20)
    assert math.exp(speed.pace[0]) == pytest.approx(1.0, abs=0.02)
    run(speed, 10.0, 10.0, NUM_AGREEING)
    assert speed.pace[0] == 0.0  # the scales have taken it over


def test_the_slowdown_is_against_the_normal_speed_of_this_machine():
    speed = StageSpeed(STAGES, normal=np.log([2.0, 2.0]))
    assert speed.slowdown == 1.0
    run(speed, 2.0, 2.0, 5)
    assert speed.slowdown == pytest.approx(1.0)
    run(speed, 6.0, 6.0, NUM_AGREEING)
    assert speed.slowdown == pytest.approx(3.0)
    run(speed, 2.0, 6.0, NUM_AGREEING)  # a third of the time at its normal speed, the rest three times slower
    assert speed.slowdown == pytest.approx((1 + 2 * 3) / 3)
    assert not follow_speed(speed, PREDICTED, [0.0, 0.0]) and speed.slowdown == pytest.approx((1 + 2 * 3) / 3)


def test_stages_that_took_nothing_teach_nothing():
    speed = StageSpeed(STAGES)
    assert not any(follow_speed(speed, PREDICTED, speed.by_stage({"vision": 0.0, "other": 5.0})) for _ in range(20))
    assert speed.log_scale.tolist() == [0.0, 0.0]


def test_drift_is_against_the_normal_speed_of_this_machine():
    speed = StageSpeed(STAGES, np.log([2.0, 2.0]))
    run(speed, 2.0, 4.0, 200)
    assert speed.drift == {"decode": pytest.approx(2.0, rel=0.05)}


@pytest.mark.parametrize("scale", [[0.0], [0.0, math.nan]])
def test_scales_that_cannot_be(scale):
    with pytest.raises(DataError, match="do not fit its latency model"):
        StageSpeed.from_dict(STAGES, {"normal": [0.0, 0.0], "log_scale": scale})


def test_it_survives_a_document():
    speed = StageSpeed(STAGES, np.log([1.0, 2.0]))
    run(speed, 3.0, 3.0, 7)
    assert StageSpeed.from_dict(STAGES, speed.to_dict()).to_dict() == speed.to_dict()

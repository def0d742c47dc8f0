"""Feedback, updates and promotions that are killed at random moments; the benchmark does it more often."""

import random

from benchmarks import update_faults


def test_killed_during_feedback_updates_and_promotions_nothing_is_lost(tmp_path):
    report = update_faults.tried(update_faults.planted(tmp_path), 1, random.Random(0))
    assert report["faults"] == []
    assert report["killed"] == {"update": 1, "promotion": 1}
    assert report["acknowledged"] >= 2

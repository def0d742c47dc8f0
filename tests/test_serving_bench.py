"""What the load benchmark sends and counts, against a server without a model."""

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import serving_load, serving_traffic
from tests.fake_replicas import CHAT, WORDS, served


@pytest.fixture
def found():
    """What came of five requests, the last of which cannot be in time."""
    with served(word_s=0.01) as server:
        bodies = [json.dumps({**CHAT, "when_infeasible": "reject"})]
        requests = [[0.0, 0, 5000.0], [0.05, 0, 5000.0], [0.05, 0, None], [0.3, 0, 5000.0], [0.3, 0, 0.5]]
        plan = {"port": server.port, "path": serving_load.PATH, "bodies": bodies, "requests": requests, "probe_s": 0.05}
        yield asyncio.run(serving_traffic.run(plan)), requests


def test_all_requests_are_sent_whatever_became_of_those_before(found):
    rows = found[0]["rows"]
    assert [row["status"] for row in rows] == [200, 200, 200, 200, 400]
    assert {row["text"] for row in rows[:4]} == {"".join(WORDS)}
    assert all(row["budget_met"] and row["ms"] >= row["latency_ms"] > 0 for row in rows[:4])
    assert rows[4]["code"] == "too_small"
    assert found[0]["health_ms"]


class Exact:
    """A task whose right answer is what the fake replicas say."""

    def score(self, prediction, sample):
        return float(prediction == sample)


def test_what_is_right_admitted_and_late_is_counted(found):
    seen, requests = found
    requests = [[at, number, budget or 1e9] for at, number, budget in requests]
    seen["rows"][1].update(budget_met=False, ms=9000.0)  # late by both clocks
    seen["rows"][3] = {"status": 503, "ms": 1.0, "code": "expired"}  # it was to wait, and for nothing
    load = serving_load.Load.__new__(serving_load.Load)
    load._args, load._task, load._samples = Namespace(seconds=2.0), Exact(), ["".join(WORDS)]
    figures = load._figures(seen, requests)
    assert figures["admitted"] == pytest.approx(4 / 5)
    assert figures["late"] == figures["late_here"] == pytest.approx(2 / 4)
    assert figures["right_per_s"] == figures["right_here_per_s"] == 2 / 2.0
    assert figures["outcomes"] == {"200": 3, "expired": 1, "too_small": 1}

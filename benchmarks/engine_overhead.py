"""What routing, features and the decision add to a request at an engine, beside a direct call with the same payload.

    python benchmarks/engine_overhead.py                                    # an engine that takes no time, in a process
    python benchmarks/engine_overhead.py --engine engines.yaml --checkpoint DIR   # a real one with its controller

Each of the requests goes out three ways, in turns: the body alone by an HTTP client that keeps its connection; by
`AdaptiveVLM`, which computes features, decides, and has an engine of the fleet asked; and by `Router`, with the queue
of `budgetvlm serve`. What counts is the median of the differences. Without --engine the controller is not trained; the
decision takes the same time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path

import httpx2 as httpx
import numpy as np
import yaml

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

from budgetvlm._io import open_image
from budgetvlm.controller.network import GRPOController
from budgetvlm.engines.endpoint import Ask
from budgetvlm.engines.engine_model import EngineVLM
from budgetvlm.engines.opening import open_model
from budgetvlm.features.cheap import CheapFeatures
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.serving.engine_slots import EngineSlots, ServedEngines
from budgetvlm.serving.library import Router
from budgetvlm.tasks import load_task
from budgetvlm.vlm.loading import load
from tests.fake_engine import EngineProcess, FakeEngine
from tests.tiny_vlm import write_tiny_model

WARM, WANTED_MS = 20, 5.0


def took_ms(call: Callable[[], object]) -> float:
    """What a call takes."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3

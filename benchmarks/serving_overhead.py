"""What the server adds to a request: one client on this machine, beside a direct call, taking turns in one run.

    python benchmarks/serving_overhead.py [--num_requests 300 --json]

Both answer the same fresh questions of the bundled task, as PNG files; the direct call is `AdaptiveVLM.generate` in
this process with an image that is decoded. The server's client keeps its connection. Two processes do not run a model
equally fast, so what counts is the time beside the stages of the model, which each answer says. What the server spends
on reading the body and decoding the image's file is measured apart, in this process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from math import inf
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving_load import PATH, body_of
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.serving.chat_schema import ChatRequest
from budgetvlm.serving.requests import job_of
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.tasks import load_task
from tests.server_process import ServerProcess

WARM = 30  # requests that are not counted


def beside_the_model(call: Callable[[], dict[str, float]]) -> tuple[float, float]:
    """What a call takes, and that without the stages that it says the model took, in ms."""
    begin = time.perf_counter()
    stages_ms = call()
    took_ms = (time.perf_counter() - begin) * 1e3
    return took_ms, took_ms - sum(stages_ms.values())


def run(args: argparse.Namespace) -> dict[str, float]:
    """Medians in ms."""
    samples = fresh_samples(load_task("signs"), "test", args.num_requests + WARM, seed=args.seed)
    model = AdaptiveVLM.from_pretrained("reference", num_threads=1)
    options, took = ServeOptions(), []
    with tempfile.TemporaryDirectory() as state, ServerProcess("--state_dir", state) as server:
        connection = HTTPConnection(server.host, server.port)

        def ask(body: bytes) -> dict[str, float]:
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
            assert response.status == 200, said
            stages_ms: dict[str, float] = json.loads(said)["budgetvlm"]["stages_ms"]
            return stages_ms

        def read(body: bytes) -> dict[str, float]:
            job_of(ChatRequest.model_validate_json(body), None, 0.0, options)
            return {}

        for sample in samples:
            body, image = json.dumps(body_of(sample)).encode(), sample.load_image()
            direct = beside_the_model(lambda i=image, q=sample.question: model.generate(i, q, budget_ms=inf).stages_ms)
            served = beside_the_model(lambda body=body: ask(body))
            took.append((*direct, *served, beside_the_model(lambda body=body: read(body))[0]))
    direct_ms, direct_own, served_ms, served_own, read_ms = np.median(took[WARM:], axis=0)
    return {
        "direct_ms": direct_ms, "served_ms": served_ms, "direct_beside_the_model_ms": direct_own,
        "served_beside_the_model_ms": served_own, "added_ms": served_own - direct_own,
        "of_it_reading_and_decoding_ms": read_ms, "beside_that_ms": served_own - direct_own - read_ms,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_requests", type=int, default=300, metavar="N", help="default: 300")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON document on one line")
    args = parser.parse_args(argv)
    found = run(args)
    print(json.dumps(found) if args.json else "\n".join(f"{name:32}{ms:8.2f}" for name, ms in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

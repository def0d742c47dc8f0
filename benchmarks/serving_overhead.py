"""What the server adds to a request: one client on this machine, beside a direct call, taking turns in one run.

    python benchmarks/serving_overhead.py [--num_requests 300 --json]

Both answer the same fresh questions of the bundled task, as PNG files; the direct call is `AdaptiveVLM.generate` in
this process with an image that is decoded. The server's client keeps its connection. What the server spends on reading
the body and decoding the image's file is measured apart, in this process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

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


def timed_ms(call: Callable[[], Any]) -> float:
    """What a call takes."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def run(args: argparse.Namespace) -> dict[str, float]:
    """Medians in ms."""
    samples = fresh_samples(load_task("signs"), "test", args.num_requests + WARM, seed=args.seed)
    model = AdaptiveVLM.from_pretrained("reference", num_threads=1)
    options, took = ServeOptions(), []
    with tempfile.TemporaryDirectory() as state, ServerProcess("--state_dir", state) as server:
        connection = HTTPConnection(server.host, server.port)

        def ask(body: bytes) -> None:
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
            assert response.status == 200, said

        for sample in samples:
            body, image = json.dumps(body_of(sample)).encode(), sample.load_image()
            direct_ms = timed_ms(lambda image=image, q=sample.question: model.generate(image, q, budget_ms=math.inf))
            read_ms = timed_ms(lambda body=body: job_of(ChatRequest.model_validate_json(body), None, 0.0, options))
            took.append((timed_ms(lambda body=body: ask(body)), direct_ms, read_ms))
    served, direct, read = zip(*took[WARM:], strict=True)
    added = [one - other for one, other in zip(served, direct, strict=True)]
    return {
        "served_ms": statistics.median(served),
        "direct_ms": statistics.median(direct),
        "added_ms": statistics.median(added),
        "of_it_reading_and_decoding_ms": statistics.median(read),
        "beside_that_ms": statistics.median(one - other for one, other in zip(added, read, strict=True)),
    }


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

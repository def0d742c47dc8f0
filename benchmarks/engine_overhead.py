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
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import cast

import httpx2 as httpx
import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm._io import open_image, write_json
from budgetvlm.controller.network import GRPOController
from budgetvlm.engines.endpoint import Ask
from budgetvlm.engines.engine_model import EngineVLM
from budgetvlm.engines.opening import open_model
from budgetvlm.features.cheap import CheapFeatures, extractor_file
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.serving.embedded import Router
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


def untrained(fleet: str, directory: Path) -> Path:
    """Write a controller that was never trained, with cheap features that were fitted on some samples."""
    samples = fresh_samples(load_task("signs"), "train", 64, seed=0)
    images = [sample.load_image() for sample in samples]
    cheap = CheapFeatures.fit([sample.question for sample in samples], images)
    sizes = {"image_feat_dim": len(cheap.of_image(images[0])), "lang_feat_dim": len(cheap.of_question("what"))}
    GRPOController(**sizes, knob_values=open_model(fleet).knob_space.to_dict()).save_pretrained(directory)
    write_json(extractor_file(directory), cheap.to_dict())
    return directory


@contextmanager
def instant_engine(directory: Path) -> Iterator[str]:
    """Run a fake engine that takes no time in a process of its own; yields a fleet's file with it."""
    model = write_tiny_model(directory / "model")
    with EngineProcess(FakeEngine(load(str(model), device="meta"), first_ms=0.0, token_ms=0.0)) as engine:
        fleet = directory / "engines.yaml"
        fleet.write_text(yaml.safe_dump({"model_path": str(model), "replicas": [{"url": engine.url}]}))
        yield str(fleet)


def pictures(num_requests: int, side: int) -> Iterator[tuple[bytes, str]]:
    """Files of photographs' size (JPEG, four thirds of a side wide) and questions about them."""
    for number, sample in enumerate(fresh_samples(load_task("signs"), "test", num_requests, seed=1)):
        file = io.BytesIO()
        picture = sample.load_image().convert("RGB").resize((side * 4 // 3, side))
        picture.putpixel((number % side, number // side), (number % 256, 0, 0))  # no engine's cache knows it
        picture.save(file, "JPEG", quality=90)
        yield file.getvalue(), sample.question


def measured(fleet: str, checkpoint: Path, num_requests: int, side: int) -> dict[str, float]:
    """Times in ms."""
    options = {"allow_other_model": True}
    model = AdaptiveVLM.from_pretrained(fleet, checkpoint, **options)
    vlm, rows = cast(EngineVLM, model.vlm), []
    with Router(fleet, checkpoint, **options) as router, httpx.Client(trust_env=False) as client:
        for data, question in pictures(WARM + num_requests, side):
            image = open_image(data)
            answer = model.generate(image, question, budget_ms=inf)  # so that each of the three finds the same caches
            (endpoint,) = vlm.router.serving(answer.setting)[:1]
            body = endpoint.body(Ask([image], question, answer.setting, 16))
            told = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
            address, headers = f"{endpoint.client.spec.url}/chat/completions", {"Content-Type": "application/json"}
            direct = took_ms(partial(client.post, address, content=told, headers=headers, timeout=60))
            begin = time.perf_counter()
            answer = model.generate(image, question, budget_ms=inf)
            adaptive = (time.perf_counter() - begin) * 1e3
            routed = took_ms(partial(router.generate, image, question))
            rows.append((direct, adaptive, routed, answer.stages_ms["preprocess"], answer.stages_ms["controller"]))
    direct, adaptive, routed, preprocess, controller = np.array(rows[WARM:]).T
    return {
        "direct_p50_ms": float(np.median(direct)),
        "added_p50_ms": float(np.median(adaptive - direct)), "added_p90_ms": float(np.quantile(adaptive - direct, 0.9)),
        "added_with_queue_p50_ms": float(np.median(routed - direct)),
        "of_it_features_and_image_p50_ms": float(np.median(preprocess)),
        "of_it_controller_p50_ms": float(np.median(controller)),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; exit code 1 where more is added than wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", help="file that lists engines, or the address of one; a fake one if not given")
    parser.add_argument("--checkpoint", type=Path, help="its controller; one that was not trained if not given")
    parser.add_argument("--num_requests", type=int, default=200)
    parser.add_argument("--sides", type=int, nargs="+", default=[480, 960], help="heights of the images, in pixels")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        fleet = args.engine or stack.enter_context(instant_engine(Path(folder)))
        checkpoint = args.checkpoint or untrained(fleet, Path(folder) / "controller")
        found = {str(side): measured(fleet, checkpoint, args.num_requests, side) for side in args.sides}
    if args.json:
        print(json.dumps(found))
    for side, figures in found.items() if not args.json else ():
        print(f"images of {int(side) * 4 // 3} x {side}:")
        for name, value in figures.items():
            print(f"  {name:34} {value:8.2f}")
    return int(any(one["added_p50_ms"] > WANTED_MS for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())

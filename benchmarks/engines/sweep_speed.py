"""A sweep of accuracy through an engine, against loops over the settings that one writes by hand.

    python benchmarks/engines/sweep_speed.py --program ENV/bin/vllm --num_images 100 --in_flight 8

All ask the same engine about the same images at the same settings, and score the answers:

    by hand         for each setting, for each question: OpenAI's client, one request at a time
    by hand, N      the same with N requests in flight
    ours            `budgetvlm profile accuracy`, its opening of the engine included

The loops encode an image once, and keep their connections. They take turns in an order that is drawn; each has images
of its own, so that none finds the other's in the engine's caches.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.engines.engine_process import STEERED, EngineProcess
from benchmarks.engines.served_models import FAMILIES, write_model
from benchmarks.engines.visual_questions import size_of, write_folder
from budgetvlm.cli import main as budgetvlm
from budgetvlm.engines.opening import open_model
from budgetvlm.vlm.loading import load

Question = dict[str, Any]


class ByHand:
    """What somebody writes who knows the engine's arguments, and asks for each setting in turn."""

    def __init__(self, engine: EngineProcess, model: Path, crops: Sequence[int], max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._client = openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0)
        self._name, self._crops, self._images = engine.name, crops, load(str(model), device="meta").images

    def sweep(self, folder: Path, in_flight: int) -> int:
        """Return how many answers were right, over all settings."""
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        encoded = cache(lambda name: base64.b64encode((folder / name).read_bytes()).decode())
        right = 0
        for crops in self._crops:
            with ThreadPoolExecutor(in_flight) as pool:
                told = [(row, encoded(row["file_name"]), crops) for row in rows]
                right += sum(pool.map(lambda one: self._is_right(*one), told))
        return right

    def _is_right(self, row: Question, encoded: str, crops: int) -> bool:
        width, height = size_of(int(Path(row["file_name"]).stem))
        kwargs = self._images.options(height, width, crops)
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
        said = {"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}
        answer = self._client.chat.completions.create(
            model=self._name, messages=[said], max_tokens=self._max_tokens, temperature=0,
            extra_body={"mm_processor_kwargs": kwargs} if kwargs else {},
        )  # fmt: skip
        return answer.choices[0].message.content in row["answers"]


def ours(args: argparse.Namespace, fleet: Path, folder: Path, results: Path) -> None:
    """Sweep as our command does it; how many requests are in flight is said in the fleet's file."""
    code = budgetvlm([
        "profile", "accuracy", "--model_path", str(fleet), "--dataset_name", "boxes", "--data_files", f"train={folder}",
        "--metric", "exact_match", "--prompt", "{question}", "--split", "train",
        "--max_new_tokens", str(args.max_tokens), "--batch_size", str(8 * args.in_flight), "--output_dir", str(results),
    ])  # fmt: skip
    if code:
        raise SystemExit(f"our sweep ended with exit code {code}")


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return seconds of each way, by repeat."""
    model = write_model(args.family, folder / args.family)
    took: dict[str, list[float]] = {}
    images = iter(range(10**9))
    with EngineProcess(args.program, model, folder / "log", *STEERED) as engine:
        fleet = folder / "engines.yaml"
        fleet.write_text(
            f"model_path: {model}\nreplicas: [{{url: {engine.url}, engine: vllm, concurrency: {args.in_flight}}}]\n"
        )
        crops = [int(value) for value in open_model(str(fleet)).knob_space.values("max_crops")]
        by_hand = ByHand(engine, model, crops, args.max_tokens)
        for repeat in range(-1, args.repeats):  # the first one warms up
            ways = {
                "by hand": lambda data, _: by_hand.sweep(data, 1),
                f"by hand, {args.in_flight}": lambda data, _: by_hand.sweep(data, args.in_flight),
                "ours": lambda data, results: ours(args, fleet, data, results),
            }
            for number, name in enumerate(random.Random(repeat).sample(sorted(ways), len(ways))):
                count = args.num_images if repeat >= 0 else 9
                data = write_folder(folder / f"data{repeat}-{number}", [next(images) for _ in range(count)])
                begin = time.perf_counter()
                ways[name](data, folder / f"results{repeat}-{number}")
                if repeat >= 0:
                    took.setdefault(name, []).append(time.perf_counter() - begin)
                    print(f"{name}: {took[name][-1]:.1f} s", file=sys.stderr)
    mine = sum(took["ours"])
    return {
        "crops": crops, "questions": 3 * args.num_images, "seconds": took,
        "times_as_fast": {name: sum(seconds) / mine for name, seconds in took.items()},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="vllm, in the environment of environment.sh")
    parser.add_argument("--family", choices=FAMILIES, default="idefics3")
    parser.add_argument("--num_images", type=int, default=100, metavar="N", help="three questions each; default: 100")
    parser.add_argument("--in_flight", type=int, default=8, metavar="N", help="requests at once; default: 8")
    parser.add_argument("--max_tokens", type=int, default=16, metavar="N", help="of an answer; default: 16")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="of each way; default: 2")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args, Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

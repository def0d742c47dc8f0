"""What a real engine does with what steering relies on: counts, answers, caches, cancelling, several at once.

    python benchmarks/engines/engine_facts.py --program ENV/bin/vllm --family idefics3

Requests go through OpenAI's client, without this package's own. What an image should count comes from the model's
directory alone: `vlm.loading.load` on the device "meta". One request at a time, but where several are asked for.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.engines.engine_process import STEERED, EngineProcess
from benchmarks.engines.served_models import FAMILIES, write_model
from budgetvlm.vlm.loading import load

SIZES = (448, 224), (224, 448), (640, 480), (128, 128), (90, 700), (1600, 1200), (333, 211)  # width, height
QUESTION = "what is the code in red"


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Return an image of its own: coarse random colours."""
    coarse = np.random.default_rng([seed, width, height]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def data_url(image: Image.Image) -> str:
    """Return an image as engines take it."""
    held = io.BytesIO()
    image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


class Asking:
    """Requests to one engine."""

    def __init__(self, engine: EngineProcess) -> None:
        self.client = openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0, timeout=120)
        self.engine = engine

    def __call__(self, image: Image.Image, question: str = QUESTION, *, tokens: int = 4, stream: bool = False,
                 **extra: Any) -> Any:  # fmt: skip
        """Return an answer, or with ``stream`` its pieces."""
        parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": question}]
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return self.client.chat.completions.create(
            model=self.engine.name, messages=[{"role": "user", "content": parts}], max_tokens=tokens, temperature=0,
            extra_body=extra, **more,
        )  # fmt: skip

    def took_ms(self, image: Image.Image, question: str = QUESTION, **options: Any) -> float:
        """Return what an answer takes."""
        begin = time.perf_counter()
        self(image, question, **options)
        return (time.perf_counter() - begin) * 1e3

    def whole_stream(self, image: Image.Image, **options: Any) -> tuple[str, Any]:
        """Return text and usage of a stream."""
        pieces = list(self(image, stream=True, **options))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        return text, next(piece.usage for piece in reversed(pieces) if piece.usage)


class Facts:
    """What is asked of one engine; each method returns a dictionary that can be printed."""

    def __init__(self, ask: Asking, model: Path) -> None:
        self.ask, self.sketch, self.whole = ask, load(str(model), device="meta"), load(str(model))
        self.crops = self.sketch.knob_space.values("max_crops")

    def kwargs(self, image: Image.Image, max_crops: Any) -> dict[str, Any]:
        """Return what the family's image processor is told."""
        told = self.sketch.images.options(image.height, image.width, int(max_crops))
        return {} if not told else {"mm_processor_kwargs": told}

    def settings(self) -> Iterator[tuple[Any, Any]]:
        """Yield each value of `max_crops`, and its setting with all else at the largest."""
        for value in self.crops:
            yield value, self.sketch.knob_space.setting(**{**self.sketch.knob_space.full, "max_crops": value})

    def counts(self) -> dict[str, Any]:
        """Compare the prompt's tokens and the answer with the sketch's and the model's in this process."""
        rows, wrong, same = [], 0, 0
        for number, size in enumerate(SIZES):
            image = picture(*size, number)
            visual, text = self.sketch.prompt_size(image, QUESTION)
            for value, setting in self.settings():
                expected = int(visual[self.sketch.knob_space.index(setting)]) + text
                extra = self.kwargs(image, value)
                try:
                    answer, streamed = self.ask(image, **extra), self.ask.whole_stream(image, **extra)
                except openai.APIError as error:
                    rows.append([*size, value, expected, str(error)[:200]])
                    wrong += 1
                    continue
                seen = answer.usage.prompt_tokens, streamed[1].prompt_tokens
                own = self.whole.generate(image, QUESTION, setting, max_new_tokens=4).text
                same += own == answer.choices[0].message.content == streamed[0]
                wrong += seen != (expected, expected)
                details = answer.usage.prompt_tokens_details
                rows.append([*size, value, expected, *seen, details.model_dump(exclude_none=True) if details else None])
        return {"rows": rows, "wrong": wrong, "same_answers": same, "of": len(rows)}

    def caches(self) -> dict[str, float]:
        """Return the median time to one token, in ms, of a fresh image and of repeats of several kinds."""
        extra = {**self.kwargs(picture(640, 480, 0), self.crops[-1]), "tokens": 1}
        took: dict[str, list[float]] = {}
        for seed in range(12):
            image, other = picture(640, 480, 100 + seed), picture(640, 480, 100 + seed)
            other.putpixel((0, 0), tuple(channel ^ 1 for channel in other.getpixel((0, 0))))
            asked: dict[str, tuple[Image.Image, dict[str, Any]]] = {
                "fresh": (image, {}),
                "the same again": (image, {}),
                "another question": (image, {"question": "read the sign"}),
                "one bit of one pixel": (other, {}),
                "cache_salt": (image, {"cache_salt": f"salt {seed}"}),
            }
            for name, (shown, more) in asked.items():
                took.setdefault(name, []).append(self.ask.took_ms(shown, **more, **extra))
        return {name: float(np.median(ms[2:])) for name, ms in took.items()}

    def cancelling(self) -> dict[str, Any]:
        """Close a stream after two pieces and wait until the engine works on nothing."""
        stream = self.ask(picture(640, 480, 7), tokens=2000, stream=True, ignore_eos=True)
        next(stream), next(stream)
        running = self.ask.engine.metric("vllm:num_requests_running")
        stream.close()
        begin = time.perf_counter()
        while self.ask.engine.metric("vllm:num_requests_running") and time.perf_counter() - begin < 20:
            time.sleep(0.02)
        return {"running_before": running, "until_stopped_ms": (time.perf_counter() - begin) * 1e3}

    def at_once(self) -> dict[int, dict[str, float]]:
        """Return answers per second and the median latency with several in flight, all images fresh."""
        found = {}
        for n in (1, 2, 4, 8):
            images = [picture(640, 480, 1000 * n + i) for i in range(6 * n)]
            extra = self.kwargs(images[0], self.crops[-1])
            call, begin = partial(self.ask.took_ms, **extra), time.perf_counter()
            with ThreadPoolExecutor(n) as pool:
                took = list(pool.map(call, images))
            per_second = len(images) / (time.perf_counter() - begin)
            found[n] = {"per_second": per_second, "median_ms": float(np.median(took))}
        return found

    def latency(self) -> dict[Any, float]:
        """Return the median time of an answer of 4 tokens by `max_crops`, in ms, all images fresh."""
        found = {}
        for value in self.crops:
            images = [picture(640, 480, 10_000 + 100 * int(value) + i) for i in range(8)]
            took = [self.ask.took_ms(image, **self.kwargs(image, value)) for image in images]
            found[value] = float(np.median(took[2:]))
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="vllm, in the environment of environment.sh")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--facts", nargs="+", default=["latency", "counts", "caches", "cancelling", "at_once"])
    parser.add_argument("--log", type=Path, help="file for what the engine says; default: dropped")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(args.family, Path(folder, args.family))
        with EngineProcess(args.program, model, args.log or Path(folder, "log"), *STEERED) as engine:
            facts = Facts(Asking(engine), model)
            for name in args.facts:
                print(json.dumps({name: getattr(facts, name)()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The whole way through a real engine: check, profile, prepare, train, calibrate, answer within budgets.

    python benchmarks/engines/end_to_end.py --program ENV/bin/vllm --family idefics3 --out result.json

The model has random weights. An answer counts as right where it is that of the full setting, which says nothing about
public models; what counts here is who was late, and what this package adds to a request. For the latter a request
through `AdaptiveVLM` and a direct one, a JPEG of the same size to the same engine with the same arguments over a kept
connection, take turns.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.engines.engine_process import STEERED, EngineProcess
from benchmarks.engines.served_models import FAMILIES, write_model
from benchmarks.engines.visual_questions import jpeg, questions, write_folder
from budgetvlm._io import open_image
from budgetvlm.engines.opening import open_model
from budgetvlm.engines.payload import data_url
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.vlm.loading import load

MAX_TOKENS = 8
PER_IMAGE = 3  # questions
SPLITS = {"train": 0.4, "validation": 0.3, "test": 0.3}  # shares of all images
PROFILED = {"train": 1.0, "validation": 0.4, "test": 0.4}  # shares of their questions; the others are fresh
WARM = 20  # requests that are not counted


class Run:
    """One engine with the data and the results of one run."""

    def __init__(self, args: argparse.Namespace, engine: EngineProcess, model: Path, folder: Path) -> None:
        self.args, self.engine, self.model, self.folder = args, engine, model, folder
        self.client = openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0)
        self.fleet = folder / "engines.yaml"
        self.fleet.write_text(
            f"model_path: {model}\nreplicas: [{{url: {engine.url}, engine: vllm, concurrency: {max(args.at_once)}}}]\n"
        )
        self.images = load(str(model), device="meta").images
        self.counts = {name: round(share * args.num_images) for name, share in SPLITS.items()}

    def direct(self, url: str, question: str, kwargs: dict[str, Any] | None) -> str:
        """Ask the engine without this package."""
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        answer = self.client.chat.completions.create(
            model=self.engine.name, messages=[{"role": "user", "content": parts}], max_tokens=MAX_TOKENS,
            temperature=0, seed=0, extra_body={"mm_processor_kwargs": kwargs} if kwargs else {},
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    def data(self) -> str:
        """Write a folder for each split, with the full setting's answers; returns what `--data_files` is told."""
        most, first, folders = self.images.most_crops, 0, []
        for name, count in self.counts.items():
            folder = self.folder / "data" / name
            if not folder.exists():
                write_folder(
                folder, range(first, first + count), per_image=PER_IMAGE,
                answer=lambda path, question: self.full_answer(path, question, most),
            )  # fmt: skip
            folders.append(f"{name}={folder}")
            first += count
        return ",".join(folders)

    def full_answer(self, path: Path, question: str, most: int) -> str:
        """Return what the engine answers about an image's file at the most crops."""
        image = open_image(path)
        return self.direct(data_url(image), question, self.images.options(image.height, image.width, most))

    def command(self, *words: Any) -> str:
        """Run a command of `budgetvlm`; returns its standard output."""
        print("budgetvlm", *words, file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "budgetvlm.cli", *map(str, words)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode}: {done.stdout}")
        return done.stdout

    def at(self, at_once: int, files: str) -> Iterator[tuple[str, Any]]:
        """Train and calibrate for a number of requests in flight, and answer live."""
        a, place = self.args, self.folder / f"at{at_once}"
        data_set = ("--dataset_name", "boxes", "--data_files", files, "--metric", "exact_match",
                    "--prompt", "{question}")  # fmt: skip
        task = (*data_set, "--max_new_tokens", MAX_TOKENS)
        profiled = [str(round(PER_IMAGE * self.counts[name] * share)) for name, share in PROFILED.items()]
        model, splits = ("--model_path", self.fleet), ("--split", ",".join(SPLITS))
        exp5, exp6, data = self.folder / "exp5", place / "exp6", place / "data" / "controller_training_data.json"
        if not exp5.exists():
            self.command("profile", "accuracy", *model, *task, *splits, "--num_samples", ",".join(profiled),
                         "--output_dir", exp5)  # fmt: skip
        self.command("profile", "latency", *model, *task, *splits, "--num_samples", a.num_timed,
                     "--concurrency", at_once, "--output_dir", exp6)  # fmt: skip
        self.command("prepare", *model, *data_set, "--exp5_dir", exp5, "--exp6_dir", exp6, "--output_data_path", data)
        controller = place / "controller"
        self.command("train", "--data", data, "--output_dir", controller, "--num_epochs", a.num_epochs, "--overwrite")
        self.command("calibrate", *model, *task, "--data", data, "--checkpoint", controller, "--samples",
                     a.num_calibrated, "--concurrency", at_once)  # fmt: skip
        yield "controller", controller
        said = self.command("evaluate", "--live", *model, *task, "--data", data, "--checkpoint", controller,
                            "--num_requests", a.num_requests, "--concurrency", at_once, "--output_dir", place,
                            "--json")  # fmt: skip
        yield "live", json.loads(said)

    def overhead(self, controller: Path) -> dict[str, float]:
        """Return medians in ms of requests through `AdaptiveVLM` and of direct ones, taking turns, all images fresh."""
        model = AdaptiveVLM.from_pretrained(str(self.fleet), controller)
        took = []
        for i in range(self.args.num_overhead + WARM):
            number = 10**6 + 18 * i + i % 9  # the 9th after it has the same size
            question, mine, file = next(questions(number, 1)), open_image(jpeg(number)), jpeg(number + 9)
            begin = time.perf_counter()
            answer = model.generate(mine, question, budget_ms=inf, max_new_tokens=MAX_TOKENS)
            ours_ms = (time.perf_counter() - begin) * 1e3
            kwargs = self.images.options(mine.height, mine.width, answer.setting["max_crops"])
            begin = time.perf_counter()
            self.direct(f"data:image/jpeg;base64,{base64.b64encode(file).decode()}", question, kwargs)
            direct_ms = (time.perf_counter() - begin) * 1e3
            took.append((ours_ms, direct_ms, ours_ms - direct_ms))
        ours, direct, added = np.median(took[WARM:], axis=0)
        return {"ours_ms": ours, "direct_ms": direct, "added_ms": added}


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all figures of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    model, found = folder / args.family, {}
    if not model.exists():
        write_model(args.family, model)
    with EngineProcess(args.program, model, args.log or folder / "log", *STEERED) as engine:
        one = Run(args, engine, model, folder)
        found["check"] = json.loads(one.command("check-model", "--engine", one.fleet, "--json"))
        found["knob_space"] = open_model(str(one.fleet)).knob_space.to_dict()
        files = one.data()
        for at_once in args.at_once:
            made = dict(one.at(at_once, files))
            found[f"live at {at_once}"] = made["live"]
            print(json.dumps({f"live at {at_once}": made["live"]}), file=sys.stderr, flush=True)
        found["overhead"] = one.overhead(made["controller"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="vllm, in the environment of environment.sh")
    parser.add_argument("--family", choices=FAMILIES, default="idefics3")
    parser.add_argument("--num_images", type=int, default=150, metavar="N", help="three questions each; default: 150")
    parser.add_argument("--num_timed", type=int, default=40, metavar="N", help="samples timed; default: 40")
    parser.add_argument("--num_calibrated", type=int, default=60, metavar="N", help="default: 60")
    parser.add_argument("--num_epochs", type=int, default=30, metavar="N", help="of training; default: 30")
    parser.add_argument("--num_requests", type=int, default=500, metavar="N", help="live; default: 500")
    parser.add_argument("--num_overhead", type=int, default=200, metavar="N", help="pairs; default: 200")
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 4], metavar="N", help="in flight; default: 1 4")
    parser.add_argument("--log", type=Path, help="file for what the engine says; default: dropped")
    parser.add_argument("--folder", type=Path, help="keep all that is made there, and go on with what is there already")
    parser.add_argument("--out", type=Path, help="file for the figures; default: standard output")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        said = json.dumps(run(args, args.folder or Path(folder)), indent=1)
    args.out.write_text(said) if args.out else print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())

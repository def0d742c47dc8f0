"""What accuracy it costs that a model is behind an engine: the bundled model here, and through this project's server.

    python benchmarks/engine_accuracy.py --out result.json

Both ways are the guide's steps with the same numbers of samples and the same seeds: profile, prepare, train, calibrate,
`evaluate --live` on the same questions. Here the controller reads the model's own features, a choice is revised and
answers are hurried; through the engine it reads features that are made without the model, and an answer is made as it
was asked for. Budgets are shares of what the full setting takes on each way. Times of both are taken in turn, so run it
alone on a machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.server_process import ServerProcess  # noqa: E402 (found from the root)

LOWEST, HIGHEST, WANTED = 0.5, 0.85, 0.015  # budgets as shares of the full setting's time; accuracy that may be lost


class Way:
    """One way to the model, by the commands that a user gives.

    Attributes:
        seconds: what each step took.
    """

    def __init__(self, args: argparse.Namespace, model_path: str, place: Path) -> None:
        self.args, self.model, self.place = args, ["--model_path", model_path], place
        self.seconds: dict[str, float] = {}
        place.mkdir()

    def run(self) -> list[dict[str, Any]]:
        """Go through all steps; returns the records of the requests on the clock."""
        a, place, task = self.args, self.place, ["--dataset_name", "signs"]
        splits = ["--split", "train,validation,test"]
        self._step("profile", "accuracy", *self.model, *task, *splits, "--num_samples", a.num_samples, "--cells",
                   a.cells, "--output_dir", place / "exp5")  # fmt: skip
        self._step("profile", "latency", *self.model, *task, *splits, "--num_samples", a.num_timed, "--repeats", 1,
                   "--output_dir", place / "exp6")  # fmt: skip
        self._step("prepare", *self.model, *task, "--exp5_dir", place / "exp5", "--exp6_dir", place / "exp6",
                   "--output_data_path", place / "d.json")  # fmt: skip
        self._step("train", "--data", place / "d.json", "--output_dir", place / "c", "--ensemble", a.ensemble)
        self._step("calibrate", "--checkpoint", place / "c", "--samples", a.num_calibrated)
        self._step("evaluate", "--live", "--checkpoint", place / "c", "--num_requests", a.num_requests, "--split",
                   "test", "--output_dir", place / "live")  # fmt: skip
        records: list[dict[str, Any]] = json.loads((place / "live" / "live.json").read_text())["records"]
        return [record for record in records if record["system"] == "guarded"]

    def _step(self, *words: Any) -> None:
        began = time.perf_counter()
        command = [sys.executable, "-m", "budgetvlm.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        name = " ".join(str(word) for word in words[:2] if not str(word).startswith("-"))
        self.seconds[name] = time.perf_counter() - began


def figures(records: Sequence[dict[str, Any]], share: float | None = None) -> dict[str, float]:
    """Accuracy and late requests at a budget, or at all of `LOWEST` to `HIGHEST`."""
    some = [r for r in records if LOWEST <= r["budget_share"] <= HIGHEST and share in (None, r["budget_share"])]
    late = [r["violated"] and r["promised"] for r in some]
    means = {"accuracy": [r["accuracy"] for r in some], "late": late, "latency_ms": [r["latency_ms"] for r in some]}
    return {"requests": len(some), **{name: float(np.mean(values)) for name, values in means.items()}}


def compared(here: Sequence[dict[str, Any]], there: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Both ways at each budget, and what the engine loses over all of them, with an interval over the questions."""
    asked = [(r["number"], r["sample_id"], r["budget_share"]) for r in here]
    assert asked == [(r["number"], r["sample_id"], r["budget_share"]) for r in there], "not the same requests"
    shares = sorted({r["budget_share"] for r in here if LOWEST <= r["budget_share"] <= HIGHEST})
    pairs = [(a["accuracy"], b["accuracy"]) for a, b in zip(here, there, strict=True) if a["budget_share"] in shares]
    lost = np.array([a - b for a, b in pairs])
    draws = np.random.default_rng(seed).integers(len(lost), size=(2000, len(lost)))
    low, high = np.percentile(lost[draws].mean(axis=1), (2.5, 97.5))
    return {
        "budgets": {f"{s:g}": {"here": figures(here, s), "engine": figures(there, s)} for s in shares},
        "all": {"here": figures(here), "engine": figures(there)},
        "lost": float(lost.mean()),
        "interval": [float(low), float(high)],
        "holds": bool(lost.mean() <= WANTED),
    }


def main() -> int:
    """Run both ways and print one document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_samples", default="800,200,200", help="profiled samples of each split")
    parser.add_argument("--num_timed", default="24,12,12", help="timed samples of each split")
    parser.add_argument("--cells", type=float, default=0.3, help="share of the accuracy sweep that is measured")
    parser.add_argument("--ensemble", type=int, default=5, help="controllers that are averaged")
    parser.add_argument("--num_calibrated", type=int, default=50, help="requests that calibrate")
    parser.add_argument("--num_requests", type=int, default=1500, help="requests on the clock")
    parser.add_argument("--out", type=Path, help="file for the document")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        here = Way(args, "reference", Path(name) / "here")
        mine = here.run()
        with ServerProcess("--state_dir", name) as server:
            fleet = Path(name) / "engines.yaml"
            fleet.write_text(f"model_path: reference\nreplicas: [{{url: '{server.address}/v1', concurrency: 2}}]\n")
            there = Way(args, str(fleet), Path(name) / "engine")
            found = compared(mine, there.run())
    document = json.dumps(found | {"seconds": {"here": here.seconds, "engine": there.seconds}}, indent=1)
    print(document)
    if args.out:
        args.out.write_text(document)
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

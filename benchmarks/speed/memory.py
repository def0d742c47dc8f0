"""Training on a large table: the peak of resident memory of a process that trains one epoch.

    python -m benchmarks.speed.memory write DIRECTORY SAMPLES      a made-up table and its features
    python -m benchmarks.speed.memory train DIRECTORY              one epoch on them; prints seconds and GB

Each is a process of its own, so that neither sees the other's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.bench_data import Material, made_up
from benchmarks.speed.figures import Figure, timed_s
from budgetvlm.controller.training import train
from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.errors import OutputError
from budgetvlm.features import Features
from budgetvlm.table import ProfileTable

MOST_GB = 4.0
SAMPLES, QUICK_SAMPLES = 1_000_000, 100_000
BATCH = 1024  # memory does not depend on it, an epoch's time does

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def measure(material: Material) -> list[Figure]:
    """One run: a peak is a peak."""
    samples = QUICK_SAMPLES if material.options.quick else SAMPLES
    with tempfile.TemporaryDirectory() as directory:
        _process("write", directory, str(samples))
        found = json.loads(_process("train", directory).splitlines()[-1])
    return [
        Figure.of(
            f"peak memory of an epoch, {samples:,} samples x 27 settings", "GB", [found["peak_gb"]], at_most=MOST_GB
        ),
        Figure.of(f"the whole run, batches of {BATCH}", "s", [found["seconds"]]),
    ]


def _process(*words: str) -> str:
    """What a step printed.

    Raises:
        OutputError: it failed; its last words are told.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.memory", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OutputError(f"the large table could not be made or trained on: {last}. Free memory or disk space.")
    return done.stdout


def write(directory: Path, samples: int) -> None:
    """A table and features of the bundled model's widths."""
    table, features = made_up(samples, stages=False)
    table.save(directory / "large.table.parquet")
    features.save(directory / "large.features.safetensors")


def train_once(directory: Path) -> None:
    """One epoch, as `budgetvlm train` does it."""
    table = ProfileTable.load(directory / "large.table.parquet")
    features = Features.load(directory / "large.features.safetensors")
    config = TrainingConfig(grpo=GRPOConfig(num_epochs=1, batch_size=BATCH))
    options = {"overwrite": True, "say": lambda line: None, "progress": False}
    train(table, features, config, directory / "controller", **options)  # type: ignore[arg-type]


def peak_gb() -> float:
    """The most memory that this process had in RAM so far, in GB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # bytes there, KiB elsewhere


def main(words: list[str]) -> None:
    """See the module."""
    directory = Path(words[1])
    if words[0] == "write":
        write(directory, int(words[2]))
    else:
        seconds = timed_s(lambda: train_once(directory))
        print(json.dumps({"peak_gb": peak_gb(), "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1:])

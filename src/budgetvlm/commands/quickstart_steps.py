"""The steps of the quickstart: commands that can be typed, with their options and where they write."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from budgetvlm.errors import ConfigError

SPLITS = "train,validation,test"
CELLS, TIMED_CELLS = 0.2, 0.25  # of all work and of all timings: the rest is predicted
ENSEMBLE = 5  # controllers: where few samples are profiled, it is half a point better than one network


@dataclass(frozen=True)
class Options:
    """How much is measured and trained; a ConfigError names all numbers that cannot work.

    Attributes:
        model_path: the bundled "reference", or the directory of a model of your own.
        num_samples: number of samples whose accuracy is measured, over all three splits.
        num_timed: number of samples among them whose latency is measured.
        num_epochs: number of epochs at most.
        num_calibrated: number of requests that calibrate the guard.
        seed: seed of everything random.
    """

    model_path: str = "reference"
    num_samples: int = 1100
    num_timed: int = 30
    num_epochs: int = 100
    num_calibrated: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_samples": 30, "num_timed": 24, "num_epochs": 1, "num_calibrated": 28, "seed": 0}
        given = {name: getattr(self, name) for name in least}
        wrong = [f"{name}={n}: give {least[name]} or more" for name, n in given.items() if n < least[name]]
        if self.num_timed > self.num_samples:
            wrong.append(f"num_timed={self.num_timed} is more than num_samples={self.num_samples}: time a part of them")
        if wrong:
            raise ConfigError("the quickstart cannot run so: " + "; ".join(wrong))


@dataclass(frozen=True)
class Places:
    """Where the steps write, all below one directory."""

    root: Path = Path("results/quickstart")

    @property
    def data(self) -> Path:
        return self.root / "data" / "controller_training_data.json"

    @property
    def controller(self) -> Path:
        return self.root / "controller"

    @property
    def picture(self) -> Path:
        return self.root / "evaluation.png"


@dataclass(frozen=True)
class Step:
    """A command of `budgetvlm` and what it is for."""

    title: str
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """As it could be typed."""
        return "budgetvlm " + shlex.join(self.words)


def steps(options: Options, places: Places) -> tuple[Step, ...]:
    """The commands, in order, as the README shows them: flags at their defaults are left out."""
    exp5, exp6 = str(places.root / "exp5_accuracy"), str(places.root / "exp6_latency")
    model, seed = _given(options, "model_path"), _given(options, "seed")
    sampled = (*model, "--split", SPLITS, *seed)
    data, controller = ("--data", str(places.data)), str(places.controller)
    return (
        Step(
            f"Accuracy on {options.num_samples} samples, a fifth of the work where they are not for testing (exp5)",
            ("profile", "accuracy", *sampled, "--num_samples", str(options.num_samples), "--cells", str(CELLS),
             "--output_dir", exp5),
        ),
        Step(
            f"Latency of {options.num_timed} samples, each at a quarter of the settings (exp6)",
            ("profile", "latency", *sampled, "--num_samples", str(options.num_timed), "--cells", str(TIMED_CELLS),
             "--output_dir", exp6),
        ),
        Step(
            "Training data: join both, extract features",
            ("prepare", *model, "--exp5_dir", exp5, "--exp6_dir", exp6, "--output_data_path", str(places.data)),
        ),
        Step(
            f"Train {ENSEMBLE} controllers with GRPO and average them",
            ("train", *data, "--output_dir", controller, "--ensemble", str(ENSEMBLE), *_given(options, "num_epochs"),
             *seed),
        ),
        Step(
            "Evaluate on the test split",
            ("evaluate", *data, "--checkpoint", controller, "--output_dir", str(places.root)),
        ),
        Step(
            f"Calibrate the guard on this machine with {options.num_calibrated} requests",
            ("calibrate", *model, *data, "--checkpoint", controller, "--samples", str(options.num_calibrated), *seed),
        ),
    )  # fmt: skip


def _given(options: Options, name: str) -> tuple[str, ...]:
    """A flag with its value, or nothing where it is the default's."""
    value = getattr(options, name)
    return () if value == getattr(Options, name) else (f"--{name}", str(value))

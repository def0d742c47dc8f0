"""Everything once, with the bundled task and model: profile, prepare, train, evaluate, calibrate, three decisions.

Each step is one of the other commands, shown as it could be typed. A second run uses what the first one finished.
"""

from __future__ import annotations

import argparse
import shlex
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from budgetvlm.tasks import Sample, Task

TASK = "signs"
SPLITS = "train,validation,test"
ENSEMBLE = 5  # controllers: where few samples are profiled, it is half a point better than one network
OPTIONS_FILE = "quickstart.json"


@dataclass(frozen=True)
class Options:
    """How much is measured and trained.

    Attributes:
        model_path: the bundled "reference", or a model of one's own.
        num_samples: samples that exp5 scores, over all three splits.
        num_timed: how many of them exp6 times.
        num_epochs: of training.
        num_calibrated: requests that calibrate the guard.
        seed: of everything random.

    Raises:
        ConfigError: numbers that cannot work; all of them at once.
    """

    model_path: str = "reference"
    num_samples: int = 1100
    num_timed: int = 45
    num_epochs: int = 100
    num_calibrated: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_samples": 30, "num_timed": 9, "num_epochs": 1, "num_calibrated": 28, "seed": 0}
        wrong = [
            f"{name}={getattr(self, name)}: give {low} or more"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if self.num_timed > self.num_samples:
            wrong.append(f"num_timed={self.num_timed} is more than num_samples={self.num_samples}: time a part of them")
        if wrong:
            raise ConfigError("the quickstart cannot run so: " + "; ".join(wrong))


@dataclass(frozen=True)
class Places:
    """Where the steps write, all below one directory."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data" / "controller_training_data.json"

    @property
    def controller(self) -> Path:
        return self.root / "controller"

    @property
    def picture(self) -> Path:
        return self.root / "evaluation.png"

    def example(self, example: Example) -> Path:
        return self.root / f"example_{example.difficulty}.png"


@dataclass(frozen=True)
class Step:
    """A command of `budgetvlm` and what it is for."""

    title: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A request to show: a sample of the test split and a budget as a share of the full setting's latency."""

    title: str
    kind: str
    difficulty: str
    budget_share: float


EXAMPLES = (
    Example("large print, ample time", "read", "large", 1.0),
    Example("small print, ample time", "read", "small", 1.0),
    Example("small print, little time", "read", "small", 0.4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm quickstart`."""
    default = Options()
    directory = Path("results/quickstart")
    parser.add_argument("--output_dir", type=Path, default=directory, help=f"where all goes (default: {directory})")
    parser.add_argument("--model_path", default=default.model_path, help="the bundled 'reference' (default), or yours")
    for name, text in (
        ("num_samples", "samples whose accuracy is measured"),
        ("num_timed", "samples among them whose latency is measured"),
        ("num_epochs", "epochs of training"),
        ("num_calibrated", "requests that calibrate the guard"),
        ("seed", "seed of everything random"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")


def run(args: argparse.Namespace) -> int:
    """Run the steps, then show three decisions and where the picture is."""
    names = Options.__dataclass_fields__
    options = Options(**{name: getattr(args, name) for name in names})
    places = Places(args.output_dir)
    _require_same_options(options, places.root)
    started = time.monotonic()
    todo = steps(options, places)
    for number, step in enumerate(todo, 1):
        print(f"\n[{number}/{len(todo)}] {step.title}", flush=True)
        if step.words[0] == "calibrate" and _is_calibrated(places):
            print("it is calibrated already")
            continue
        _run_command((*step.words, _earlier_run(places)) if step.words[0] == "train" else step.words)
    print("\nThree decisions")
    for line in decisions(options, places):
        print(line, flush=True)
    print(f"\nAsk your own: {_ask_command(options, places)}")
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes. Picture: {places.picture}")
    return 0


def steps(options: Options, places: Places) -> tuple[Step, ...]:
    """The commands, in order."""
    exp5, exp6 = str(places.root / "exp5_accuracy"), str(places.root / "exp6_latency")
    what = ("--model_path", options.model_path, "--dataset_name", TASK)
    sampled = (*what, "--split", SPLITS, "--seed", str(options.seed))
    data = ("--data", str(places.data))
    return (
        Step(
            f"Accuracy of every setting on {options.num_samples} samples (exp5)",
            ("profile", "accuracy", *sampled, "--num_samples", str(options.num_samples), "--output_dir", exp5),
        ),
        Step(
            f"Latency of every setting on {options.num_timed} samples (exp6)",
            ("profile", "latency", *sampled, "--num_samples", str(options.num_timed), "--output_dir", exp6),
        ),
        Step(
            "Training data: join both, extract features",
            ("prepare", *what, "--exp5_dir", exp5, "--exp6_dir", exp6, "--output_data_path", str(places.data)),
        ),
        Step(
            f"Train {ENSEMBLE} controllers with GRPO and average them",
            ("train", *data, "--output_dir", str(places.controller), "--num_epochs", str(options.num_epochs),
             "--seed", str(options.seed), "--ensemble", str(ENSEMBLE)),
        ),
        Step(
            "Evaluate on the test split",
            ("evaluate", *data, "--checkpoint", str(places.controller), "--output_dir", str(places.root),
             "--overwrite"),
        ),
        Step(
            f"Calibrate the guard on this machine with {options.num_calibrated} requests",
            ("calibrate", *what, *data, "--checkpoint", str(places.controller), "--samples",
             str(options.num_calibrated), "--seed", str(options.seed)),
        ),
    )  # fmt: skip


def decisions(options: Options, places: Places) -> Iterator[str]:
    """Ask the adaptive model about three samples of the test split; the lines to print.

    Raises:
        DataError: the prepared data lacks the full setting's latency.
    """
    from budgetvlm.commands.ask import describe
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.tasks import load_task

    reference_ms, task = _reference_ms(places), load_task(TASK)
    model = AdaptiveVLM.from_pretrained(options.model_path, controller=places.controller)
    for number, example in enumerate(EXAMPLES, 1):
        sample, path = _find(task, example), places.example(example)
        image = sample.load_image()
        image.save(path)
        budget_ms = round(example.budget_share * reference_ms, 1)
        answer = model.generate(image, sample.question, budget_ms=budget_ms, max_new_tokens=task.max_new_tokens)
        yield f"\n{number}. {example.title}: {path}"
        yield f"   question {sample.question} (right: {sample.answers[0]})"
        yield textwrap.indent(describe(answer), "   ")


def _reference_ms(places: Places) -> float:
    """The full setting's median latency. Raises DataError."""
    from budgetvlm._io import read_json

    reference_ms = read_json(places.data).get("latency_reference_ms")
    if reference_ms is None:
        raise DataError(f"{places.data} lacks latency_reference_ms; remove {places.data.parent} and run again")
    return float(reference_ms)


def _find(task: Task, example: Example) -> Sample:
    """The first sample of the test split with the example's labels."""
    wanted = {"kind": example.kind, "difficulty": example.difficulty}
    return next(sample for sample in task.samples("test") if sample.groups.items() >= wanted.items())


def _ask_command(options: Options, places: Places) -> str:
    words = ("--image", str(places.example(EXAMPLES[-1])), "--question", "which sign has the largest number")
    more = ("--budget-ms", f"{_reference_ms(places):.0f}", "--checkpoint", str(places.controller))
    model = () if options.model_path == Options.model_path else ("--model_path", options.model_path)
    return "budgetvlm ask " + shlex.join((*words, *more, *model))


def _run_command(words: tuple[str, ...]) -> None:
    from budgetvlm.commands.catalogue import command_parser

    print("$ budgetvlm " + shlex.join(words), flush=True)
    args = command_parser(words[0]).parse_args(words[1:])
    args.run(args)


def _is_calibrated(places: Places) -> bool:
    from budgetvlm._io import read_json
    from budgetvlm.controller.checkpoint import GUARD

    return bool(read_json(places.controller / GUARD).get("calibrated_on"))


def _earlier_run(places: Places) -> str:
    """What training is to do with an earlier run: replace it if the data is newer, else go on with it."""
    from budgetvlm.controller.checkpoint import LAST

    made, last = places.data.stat().st_mtime, places.controller / LAST
    older = last.exists() and last.stat().st_mtime < made
    return "--overwrite" if older else "--resume"


def _require_same_options(options: Options, root: Path) -> None:
    """Note the options of a first run; refuse to mix another run's results with them.

    Raises:
        OutputError: the directory holds a run with other options.
    """
    from budgetvlm._io import read_json, write_json

    path = root / OPTIONS_FILE
    if not path.exists():
        write_json(path, asdict(options))
    elif read_json(path) != asdict(options):
        raise OutputError(
            f"{root} holds a quickstart with other options ({read_json(path)}, now {asdict(options)}). "
            f"Choose another --output_dir, or remove {root}."
        )

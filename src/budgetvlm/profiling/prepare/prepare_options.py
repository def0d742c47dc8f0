"""What `budgetvlm.profiling.prepare.preparation` is asked for, checked before anything is read or loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from budgetvlm.errors import ConfigError
from budgetvlm.tasks import TaskOptions

LatencyFill = Literal["model", "settings", "none"]
LATENCY_FILLS = get_args(LatencyFill)


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` is asked for; a ConfigError names all that cannot work.

    Attributes:
        exp5_dir: directory of the accuracy results.
        exp6_dir: directory of the latency results.
        task: data set that was profiled.
        model_path: directory of the model, engines.yaml, an engine's address, or the bundled "reference"; if not given,
            that which the results name.
        output_data_path: file to write; features and table go beside it.
        groups: label whose samples belong together, so that no split and no interval parts them, for example a
            document; if not given, what `profile accuracy` was given, or else the samples of an image.
        train_split: share of the training samples among training and validation samples.
        test_split: share of the images (or groups) that are held out where the data set has no test split; if not
            given, a fifth, or half of its validation split.
        calibration_samples: number of samples that are left out, for calibration; if not given, 50 where the data set
            has no others, and fewer of a small one.
        latency_fill: what becomes of latencies that exp6 did not measure: "model" predicts samples (and cells left out
            by `profile latency --cells`) from token counts, "settings" whole settings as well, "none" stops.
        feature_batch_size: number of images encoded at once.
        seed: seed of the splits.
        device: PyTorch device that extracts the features.
        encoder: text or image encoder of Transformers (a directory or hub name) whose vectors are the features of its
            side; the other side's are then made without a model as well.
    """

    exp5_dir: Path = Path("results/profiling/exp5_accuracy")
    exp6_dir: Path = Path("results/profiling/exp6_latency")
    task: TaskOptions = field(default_factory=TaskOptions)
    model_path: str | None = None
    output_data_path: Path = Path("data/controller_training_data.json")
    groups: str | None = None
    train_split: float = 0.8
    test_split: float | None = None
    calibration_samples: int | None = None
    latency_fill: LatencyFill = "model"
    feature_batch_size: int = 32
    seed: int = 0
    device: str = "cpu"
    encoder: str | None = None

    @property
    def dataset_name(self) -> str:
        """The task's name, as the result files have it."""
        return self.task.name

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.train_split < 1:
            problems.append(f"train_split={self.train_split} leaves train or validation empty; give a share like 0.8")
        if self.test_split is not None and not 0 <= self.test_split < 1:
            problems.append(f"test_split={self.test_split} has to be a share from 0 to below 1")
        if self.calibration_samples is not None and self.calibration_samples < 0:
            problems.append(f"calibration_samples={self.calibration_samples} has to be 0 or more")
        if self.latency_fill not in LATENCY_FILLS:
            problems.append(f"latency_fill={self.latency_fill!r} is unknown; choose from {', '.join(LATENCY_FILLS)}")
        if self.feature_batch_size < 1:
            problems.append(f"feature_batch_size={self.feature_batch_size} has to be 1 at least")
        if self.seed < 0:
            problems.append(f"seed={self.seed} has to be 0 or more")
        if self.output_data_path.suffix != ".json" or self.output_data_path.is_dir():
            problems.append(f"output_data_path={str(self.output_data_path)!r} has to be the name of a .json file")
        if problems:
            raise ConfigError("cannot prepare the data: " + "; ".join(problems))

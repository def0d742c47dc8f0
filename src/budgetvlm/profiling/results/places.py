"""Where the results of a model go if nobody says where, and where they are found again."""

from __future__ import annotations

import re
from pathlib import Path

from budgetvlm._io import read_json
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.profiling.results.reading import result_files
from budgetvlm.profiling.results.result_files import FORMATS, Kind, results_directory

ROOT = Path("results/profiling")
BUNDLED, BUNDLED_TASK = "reference", "signs"


def default_directory(kind: Kind, model_path: str = BUNDLED) -> Path:
    """Return the directory of a model's results: the bundled one's is the guide's, any other model's names it."""
    _, address, host = model_path.partition("://")
    name = re.sub(r"[^\w.-]+", "_", host.strip("/")) if address else Path(model_path).resolve().name
    own = () if model_path == BUNDLED else (name,)
    return ROOT.joinpath(*own, FORMATS[kind].experiment)


def find_results(directory: Path, dataset_name: str, kind: Kind, model_path: str | None) -> Path:
    """Return the directory that was asked for or, where that is the default, one that holds results of this data set.

    ``model_path``: its own directory is looked into first; None: any model's may do, after the default. Raises
    ConfigError: there are results of several models.
    """
    if Path(directory) != default_directory(kind):
        return directory
    own = sorted(ROOT.glob(f"*/{FORMATS[kind].experiment}"))
    if model_path is not None:
        own = [default_directory(kind, model_path)]
    elif _holds(directory, dataset_name, kind):
        return directory
    found = [place for place in own if results_directory(place, dataset_name, kind).is_dir()]
    if len(found) > 1:
        raise ConfigError(
            f"there are {kind} results of {dataset_name} of several models: {', '.join(map(str, found))}. Say which "
            "with --model_path."
        )
    return found[0] if found else directory


def measured_dataset(exp5_dir: Path) -> str | None:
    """Return the one data set whose accuracy was measured; None: none was, or the bundled one, which is the default.

    ``exp5_dir``: the default stands for the directories of all models. Raises ConfigError: several were.
    """
    stem = FORMATS["accuracy"].experiment
    places = [exp5_dir, *(ROOT.glob(f"*/{stem}") if exp5_dir == default_directory("accuracy") else ())]
    files = (sorted(folder.glob(f"{stem}*.json")) for place in places for folder in place.glob(f"{stem}_*"))
    configs = (read_json(found[0]).get("config", {}) for found in files if found)
    names = sorted({str(config["dataset_name"]) for config in configs if "dataset_name" in config})
    if len(names) > 1 and BUNDLED_TASK not in names:
        raise ConfigError(f"there are accuracy results of {', '.join(names)}; say which with --dataset_name")
    return names[0] if len(names) == 1 else None


def _holds(directory: Path, dataset_name: str, kind: Kind) -> bool:
    try:
        return bool(result_files(directory, dataset_name, kind))
    except DataError:  # what is wrong there is said where the files are read
        return False

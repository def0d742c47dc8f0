"""Set before anything heavy is imported: no hub, no display, and one thread a process.

The tensors of the tests are tiny, so that a second thread costs more than it brings, and with one thread sums are
taken in the same order on every machine. Child processes inherit all of it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "120"
os.environ["XDG_DATA_HOME"] = os.devnull  # no guard of the user's own

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python WORDS...` from the repository root, as a user would; returns exit code, output and errors."""

    def run(*words: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def run_cli(
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `budgetvlm WORDS...` in a process of its own."""

    def run(*words: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return run_script("-m", "budgetvlm.cli", *words, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return each family's tiny model, made when it is first asked for."""
    from tiny_more_families import write_tiny_family

    from budgetvlm.vlm import load_vlm

    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            made[name] = load_vlm(str(write_tiny_family(name, tmp_path_factory.mktemp(name))))
        return made[name]

    return model

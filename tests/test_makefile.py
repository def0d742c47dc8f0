"""The Makefile's targets that take seconds, run in a copy; the long ones, as far as `make --dry-run` shows them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout with the Makefile, the folders that it names, an environment and caches."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (
        "src/budgetvlm/__pycache__",
        "tests",
        "experiments",
        "benchmarks/speed/__pycache__",
        "results",
        ".venv",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "src/budgetvlm/__init__.py").touch()
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_help_is_the_default_and_lists_every_target(copy):
    assert TARGETS == ["help", "quickstart", "test", "clean"]
    done = make(copy)
    assert done.returncode == 0, done.stderr
    assert all(f"make {name}" in done.stdout for name in TARGETS)
    assert make(copy, "help").stdout == done.stdout


def test_clean_succeeds_twice_and_keeps_results(copy):
    for _ in range(2):
        done = make(copy, "clean")
        assert done.returncode == 0, done.stderr
    left = {path.relative_to(copy).as_posix() for path in copy.rglob("*")}
    assert not any("__pycache__" in name or ".venv" in name for name in left)
    assert {"results", "src/budgetvlm/__init__.py"} <= left


def test_clean_and_another_target_can_be_given_together(copy):
    done = make(copy, "--dry-run", "clean", "test")
    assert done.returncode == 0, done.stderr
    assert "pytest" in done.stdout


def test_a_python_that_is_too_old_is_named(copy):
    shutil.rmtree(copy / ".venv")
    old = copy / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    done = make(copy, f"PYTHON={old}", "quickstart")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stdout + done.stderr

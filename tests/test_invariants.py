"""What has to hold of all files: no pickle, no path of one machine, every imported package declared."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import house

ROOT = Path(__file__).resolve().parents[1]

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


ALL_CODE = sources("src", "experiments", "scripts", "benchmarks", "tests")


@pytest.mark.parametrize("path", ALL_CODE, ids=ids(ALL_CODE))
def test_nothing_is_loaded_by_pickle(path):
    assert not house.top_level_names(path) & PICKLES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            assert (node.arg, node.value.value) not in {("weights_only", False), ("allow_pickle", True)}, (
                node.value.lineno
            )


def test_no_file_speaks_of_the_machine_it_was_written_on():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    machine = re.compile(r"/(work|root)/")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" in data:
            continue
        lines = data.decode("utf-8").splitlines()
        found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if machine.search(line)]
    assert found == []


@pytest.mark.parametrize(
    ("folder", "extra"),
    [
        ("src", ("data", "engines", "explain", "lmms", "ray", "serve", "tracing")),
        ("experiments", ()),
        ("tests", ("dev", "data", "engines", "explain", "serve")),
    ],
)
def test_every_package_that_is_imported_is_declared(folder, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [line for name in extra for line in project["optional-dependencies"][name]]
    # what is imported under another name
    names = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml", "opentelemetry-api": "opentelemetry"}
    found = (re.split(r"[^\w-]", line)[0] for line in wanted)
    declared = {names.get(name, name.replace("-", "_")) for name in found}
    own = {"budgetvlm", "experiments", "benchmarks", "tests"}
    own |= {path.stem for path in sources("tests", "experiments", "benchmarks")}
    own |= {path.name for path in (ROOT / "experiments").iterdir()}
    imported = {name for path in sources(folder) for name in house.top_level_names(path) if name}
    assert imported - own - set(sys.stdlib_module_names) <= declared

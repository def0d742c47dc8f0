"""What has to hold of the sources themselves: which part may import which, no pickle, no path of one machine."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "budgetvlm"

BASE = {
    "errors",
    "knobs",
    "_io",
    "_compiled",
    "_threads",
    "_extras",
    "_version",
    "__init__",
}  # anybody may import these
MODEL_SIDE = {"vlm", "tasks"}  # the model under control and its questions
# may know both sides
JOINTS = {"profiling", "importing", "runtime", "answer", "live", "integrations", "cli", "commands"}
FOREIGN = {"transformers", "tokenizers"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def part(path: Path) -> str:
    """The first name below the package: "vlm" for vlm/adapter.py, "table" for table.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it, with `from a import b` as both a and a.b."""
    package = ["budgetvlm", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: Path) -> set[str]:
    """The parts of this package that the file imports."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("budgetvlm.")}
    return {name for name in names if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()}


def packages_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def learning_side() -> list[Path]:
    """All that is not named above: a new module is held to the rule until it is listed as a joint."""
    return [path for path in sources("src/budgetvlm") if part(path) not in BASE | MODEL_SIDE | JOINTS]


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_the_reader_of_imports_sees_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import a.b\nfrom c import d\ndef f():\n    from budgetvlm.vlm import load_vlm\n")
    assert imports(file) == {"a.b", "c", "c.d", "budgetvlm.vlm", "budgetvlm.vlm.load_vlm"}
    assert parts_imported(file) == {"vlm"}


def test_the_learning_side_is_there():
    assert {"table", "features", "controller", "guard", "policies", "evaluation"} <= {part(p) for p in learning_side()}


@pytest.mark.parametrize("path", learning_side(), ids=ids(learning_side()))
def test_learning_never_imports_the_model_side(path):
    assert not parts_imported(path) & (MODEL_SIDE | JOINTS)
    assert not packages_imported(path) & FOREIGN


MODEL_FILES = [path for path in sources("src/budgetvlm") if part(path) in MODEL_SIDE]


@pytest.mark.parametrize("path", MODEL_FILES, ids=ids(MODEL_FILES))
def test_the_model_side_knows_nothing_of_learning(path):
    assert parts_imported(path) <= BASE | MODEL_SIDE


def test_the_base_imports_only_the_base():
    for name in BASE:
        assert parts_imported(PACKAGE / f"{name}.py") <= BASE, name


ALL_CODE = sources("src", "experiments", "scripts", "benchmarks", "tests")


@pytest.mark.parametrize("path", ALL_CODE, ids=ids(ALL_CODE))
def test_nothing_is_loaded_by_pickle(path):
    assert not packages_imported(path) & PICKLES
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
        ("src", ("compare", "data", "explain", "lmms", "report", "vw")),
        ("experiments", ()),
        ("tests", ("dev", "compare", "data", "explain", "report")),
    ],
)
def test_every_package_that_is_imported_is_declared(folder, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [line for name in extra for line in project["optional-dependencies"][name]]
    names = {"pillow": "PIL", "scikit-learn": "sklearn"}  # what is imported under another name
    found = (re.split(r"[^\w-]", line)[0] for line in wanted)
    declared = {names.get(name, name.replace("-", "_")) for name in found}
    own = {"budgetvlm", "experiments", "benchmarks"} | {
        path.stem for path in sources("tests", "experiments", "benchmarks")
    }
    own |= {path.name for path in (ROOT / "experiments").iterdir()}
    imported = {name for path in sources(folder) for name in packages_imported(path) if name}
    assert imported - own - set(sys.stdlib_module_names) <= declared

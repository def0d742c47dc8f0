"""The house stays easy to walk through: its limits (counted by `benchmarks/house.py`) and who may import whom."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import house

# Limits and arrows that the code does not keep yet. Nothing may be added; every entry goes as soon as it holds.
NOT_YET = {
    "lines of src/**/*.py",
}

BASE = {"errors", "knobs", "_compiled", "_extras", "_io", "_threads", "_version"}  # every room may import these
DATA = {"table", "features"}
LEARNING = DATA | {"guard", "policies", "controller", "evaluation"}

# Which room may import which others, besides BASE. A room is a folder or a module directly in the package.
ALLOWED: dict[str, set[str]] = {
    "table": set(),
    "features": {"table"},
    "vlm": set(),
    "engines": DATA | {"vlm"},
    "tasks": {"vlm"},
    "guard": DATA,
    "policies": DATA | {"guard"},
    "controller": DATA | {"guard", "policies"},
    "evaluation": DATA | {"guard", "policies"},
    "feedback": LEARNING,
    "adaptation": LEARNING,
    "comparison": LEARNING | {"cluster"},
    "explanation": LEARNING,
    "html_report": LEARNING | {"comparison"},
    "cluster": set(),
    "profiling": DATA | {"cluster", "guard", "tasks", "vlm", "engines"},
    "importing": DATA | {"profiling", "tasks"},
    "decide": {"guard", "controller"},
    "answer": {"decide", "controller", "guard", "vlm"},
    "runtime": {"answer", "controller", "decide", "guard", "vlm", "engines"},
    "live": LEARNING | {"adaptation", "answer", "decide", "runtime", "tasks", "vlm", "engines"},
    "serving": {"answer", "controller", "decide", "feedback", "guard", "runtime", "vlm", "engines"},
    "integrations": {"answer", "decide", "profiling", "runtime", "vlm"},
    "commands": LEARNING
    | {"decide"}
    | {
        "adaptation",
        "answer",
        "cluster",
        "comparison",
        "explanation",
        "feedback",
        "html_report",
        "importing",
        "integrations",
        "live",
        "profiling",
    }
    | {"serving"}
    | {"engines", "runtime", "tasks", "vlm"},
    "cli": {"commands"},
}

# The rooms that may import Transformers, directly or by importing the model under control.
MODEL_SIDE = {"vlm", "engines", "tasks", "profiling", "importing", "answer", "runtime", "live", "integrations"}
MODEL_SIDE |= {"serving", "commands", "cli"}
TRANSFORMERS = {"transformers", "tokenizers"}

MEASURES = {measure.name: measure for measure in house.measures()}
GRAPH = house.import_graph()
ROOMS = house.folder_graph(GRAPH, "budgetvlm")


def not_yet(name: str) -> None:
    if name in NOT_YET:
        pytest.skip(f"does not hold yet: {name}")


@pytest.mark.parametrize("name", MEASURES)
def test_the_limits_hold(name):
    not_yet(name)
    measure = MEASURES[name]
    assert measure.holds, f"{measure.value} > {measure.limit}: {measure.offenders}"


def test_every_room_stands_in_the_table_of_arrows():
    assert set(ROOMS) - BASE - {"__init__"} <= set(ALLOWED)


@pytest.mark.parametrize("room", sorted(set(ROOMS) - BASE - {"__init__"}))
def test_a_room_imports_only_what_its_arrows_allow(room):
    not_yet(f"arrows of {room}")
    assert ROOMS[room] - BASE <= ALLOWED[room]


def test_the_base_imports_only_the_base():
    assert {name: ROOMS[name] - BASE for name in BASE if ROOMS.get(name, set()) - BASE} == {}


def test_the_allowed_arrows_run_in_one_direction():
    assert house.circles(ALLOWED) == []


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("guard", {"controller", "policies", "decide"}),
        ("policies", {"controller"}),
        ("evaluation", {"vlm"}),
        ("controller", {"vlm", "tasks", "profiling"}),
    ],
)
def test_what_a_room_never_imports_is_not_allowed_either(room, never):
    """Also not on a detour: whatever the room may import, and what that may import, leaves these out."""
    reached, todo = set(), [room]
    while todo:
        new = ALLOWED.get(todo.pop(), set()) - reached
        reached |= new
        todo += new
    assert not reached & never


def test_the_controller_imports_of_the_guard_only_what_training_uses():
    not_yet("controller and the run-time guard")
    imported = {t for m, targets in GRAPH.items() if m.startswith("budgetvlm.controller.") for t in targets}
    for_tables = {"budgetvlm.guard.static", "budgetvlm.guard.input_bounds"}
    assert {name for name in imported if name.startswith("budgetvlm.guard.")} <= for_tables


LEARNING_FILES = [p for p in house.source_files() if house.module_name(p).split(".")[1] not in MODEL_SIDE]


@pytest.mark.parametrize("path", LEARNING_FILES, ids=[house.module_name(p) for p in LEARNING_FILES])
def test_learning_never_imports_transformers(path):
    assert not house.top_level_names(path) & TRANSFORMERS


def test_learning_never_imports_the_model_side():
    learning = set(ROOMS) - MODEL_SIDE - {"__init__"}
    assert {"table", "features", "controller", "guard", "policies", "evaluation", "decide"} <= learning
    assert {room: ROOMS[room] & MODEL_SIDE for room in learning if ROOMS[room] & MODEL_SIDE} == {}


# Words that only those who wrote this project would understand, where the field has plain ones.
DIALECT = re.compile(r"\b(so many|dear|dearer|dearest|a (setting|knob) each|look again|mood|rung)\b", re.IGNORECASE)


@pytest.mark.parametrize("folder", ["src", "docs", "experiments", "benchmarks"])
def test_prose_uses_plain_words(folder):
    not_yet(f"plain words in {folder}")
    paths = [path for ending in ("*.py", "*.md") for path in (house.ROOT / folder).rglob(ending)]
    lines = ((path, n, line) for path in paths for n, line in enumerate(path.read_text("utf-8").splitlines(), 1))
    assert [
        f"{path.relative_to(house.ROOT)}:{n} {line.strip()}" for path, n, line in lines if DIALECT.search(line)
    ] == []


# ---- the counting itself, on a package small enough to count by hand


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with one circle of files in a folder, one circle of rooms, and a file name that stands twice."""
    root = tmp_path / "toy"
    files = {
        "__init__.py": '"""Toy."""\n',
        "first.py": "def f(a, *b, c, **d):\n    from toy.room import one\n    return one\n\n\nclass Thing: ...\n",
        "room/__init__.py": '"""A room."""\n',
        "room/one.py": "from .two import g\n\n\nclass Thing: ...\n",
        "room/two.py": "if TYPE_CHECKING:\n    from toy.room.one import h\nimport toy.first\n",
        "other/__init__.py": '"""A purpose\nthat needs two lines."""\n',
        "other/one.py": "import toy.room.two as t, numpy.linalg\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_imports_are_seen_in_every_form(package):
    graph = house.import_graph(package)
    assert graph["toy.first"] == {"toy.room.one"}
    assert graph["toy.room.one"] == {"toy.room.two"}
    assert graph["toy.room.two"] == {"toy.room.one", "toy.first"}
    assert graph["toy.other.one"] == {"toy.room.two"}
    assert house.top_level_names(package / "other" / "one.py", package) == {"toy", "numpy"}


def test_circles_of_files_and_of_rooms_are_found(package):
    graph = house.import_graph(package)
    assert house.circles(graph) == [["toy.first", "toy.room.one", "toy.room.two"]]
    assert house.package_circles(graph, package) == [["toy.first", "toy.room"]]
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_lengths_parameters_names_and_purposes_are_counted(package):
    (function,) = house.functions(package)
    assert (function.lines, function.parameters) == (3, 4)
    assert house.quantile([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.5) == 5
    assert house.quantile([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.9) == 9
    assert house.repeated_files(package) == ["one: other/one.py, room/one.py"]
    assert house.repeated(house.public_classes(package)) == ["Thing: first.py:6, room/one.py:4"]
    assert house.folders_without_purpose(package) == ["other"]


def test_a_broken_limit_is_named_and_ends_with_exit_code_1(monkeypatch, capsys):
    broken = house.Measure("circles of files", 1, 0, ["a <> b"])
    monkeypatch.setattr(house, "measures", lambda: [broken])
    assert house.main([]) == 1
    assert "MISS circles of files" in (printed := capsys.readouterr().out) and "a <> b" in printed
    assert house.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["measures"][0]["offenders"] == ["a <> b"]

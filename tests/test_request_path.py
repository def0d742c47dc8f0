"""The way of a request through files: how it is counted, on a package that is made up, and how long it is."""

import importlib

from benchmarks import request_path
from benchmarks.request_path import changes_of_file


def test_calls_and_returns_between_files_count_also_through_other_code(tmp_path, monkeypatch):
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "door.py").write_text(
        "from made_up import shelf\n\ndef ask():\n    return own() + shelf.take([2, 1])\n\n"
    )
    with (package / "door.py").open("a") as file:
        file.write("def own():\n    return 1\n")
    (package / "shelf.py").write_text("from made_up.scale import weigh\n\ndef take(x):\n    return min(x, key=weigh)\n")
    (package / "scale.py").write_text("def weigh(x):\n    return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    door = importlib.import_module("made_up.door")
    way = changes_of_file(door.ask, package)
    assert way == ["door.py", "shelf.py", "scale.py", "shelf.py", "scale.py", "shelf.py", "door.py"]
    assert changes_of_file(lambda: sorted([2, 1]), package) == []


def test_a_request_passes_few_files():
    way = request_path.usual_way()
    assert len(set(way)) <= request_path.MOST_FILES and len(way) - 1 <= request_path.MOST_CHANGES

"""The public face: exactly these names, importable from `budgetvlm`, and nothing heavy before one of them is used."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import budgetvlm

PACKAGE = Path(budgetvlm.__file__).parent
FUNCTIONS = ("train", "evaluate", "calibrate", "compare", "load_vlm", "load_task", "load_controller")
FACE = {
    "__version__", "AdaptiveVLM", "Answer", "KnobSpace", "Setting", "ProfileTable", "Features",
    "VLM", "load_vlm", "Sample", "Task", "TaskOptions", "load_task",
    "GRPOController", "load_controller", "ControllerPolicy", "GRPOConfig", "RewardWeights", "TrainingConfig",
    "TrainingResult", "train", "EvaluationOptions", "EvaluationReport", "evaluate",
    "Router", "CompareOptions", "CompareReport", "compare", "calibrate",
    "BudgetVLMError", "CheckpointError", "ConfigError", "DataError", "InputError", "KnobSpaceError",
    "MissingExtraError", "OutputError",
}  # fmt: skip
HEAVY = ("torch", "numpy", "transformers", "numba", "scipy", "PIL", "pyarrow")


def stub_names() -> dict[str, str]:
    """What `__init__.pyi` says: name -> module."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "a stub exports only what it imports `as` itself"
            found[alias.name] = str(node.module)
    return found


def test_the_face_is_exactly_this():
    assert len(budgetvlm.__all__) == len(set(budgetvlm.__all__))
    assert set(budgetvlm.__all__) == FACE == set(stub_names())
    assert set(dir(budgetvlm)) == FACE


@pytest.mark.parametrize("name", sorted(FACE - {"__version__"}))
def test_a_name_is_what_the_stub_says(name):
    home = importlib.import_module(stub_names()[name])
    assert getattr(budgetvlm, name) is getattr(home, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'AdaptivVLM'"):
        _ = budgetvlm.AdaptivVLM


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, budgetvlm; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_functions_stay_functions_after_every_module_is_imported():
    code = (
        "import importlib, pkgutil, budgetvlm\n"
        "for found in pkgutil.walk_packages(budgetvlm.__path__, 'budgetvlm.'):\n"
        "    if not any(name in found.name for name in ('integrations', 'on_ray')):\n"
        "        importlib.import_module(found.name)\n"
        f"from budgetvlm import {', '.join(FUNCTIONS)}\n"
        f"print([callable(f) for f in ({', '.join(FUNCTIONS)})])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == str([True] * len(FUNCTIONS))


def test_no_module_has_the_name_of_a_public_object():
    modules = {found.name for found in pkgutil.iter_modules(budgetvlm.__path__)}
    assert not modules & FACE


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("budgetvlm.runtime", "AdaptiveVLM"),
        ("budgetvlm.table", "ProfileTable"),
        ("budgetvlm.features", "Features"),
        ("budgetvlm.knobs", "KnobSpace"),
        ("budgetvlm.vlm", "load_vlm"),
        ("budgetvlm.vlm.images", "open_image"),
        ("budgetvlm.tasks.options", "TaskOptions"),
        ("budgetvlm.tasks.options", "load_task"),
        ("budgetvlm.tasks.metrics", "exact_match"),
    ],
)
def test_paths_that_scripts_of_users_import_stay(module, name):
    assert hasattr(importlib.import_module(module), name)

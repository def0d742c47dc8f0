"""BudgetVLM: make a vision-language model answer within a latency budget, as accurately as possible.

The names in `__all__` are the public face, and the command line and the files that it writes belong to it as well.
Every other module and name is private: it may change or go in any version.

    from budgetvlm import AdaptiveVLM

    vlm = AdaptiveVLM.from_pretrained("reference")
    answer = vlm.generate("photo.png", "read the sign in red", budget_ms=60)

A name is imported from its module when it is first used, so that `import budgetvlm` costs nothing. Type checkers read
`__init__.pyi`.
"""

from importlib import import_module as _import_module

from budgetvlm._version import __version__

_HOMES = {
    "runtime": ("AdaptiveVLM",),
    "answer": ("Answer",),
    "knobs": ("KnobSpace", "Setting"),
    "table": ("ProfileTable",),
    "features": ("Features",),
    "vlm": ("VLM", "load_vlm"),
    "tasks": ("Sample", "Task", "TaskOptions", "load_task"),
    "controller.network": ("GRPOController",),
    "controller.checkpoint": ("load_controller",),
    "controller.policy": ("ControllerPolicy",),
    "controller.training_options": ("GRPOConfig", "RewardWeights", "TrainingConfig"),
    "controller.training": ("TrainingResult",),
    "evaluation.evaluation_options": ("EvaluationOptions",),
    "evaluation.records": ("EvaluationReport",),
    "evaluation.evaluator": ("evaluate",),
    "comparison.compare_options": ("CompareOptions",),
    "comparison.comparison_records": ("CompareReport",),
    "comparison.runner": ("compare",),
    "live.calibrate_here": ("calibrate",),
    "live.guarded_training": ("train",),
    "serving.embedded": ("Router",),
    "errors": (
        "BudgetVLMError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "InputError",
        "KnobSpaceError",
        "MissingExtraError",
        "OutputError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'budgetvlm' has no attribute {name!r}")
    found = globals()[name] = getattr(_import_module(f"budgetvlm.{_HOME_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)

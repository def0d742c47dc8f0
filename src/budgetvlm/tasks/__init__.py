"""Tasks: samples and scores."""

from budgetvlm.errors import ConfigError
from budgetvlm.tasks.protocol import SPLITS, Sample, Task

__all__ = ["SPLITS", "Sample", "Task", "load_task"]


def load_task(name: str) -> Task:
    """Open a task by name.

    Raises:
        ConfigError: there is no such task.
    """
    if name == "signs":
        from budgetvlm.tasks.signs import SignsTask

        return SignsTask()
    raise ConfigError(f"there is no task {name!r}; this version has: signs")

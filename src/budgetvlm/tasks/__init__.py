"""Tasks: samples and scores."""

from budgetvlm.tasks.options import TaskOptions, load_task
from budgetvlm.tasks.protocol import SPLITS, Sample, Task

__all__ = ["SPLITS", "Sample", "Task", "TaskOptions", "load_task"]

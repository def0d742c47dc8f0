"""Tasks: samples and scores."""

from budgetvlm.tasks.task import SPLITS, Sample, Task
from budgetvlm.tasks.task_options import TaskOptions, load_task

__all__ = ["SPLITS", "Sample", "Task", "TaskOptions", "load_task"]

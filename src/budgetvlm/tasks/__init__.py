"""Tasks: samples and scores."""

from budgetvlm.tasks.task import SPLITS, Sample, SplitSample, Task
from budgetvlm.tasks.task_options import TaskOptions, load_task

__all__ = ["SPLITS", "Sample", "SplitSample", "Task", "TaskOptions", "load_task"]

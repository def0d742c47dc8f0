"""Tasks: samples and scores."""

from budgetvlm.tasks.options import TaskOptions, load_task
from budgetvlm.tasks.task import SPLITS, Sample, SplitSample, Task

__all__ = ["SPLITS", "Sample", "SplitSample", "Task", "TaskOptions", "load_task"]

"""The flags that say which data set a command works on, and the task that they open: the same for all commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budgetvlm.tasks import Task, TaskOptions

OPTIONS = ("data_files", "columns", "metric", "prompt", "repository")


def add_task_arguments(parser: Any, *, answers: bool = True, scores: bool = True) -> None:
    """Add the flags to a parser or a group of one.

    Args:
        answers: whether the command has the model answer, so that the length of answers matters.
        scores: whether it needs the data set's scores; a command that brings its own may do without a data set.
    """
    add = parser.add_argument
    default = "signs" if scores else None
    named = f"data set, or several: text_vqa,pope (default: {default or 'none'})"
    add("--dataset_name", default=default, metavar="NAME", help=named)
    add("--data_files", metavar="FILES", help="local files of it: a file, several, a folder, or train=FILE,test=FILE")
    add("--columns", metavar="ROLE=COLUMN,...", help="columns called otherwise: question=query,answers=label")
    if scores:
        add("--metric", metavar="NAME", help="score of an answer (default: the data set's, or exact_match)")
    add("--prompt", metavar="TEXT", help="how to ask, with {question} and {options} (default: the data set's)")
    add("--repository", metavar="ID", help="on the hub, in place of the data set's")
    if answers:
        add("--max_new_tokens", type=int, metavar="N", help="longest answer (default: what the data set asks for)")


def task_options(args: argparse.Namespace) -> TaskOptions:
    """What the flags say."""
    from budgetvlm.tasks import TaskOptions

    return TaskOptions(args.dataset_name, **{name: getattr(args, name) for name in OPTIONS})


def open_task(args: argparse.Namespace) -> Task:
    """The task that the flags mean, with answers as long as they say.

    Raises:
        ConfigError, DataError: flags that cannot work, or data that cannot be read.
    """
    from budgetvlm.errors import ConfigError
    from budgetvlm.tasks import load_task

    task = load_task(task_options(args))
    if args.max_new_tokens is not None:
        if args.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={args.max_new_tokens} has to be 1 at least")
        task.max_new_tokens = args.max_new_tokens
    return task

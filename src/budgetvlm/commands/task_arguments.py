"""The flags that say which data set a command works on, and the task that they open: the same for all commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.flags import OptionFlags
from budgetvlm.errors import ConfigError
from budgetvlm.tasks.options import TaskOptions

if TYPE_CHECKING:
    from budgetvlm.tasks import Task

NAMED = OptionFlags(TaskOptions, "dataset_name")
READ = OptionFlags(TaskOptions, "data_files", "columns", "prompt", "repository")
SCORED = OptionFlags(TaskOptions, "metric")


def add_task_arguments(parser: Any, *, answers: bool = True, scores: bool = True) -> None:
    """Add the flags to a parser or a group of one.

    Args:
        answers: whether the command has the model answer, so that the length of answers matters.
        scores: whether it needs the data set's scores; a command that brings its own may do without a data set.
    """
    if scores:
        NAMED.add(parser)
        SCORED.add(parser)
    else:
        parser.add_argument("--dataset_name", metavar="NAME", help="data set, or several with commas (default: none)")
    READ.add(parser)
    if answers:
        parser.add_argument(
            "--max_new_tokens", type=int, metavar="N", help="longest answer (default: what the data set asks for)"
        )


def task_options(args: argparse.Namespace) -> TaskOptions:
    """Read the flags."""
    return TaskOptions(**NAMED.read(args), **READ.read(args), **SCORED.read(args))


def each_data_set(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Yield the flags once for each data set that they name, as if it were the only one."""
    options = task_options(args)
    for name in options.names:
        own = options.only(name)
        yield argparse.Namespace(**vars(args) | {field.name: getattr(own, field.name) for field in fields(own)})


def open_task(args: argparse.Namespace) -> Task:
    """Open the task that the flags mean, with answers as long as they say. Raises ConfigError, DataError."""
    from budgetvlm.tasks import load_task

    task = load_task(task_options(args))
    if args.max_new_tokens is not None:
        if args.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={args.max_new_tokens} has to be 1 at least")
        task.max_new_tokens = args.max_new_tokens
    return task

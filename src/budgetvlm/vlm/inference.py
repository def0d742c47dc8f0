"""PyTorch's inference mode, entered once a request: between two runs of the model each time takes 30 microseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def inference(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.inference_mode` for a function, entered unless its caller has done so."""
    entering: Callable[P, R] = torch.inference_mode()(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (function if torch.is_inference_mode_enabled() else entering)(*args, **kwargs)

    return run

"""The machine code of `budgetvlm.guard.kernels`: compiled once on each machine, in a process of its own.

Compiling takes a quarter of a minute and holds Python's lock; requests that are answered meanwhile would be late. So a
process of its own does it, at low priority, and this one loads what that has kept, in less than a second.

    python -m budgetvlm.guard.machine_code      compiles and keeps it
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np

from budgetvlm._compiled import compile_module, is_kept, mark_kept
from budgetvlm.errors import OutputError
from budgetvlm.guard import kernels
from budgetvlm.guard.bounds import GuardState, Request, Spent


def load_kernels() -> SimpleNamespace:
    """The compiled functions of `budgetvlm.guard.kernels`.

    Raises:
        OutputError: they could not be compiled, or not be kept.
    """
    if not is_kept(kernels):
        command = [sys.executable, "-m", "budgetvlm.guard.machine_code"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise OutputError(f"the loops of a request could not be compiled: {last}. Requests are decided in NumPy.")
    return compiled_kernels()


def compiled_kernels() -> SimpleNamespace:
    """The functions, called once with small arguments of the types of every later call."""
    loops = compile_module(kernels)
    state, request, weights = example_state(), example_request(), example_weights()
    known, spent, features = np.ones(1, dtype=bool), tuple(Spent(1.0, 1.0)), (np.zeros(1, np.float32),) * 2
    _, _, forecast, values, _ = loops.choose(state, request, (0, 0), known, 1.0, spent, weights, *features)
    loops.choose_again(state, tuple(forecast), 0, known, spent, values, 1.0)
    return loops


def example_state() -> tuple[object, ...]:
    """A state of one stage, one setting and one answer length."""
    one, integer = np.ones(1), np.zeros(1, dtype=np.int64)
    steps = range(kernels.budget_step(0.0), kernels.budget_step(np.inf) + 1)
    groups = np.zeros((2, 1 + len(steps) + 1), dtype=np.int64)
    return tuple(
        GuardState(
            size_weights=np.ones((7, 1, 1)), image_stages=one, length_weights=np.ones((1, 1)), length_bias=one,
            lengths=one, scale=one, pace=np.array([0.0, 1.0]), sorted_scores=np.zeros((2, 1)),
            score_counts=np.zeros(2, dtype=np.int64), group_offsets=np.zeros(1), group_table=groups,
            fastest_settings=integer, same_image=integer[None], account=np.zeros(2), level=0.05, highest_level=0.4,
            alpha=0.05, prepare_stage=-1, revises=True, expected_only=False,
        )
    )  # fmt: skip


def example_request() -> tuple[object, ...]:
    """A request of one visual token; what a request has of images must not be written to."""
    vision = np.ones(1)
    vision.flags.writeable = False
    return tuple(Request(vision, 1.0, np.zeros(1, np.float32)))


def example_weights() -> tuple[object, ...]:
    """The weights of a network of one hidden number, in the order of `controller.value_network.NetworkWeights`."""
    vector, matrix = np.ones(1, np.float32), np.ones((1, 1), np.float32)
    statistics, first = np.ones(2, np.float32), np.ones((3, 1), np.float32)
    hidden, embedding = np.ones((1, 1, 1, 1), np.float32), np.ones((4, 1), np.float32)
    layers = statistics, statistics, vector, embedding, first, vector, hidden, matrix, matrix, vector
    return (*layers, 1.0, np.inf, 4.0, np.float32(8.0), -4.0)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)
    compiled_kernels()
    mark_kept(kernels)

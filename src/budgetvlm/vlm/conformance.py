"""Checks that a model's knobs do what they say: for users on their own model, and for the tests of every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from budgetvlm.errors import BudgetVLMError
from budgetvlm.knobs import Setting
from budgetvlm.vlm.conformance_checks import CHECKS
from budgetvlm.vlm.probe import Broken, Probe


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        passed: whether it holds; None: it does not apply to this model.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str


@torch.inference_mode()
def check(probe: Probe, say: Callable[[str], None] = lambda name: None) -> list[Check]:
    """Run all checks; one that fails does not stop the others.

    Args:
        say: told the name of each check before it runs.
    """
    done = []
    for name, (knob, run) in CHECKS.items():
        if knob and (knob not in probe.space.names or len(probe.space.values(knob)) < 2):
            done.append(Check(name, None, f"the model has no knob {knob}"))
            continue
        say(name)
        done.append(_one(name, run, probe))
    return done


def _one(name: str, run: Callable[[Probe], str], probe: Probe) -> Check:
    try:
        return Check(name, True, run(probe))
    except (Broken, BudgetVLMError) as error:
        return Check(name, False, str(error))
    except Exception as error:  # whatever the model's own code raises is a finding, not an end
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return Check(name, False, f"{type(error).__name__}: {first}")


def time_settings(probe: Probe, *, repeats: int = 3, max_new_tokens: int = 4) -> dict[Setting, dict[str, float]]:
    """Time requests at each setting; return the stages of the fastest one, and "total", in ms."""
    times = {}
    for setting in probe.settings:
        probe.vlm.generate(probe.images[0], probe.questions[0], setting, max_new_tokens=max_new_tokens)
        runs = [
            probe.vlm.generate(probe.images[0], probe.questions[0], setting, max_new_tokens=max_new_tokens)
            for _ in range(repeats)
        ]
        best = min(runs, key=lambda run: run.total_ms)
        times[setting] = {**best.stages_ms, "total": best.total_ms}
    return times

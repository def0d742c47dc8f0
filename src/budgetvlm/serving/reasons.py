"""Why a request got its setting, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from budgetvlm._io import time_text
from budgetvlm.serving.jobs import Job

_NOTED = 0.05  # share of the budget, from which waiting is worth a word


def why(answer: dict[str, Any], job: Job, waited_ms: float) -> str:
    """Say what decided, from the fields of an answer.

    Args:
        answer: of `budgetvlm.answer.Answer.to_dict`.
        waited_ms: until its work began.
    """
    return "; ".join(_reasons(answer, job, waited_ms)) + "."


def _reasons(answer: dict[str, Any], job: Job, waited_ms: float) -> Iterator[str]:
    budget_ms, hurried = answer["budget_ms"], answer["num_hurried_tokens"]
    if budget_ms is None:
        chosen = "the best of all settings, as there was no budget"
    else:
        begun = (
            f", of which {time_text(waited_ms)} were over when work on it began"
            if waited_ms >= _NOTED * budget_ms
            else ""
        )
        limit = f"{time_text(budget_ms)}{begun}"
        if answer["feasible"]:
            chosen = f"the best of the settings that were sure to keep {limit}"
        else:
            best = {"best_effort": "the best of those expected to, if any"}.get(job.when_infeasible, "the fastest")
            chosen = f"no setting was sure to keep {limit}, so it got {best}"
    price = f", with the time of the full setting priced at {job.price:.3g} right answers" if job.price else ""
    yield "The setting that the request named" if job.setting is not None else chosen[0].upper() + chosen[1:] + price
    if hurried:
        yield f"{hurried} of {answer['num_output_tokens']} tokens were hurried to be in time"
    if answer["finish_reason"] == "budget":
        yield "it was cut where the budget ended"

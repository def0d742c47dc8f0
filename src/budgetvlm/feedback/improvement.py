"""One look at a log: judge the candidate on trial, or train one. `budgetvlm update` is this, and so is a simulation."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from budgetvlm.controller.network import GRPOController
from budgetvlm.features import Features
from budgetvlm.feedback.candidate import train_candidate
from budgetvlm.feedback.judge import LEAST_GAIN, Verdict, judge
from budgetvlm.feedback.outcome_model import OutcomeModel
from budgetvlm.feedback.served_log import ServedLog
from budgetvlm.table import ProfileTable

LEAST_SCORES = 20  # fewer train no candidate
WORTH_TRYING = 0.01  # as expected, of a new candidate
CLEARLY_BETTER = 0.02  # as expected: by this much a new candidate takes the place of one that is not tested yet
AT_ONCE = 30  # scored requests that are foreseen by what was known before the first of them


class OnTrial(NamedTuple):
    """A candidate on trial: its number, counted from 1 over those that were ever tested, and since when."""

    candidate: GRPOController
    number: int
    since_s: float


class Look(NamedTuple):
    """What a look at a log found.

    Attributes:
        verdict: on the candidate on trial; None: there was none.
        fresh: a new candidate, to be put on trial in the place of any other.
        expected: gain of it, or of the candidate on trial, over who would serve else.
        why: one sentence about the new candidate, or why there is none.
    """

    verdict: Verdict | None
    fresh: GRPOController | None
    expected: float
    why: str


def look(
    log: ServedLog, present: GRPOController, trial: OnTrial | None = None,
    profile: tuple[ProfileTable, Features] | None = None, seed: int = 0,
) -> Look:  # fmt: skip
    """Judge the candidate on trial; where none is, or it is not tested yet, train another one, if there is a reason."""
    count = int(log.is_scored.sum())
    if count < LEAST_SCORES:
        return Look(None, None, 0.0, f"{count} scores are too few to learn from; at least {LEAST_SCORES} are needed")
    model, verdict = OutcomeModel.fit(log, present), None
    if trial is not None:
        verdict = _judged(log, present, trial, model)
        if verdict.decision == "promote" or (verdict.decision == "wait" and verdict.tested):
            return Look(verdict, None, verdict.gain, "no other candidate is trained meanwhile")
    if not model.learnt:
        why = f"{count} scores are what the controller expects of its choices: there is nothing to learn"
        return Look(verdict, None, 0.0, why)
    waits = trial is not None and verdict is not None and verdict.decision == "wait"
    fresh = train_candidate(present, log, model, profile, seed)
    expected = expected_gain(log, model, fresh, trial.candidate if trial and waits else present)
    if expected < (CLEARLY_BETTER if waits else WORTH_TRYING):
        why = f"what {count} scores teach changes too little ({100 * expected:+.1f} points expected)"
        return Look(verdict, None, expected, why)
    return Look(verdict, fresh, expected, f"a new candidate is expected to gain {100 * expected:+.1f} points")


def _judged(log: ServedLog, present: GRPOController, trial: OnTrial, model: OutcomeModel) -> Verdict:
    """The verdict on a candidate; it is refused without proof where all scores together expect it to be no better."""
    scored = log.scored
    on_trial = scored.rows(scored.at_s > trial.since_s)
    earlier = len(scored) - len(on_trial)
    starts = range(0, len(on_trial), AT_ONCE)
    foreseen = [
        OutcomeModel.fit(scored.rows(np.arange(earlier + start)), present).predict(
            on_trial.rows(np.arange(start, min(start + AT_ONCE, len(on_trial))))
        )
        for start in starts
    ]
    predicted = np.concatenate([np.empty((0, present.num_settings)), *foreseen])
    verdict = judge(on_trial, trial.candidate, present, predicted, trial.number)
    expected = expected_gain(log, model, trial.candidate, present)
    if verdict.decision == "wait" and verdict.scores and expected < LEAST_GAIN:
        why = f"by all scores it is expected to gain {100 * expected:+.1f} points"
        return replace(verdict, decision="refuse", why=why)
    return verdict


def expected_gain(log: ServedLog, model: OutcomeModel, one: GRPOController, other: GRPOController) -> float:
    """How much more one controller's choices are expected to score than another's, in the newest half of a log."""
    recent = log.rows(np.arange(len(log) // 2, len(log)))
    difference = recent.choices_by(one) - recent.choices_by(other)
    return float((model.predict(recent) * difference).sum(axis=1).mean())

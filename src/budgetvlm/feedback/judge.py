"""Whether a candidate is better than the present controller, by scores of requests served while it was on trial.

While a candidate is on trial a share of the requests is answered at its choice, so that both controllers' choices are
made with known probabilities. The gain's bounds are by betting, so that looking often does not spoil them; a further
candidate has to be surer, so that all of them together are wrong with a probability of `ALPHA` at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from budgetvlm.controller.network import GRPOController
from budgetvlm.feedback.confidence_bounds import lower_bound
from budgetvlm.feedback.off_policy import gain, unsupported
from budgetvlm.feedback.served_log import ServedLog

Decided = Literal["promote", "refuse", "wait"]
ALPHA = 0.05  # that any candidate is promoted which is no better, over a server's life
STAKES = 0.1, 0.9  # of the bets: a hundred scores prove a gain of 0.3 with large ones alone
FEWEST = 75  # scores of a trial below which nobody is promoted
LEAST_GAIN = 0.003  # what is worth a change
MOST_UNTRIED = 0.05  # of its choices, about which nothing can be known
MOST_SCORES = 2000  # after which a candidate that is not proven is refused


@dataclass(frozen=True)
class Verdict:
    """What a trial says of a candidate.

    Attributes:
        decision: "promote", "refuse", or "wait" for more scores. why: one sentence.
        scores: that it rests on. differ: share of these requests in which both choose another setting.
        gain, low, high: in score, and its bounds.
        alpha: probability with which each bound may be wrong.
    """

    decision: Decided
    why: str
    scores: int
    differ: float
    gain: float
    low: float
    high: float
    alpha: float

    @property
    def tested(self) -> bool:
        """Whether there were scores enough to promote it."""
        return self.scores >= FEWEST


def judge(
    log: ServedLog, candidate: GRPOController, present: GRPOController, predicted: np.ndarray, number: int = 1
) -> Verdict:
    """Judge a candidate by scored requests of its trial alone: none that it was trained on.

    Args:
        predicted: the baseline, expected scores ``[N, K]``; each by what was known before that request.
        number: of this candidate, counted from 1 over those that were ever tested.
    """
    alpha = ALPHA * 6 / (math.pi * number) ** 2
    if not len(log):
        return Verdict("wait", "no request of its trial has a score yet", 0, 0.0, 0.0, -1.0, 1.0, alpha)
    known, new, old = log.as_scored_log, log.choices_by(candidate), log.choices_by(present)
    outcomes, least = gain(known, new, old, predicted)
    losses, least_loss = gain(known, old, new, predicted)
    low = lower_bound(outcomes, least, alpha, stakes=STAKES)
    high = -lower_bound(losses, least_loss, alpha, stakes=STAKES)
    decision, why = _decision(low, high, len(log), unsupported(known, new))
    differ = float((new != old).any(axis=1).mean())
    return Verdict(decision, why, len(log), differ, float(outcomes.mean()), low, high, alpha)


def _decision(low: float, high: float, scores: int, untried: float) -> tuple[Decided, str]:
    if scores < FEWEST:
        return "wait", f"{scores} scores are too few to tell; at least {FEWEST} are needed"
    if low > 0:
        return "promote", f"it is better: its gain is at least {100 * low:.1f} points"
    if high < LEAST_GAIN:
        return "refuse", f"it cannot be better by {100 * LEAST_GAIN:.1f} points: its gain is at most {100 * high:+.1f}"
    if untried > MOST_UNTRIED:
        return "wait", f"its choice was not tried in {untried:.0%} of the requests; serve with --trial, so that it is"
    if scores >= MOST_SCORES:
        return "refuse", f"{scores} scores do not prove it better"
    return "wait", f"its gain may be {100 * low:+.1f} to {100 * high:+.1f} points; more scores will tell"

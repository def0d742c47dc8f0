"""Shadow answers: a share of the requests is answered again at other settings, while nobody waits for anything.

What the full setting answers is taken for right. The answer that was given is scored by it, and so is one at a setting
drawn evenly from those that the budget allowed.
"""

from __future__ import annotations

import json
import random
import string
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from budgetvlm.feedback.request_store import RequestStore
from budgetvlm.knobs import KnobSpace
from budgetvlm.serving.jobs import NO_BUDGET_MS, Event, Job

SHADOW = "shadow"  # kind of a job
MOST_WAITING = 4
MOST_PIXELS = 4_000_000  # of the images of one that waits
IDLE_S = 0.1  # without a request, before one begins
_AWAY = str.maketrans("", "", string.punctuation)


class _Served(NamedTuple):
    """A request to answer again, the answer it got, and what its decision saw."""

    job: Job
    answer: str
    seen: dict[str, Any]


class Shadows:
    """The shadow answers of a server.

    Args:
        share: of the requests.
    """

    def __init__(self, share: float, store: RequestStore) -> None:
        self._share, self._store = share, store
        self._waiting: deque[_Served] = deque(maxlen=MOST_WAITING)  # newer ones take the place of older ones

    def offer(self, job: Job, data: dict[str, Any]) -> None:
        """Maybe answer a request again later."""
        pixels = sum(image.width * image.height for image in job.images)
        if random.random() < self._share and pixels <= MOST_PIXELS and "seen" in data:
            self._waiting.append(_Served(job, data["answer"]["answer"], data["seen"]))

    @property
    def any_waits(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting)

    async def answer_one(self, ask: Callable[[Job], AsyncIterator[Event]], idle: Callable[[], bool]) -> None:
        """Answer one request again and keep the scores; given up as soon as the server is not idle any more."""
        served = self._waiting.popleft()
        space = KnobSpace(json.loads(served.seen["knobs"]))
        bits = np.unpackbits(np.array(served.seen["allowed"], dtype=np.uint8), count=len(space))
        drawn = random.choice(np.flatnonzero(bits).tolist() or [served.seen["chosen"]])
        texts = {}
        for number in dict.fromkeys((len(space) - 1, drawn)):
            text = await _text(ask, _job_at(served.job, dict(space.settings[number]))) if idle() else None
            if text is None:
                return
            texts[number] = text
        right = texts[len(space) - 1]
        for source, number, text in (
            ("agreement", served.seen["chosen"], served.answer),
            ("drawn", drawn, texts[drawn]),
        ):
            self._store.shadow(served.job.id, source, number, agreement(text, right))


def agreement(text: str, right: str) -> float:
    """Whether two answers are the same but for case, punctuation and space: 1 or 0."""
    one, other = (" ".join(found.lower().translate(_AWAY).split()) for found in (text, right))
    return float(one == other)


def _job_at(job: Job, setting: dict[str, Any]) -> Job:
    name = f"{SHADOW}-{job.id}-{'-'.join(map(str, setting.values()))}"
    return replace(job, id=name, kind=SHADOW, setting=setting, budget_ms=NO_BUDGET_MS, streams=False, left=False)


async def _text(ask: Callable[[Job], AsyncIterator[Event]], job: Job) -> str | None:
    """The text of an answer; None: there is none."""
    text = None
    async for event in ask(job):
        if event.kind == "answer" and event.data["answer"]["finish_reason"] != "stopped":
            text = event.data["answer"]["answer"]
    return text

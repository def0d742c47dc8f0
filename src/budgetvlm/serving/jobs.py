"""A request as the server passes it on: what is asked, how long it may take, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

NO_BUDGET_MS = math.inf
LEAST_MS = 1e-3  # of a budget that a replica is told


@dataclass
class Job:
    """One request that a replica is to answer.

    Attributes:
        id: of the request, as the client sees it.
        messages: role and content of each; an image part holds its number in ``images``.
        images: decoded, RGB.
        arrived_s: on the clock of `time.perf_counter`, which all processes of a machine share.
        budget_ms: a ceiling from the arrival to the last token; `math.inf`: none.
        price: accuracy given for one latency of the full setting; None: whatever the server pays now.
        reserved_ms: of the budget, for what comes after the replica's work.
        setting: values of knobs that the answer is made at; None: the controller chooses.
        streams: each piece of text is told as it comes.
        stop: texts before which an answer ends.
        left: nobody waits for it any more.
        outcome, answer: what its client was told at the end of budget, times and setting, and the text.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    arrived_s: float
    budget_ms: float = NO_BUDGET_MS
    price: float | None = None
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()
    when_infeasible: str = "fastest"
    cut: str = "always"
    setting: dict[str, Any] | None = None
    kind: str = "answer"
    streams: bool = False
    reserved_ms: float = 0.0
    left: bool = False
    outcome: dict[str, Any] | None = None
    answer: str | None = None

    @property
    def deadline_s(self) -> float:
        """When its last token has to be there."""
        return self.arrived_s + self.budget_ms / 1e3

    @property
    def given_budget_ms(self) -> float | None:
        """The budget as clients give and read it: None is none."""
        return None if math.isinf(self.budget_ms) else self.budget_ms

    def header(self) -> dict[str, Any]:
        """What a replica is told, beside the pixels."""
        return {
            "kind": self.kind, "id": self.id, "messages": self.messages,
            "sizes": [image.size for image in self.images], "arrived_s": self.arrived_s,
            "budget_ms": None if math.isinf(self.budget_ms) else max(self.budget_ms - self.reserved_ms, LEAST_MS),
            "price": self.price,
            "max_new_tokens": self.max_new_tokens, "stop": self.stop, "when_infeasible": self.when_infeasible,
            "cut": self.cut, "setting": self.setting, "streams": self.streams,
        }  # fmt: skip


@dataclass
class Visit:
    """What the log is to know of a request; it lies as "visit" in the request's scope.

    Attributes:
        job: what is asked, as soon as that is understood. error: code of the error that it ended with.
    """

    job: Job | None = None
    error: str | None = None


@dataclass(frozen=True)
class Event:
    """Something that a job's client is told: a piece of text, the answer, or an error.

    Attributes:
        kind: "text", "answer", "error" or the kind of another result.
        data: the piece; the answer's fields; the error's message and type.
    """

    kind: str
    data: dict[str, Any]

    @property
    def is_last(self) -> bool:
        """Nothing comes after it."""
        return self.kind != "text"


def question_of(messages: list[dict[str, Any]]) -> str:
    """The last message's text, or its first one beside images."""
    last = messages[-1]["content"]
    return last if isinstance(last, str) else next((one["text"] for one in last if one["type"] == "text"), "")


def setting_text(setting: dict[str, Any]) -> str:
    """A setting in one line: "max_crops=4,top_k=2"."""
    return ",".join(f"{name}={value}" for name, value in setting.items())

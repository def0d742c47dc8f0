"""What is known of a request, and what the guard says of it: plain records.

Shapes: G stages, K settings, L answer lengths, Dl language features, N scores. Times in ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

Moment = Literal["overview", "image"]
"""What is encoded when a setting is chosen, and when the choice is revised."""
MOMENTS: tuple[Moment, ...] = ("overview", "image")

# Rows of `Bounds.times`.
BOUND, AIMED, EXPECTED, REST, ANSWER, SAVING, STEP, READ = range(8)
NUM_ROWS = 8


class Request(NamedTuple):
    """What is known of a request before the model runs.

    Attributes:
        vision: visual tokens at each setting, float64 ``[K]``; not to be written to, requests of one size share it.
        language: the prompt's other tokens, a float.
        feature: feature of the question, float32 ``[Dl]``.
        images: how many there are: each takes what one takes whatever its size; without any, none of that is taken.
    """

    vision: np.ndarray
    language: float
    feature: np.ndarray
    images: float = 1.0


class Spent(NamedTuple):
    """What a request has taken when a setting is chosen, in ms.

    Attributes:
        total_ms: in all.
        image_ms: of it for the image; 0: nothing is encoded.
        prepared_ms: of that for preparing the overview, before it was encoded; 0: not known.
        waited_ms: of the total, before the request began.
    """

    total_ms: float = 0.0
    image_ms: float = 0.0
    prepared_ms: float = 0.0
    waited_ms: float = 0.0


class Outcome(NamedTuple):
    """How a request went.

    Attributes:
        stages_ms: what each stage took; those that the latency model does not know are not read.
        output_tokens: of the answer. total_ms: what the request took in all.
        late: it broke its budget. cut: its answer was cut short to be in time.
        promised: a setting was allowed, so that it counts.
        limited: it had a budget of its own.
        saved_ms: how much longer what was hurried of each stage would have taken at its own setting, as predicted.
        whole: neither its caller nor a stop string ended the answer; what a whole one would take is not known else.
        stopped: its caller ended it.
        among: how many requests were in flight when its setting was chosen, itself one of them.
    """

    stages_ms: Mapping[str, float]
    output_tokens: int
    total_ms: float
    late: bool
    cut: bool = False
    promised: bool = True
    saved_ms: Mapping[str, float] = MappingProxyType({})
    limited: bool = True
    whole: bool = True
    stopped: bool = False
    among: int = 1


class Forecast(NamedTuple):
    """What is expected of a request when its setting is chosen, and stays when the choice is revised.

    Attributes:
        slowdown: time of the full setting on this machine now / when it was profiled.
        expected_tokens, long_tokens: of an answer of the expected length, and of a long one.
        groups: numbers of the groups of requests that share parts of this one's margin.
        profiled_ms: of each stage by the profile, until the first token and for each further one, ``[2, G, K]``.
        terms: of the image, of the rest until the first token, and of each further token, at the speed of the last
            requests, ``[3, K]``.
        large: the image is so large that preparing it takes much longer than the profile knows.
    """

    slowdown: float
    expected_tokens: float
    long_tokens: float
    groups: tuple[int, int, int, int]
    profiled_ms: np.ndarray
    terms: np.ndarray
    large: bool


NO_FORECAST = Forecast(1.0, 1.0, 1.0, (0, 0, 0, 0), np.zeros((2, 0, 0)), np.zeros((3, 0)), False)


class Bounds(NamedTuple):
    """What the guard says of one request at one moment.

    Attributes:
        times: rows of numbers of every setting ``[8, K]``; each row has a property here. The first three are infinite
            where a setting may not be chosen.
        fastest: of the settings that may be chosen, the one whose rest is predicted to be the shortest.
        forecast: what the times were made from.
        spent: by then.
        moment: what was encoded.
    """

    times: np.ndarray
    fastest: int
    forecast: Forecast = NO_FORECAST
    spent: Spent = Spent()
    moment: Moment = "overview"

    @property
    def bounds_ms(self) -> np.ndarray:
        """Upper bound on each setting's time, or on that of the setting it falls back on if its image takes long."""
        return self.times[BOUND]

    @property
    def predicted_ms(self) -> np.ndarray:
        """Its time with an answer of the expected length."""
        return self.times[EXPECTED]

    @property
    def rest_ms(self) -> np.ndarray:
        """The predicted rest of its time with a long answer."""
        return self.times[REST]

    @property
    def answer_ms(self) -> np.ndarray:
        """Of that rest, what comes once the image is encoded."""
        return self.times[ANSWER]

    @property
    def saving_ms(self) -> np.ndarray:
        """What hurrying would save of that rest."""
        return self.times[SAVING]

    @property
    def step_ms(self) -> np.ndarray:
        """One decoding step."""
        return self.times[STEP]

    @property
    def read_ms(self) -> np.ndarray:
        """Reading the prompt."""
        return self.times[READ]

    @property
    def longer_ms(self) -> np.ndarray:
        """What a long answer takes beyond one of the expected length."""
        out: np.ndarray = (self.forecast.long_tokens - self.forecast.expected_tokens) * self.step_ms
        return out

    @property
    def slowdown(self) -> float:
        """See `Forecast`."""
        return self.forecast.slowdown

    def allowed(self, budget_ms: float) -> np.ndarray:
        """Which settings a budget allows, bool ``[K]``; maybe none."""
        out: np.ndarray = self.bounds_ms <= budget_ms
        return out


class GuardState(NamedTuple):
    """All that the guard knows; the arrays of speed and margin are those that learning changes in place.

    Attributes:
        size_weights: times of each stage by functions of the request's size, ``[7, G, K]`` (`LatencyModel`).
        image_stages: 1 for the image's stages, 0 for others, ``[G]``.
        length_weights, length_bias, lengths: of the answer's length, ``[L, Dl]``, ``[L]`` and ``[L]``.
        scale: how many times as long as profiled each stage takes, ``[G]``.
        pace: log of the recent slowdown, and how slow the machine is compared with its calibration, ``[2]``.
        sorted_scores, score_counts: of each moment, ``[2, N]`` and int64 ``[2]`` (`budgetvlm.guard.margin.Scores`).
        group_offsets: what each group adds to the level.
        group_table: numbers of the groups that do not depend on the image, int64 ``[2, 1 + steps + L]``.
        fastest_settings: the setting that an answer can be hurried down to, int64 ``[K]``.
        same_image: the settings that show the model the same image, int64 ``[images, K / images]``.
        account: what a request takes beside the model's stages in ms, and the credit in late answers, ``[2]``.
        level, highest_level: of the margin. alpha: the share of requests that may be late.
        prepare_stage: number of the stage that prepares the image; -1 if there is none.
        revises: whether the choice will be revised. expected_only: whether expected times are the bounds.
    """

    size_weights: np.ndarray
    image_stages: np.ndarray
    length_weights: np.ndarray
    length_bias: np.ndarray
    lengths: np.ndarray
    scale: np.ndarray
    pace: np.ndarray
    sorted_scores: np.ndarray
    score_counts: np.ndarray
    group_offsets: np.ndarray
    group_table: np.ndarray
    fastest_settings: np.ndarray
    same_image: np.ndarray
    account: np.ndarray
    level: float
    highest_level: float
    alpha: float
    prepare_stage: int
    revises: bool
    expected_only: bool

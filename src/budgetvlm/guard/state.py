"""All that the guard knows, as one typed record: what the specification and the compiled loops read.

Shapes: G stages, K settings, L answer lengths, Dl language features, N scores. Times in ms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.guard.answer_length import LengthModel
from budgetvlm.guard.bounds import MOMENTS
from budgetvlm.guard.groups import Groups
from budgetvlm.guard.latency_model import SIZES, LatencyModel
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.recourse import Hurry, SameImage
from budgetvlm.guard.rule import Rule
from budgetvlm.guard.speed import StageSpeed

PREPARE = "preprocess"
IMAGE_STAGES = (PREPARE, "vision")  # of which the overview is a part


class GuardState(NamedTuple):
    """See the module. The arrays of speed and margin are those that learning changes in place.

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


def guard_state(
    latency: LatencyModel, lengths: LengthModel, speed: StageSpeed, margin: Margin, groups: Groups,
    account: np.ndarray, rule: Rule,
) -> GuardState:  # fmt: skip
    """The record of a guard's parts.

    Raises:
        ConfigError: parts that do not fit together.
    """
    space, stages = latency.knob_space, latency.stages
    weights, bias, values = lengths.folded
    fastest = Hurry(space).fastest if rule.hurries else np.arange(len(space))
    state = GuardState(
        size_weights=np.ascontiguousarray(latency.corrected_size.transpose(1, 0, 2), dtype=np.float64),
        image_stages=np.array([float(stage in IMAGE_STAGES) for stage in stages]),
        length_weights=weights,
        length_bias=bias,
        lengths=values,
        scale=speed.scale,
        pace=speed.pace,
        sorted_scores=margin.scores.ascending,
        score_counts=margin.scores.counts,
        group_offsets=margin.offsets,
        group_table=groups.table,
        fastest_settings=fastest.astype(np.int64),
        same_image=SameImage(space).members,
        account=account,
        level=float(margin.level),
        highest_level=float(margin.highest_level),
        alpha=float(margin.alpha),
        prepare_stage=stages.index(PREPARE) if PREPARE in stages else -1,
        revises=rule.revises,
        expected_only=rule.expected_only,
    )
    _check(state)
    return state


def _check(state: GuardState) -> None:
    """Compiled loops do not check what they index: shapes and types are checked here. Raises ConfigError."""
    stages, settings = len(state.image_stages), len(state.fastest_settings)
    lengths, moments = len(state.lengths), len(MOMENTS)
    wanted = {
        "size_weights": (np.float64, (len(SIZES), stages, settings)),
        "length_weights": (np.float64, (lengths, state.length_weights.shape[-1])),
        "length_bias": (np.float64, (lengths,)),
        "lengths": (np.float64, (lengths,)),
        "scale": (np.float64, (stages,)),
        "pace": (np.float64, (2,)),
        "sorted_scores": (np.float64, (moments, state.sorted_scores.shape[-1])),
        "score_counts": (np.int64, (moments,)),
        "group_offsets": (np.float64, (len(state.group_offsets),)),
        "group_table": (np.int64, (2, state.group_table.shape[-1])),
        "fastest_settings": (np.int64, (settings,)),
        "same_image": (np.int64, (len(state.same_image), settings // max(len(state.same_image), 1))),
        "account": (np.float64, (2,)),
    }
    wrong = [
        f"{name} is {array.dtype} {list(array.shape)}, not {np.dtype(kind)} {list(shape)}"
        for name, (kind, shape) in wanted.items()
        if (array := getattr(state, name)).dtype != kind or array.shape != shape or not array.flags.c_contiguous
    ]
    if wrong:
        raise ConfigError("the parts of the guard do not fit together: " + "; ".join(wrong))

"""All that the guard knows, as one typed record: what the specification and the compiled loops read.

Shapes: G stages, K settings, L answer lengths, Dl language features, N scores. Times in ms.
"""

from __future__ import annotations

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.guard.answer_length import LengthModel
from budgetvlm.guard.bounds import MOMENTS, GuardState
from budgetvlm.guard.groups import Groups
from budgetvlm.guard.latency_model import SIZES, LatencyModel
from budgetvlm.guard.margin import Margin
from budgetvlm.guard.recourse import Hurry, SameImage
from budgetvlm.guard.rule import Rule
from budgetvlm.guard.speed import StageSpeed

PREPARE = "preprocess"
IMAGE_STAGES = (PREPARE, "vision")  # of which the overview is a part


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

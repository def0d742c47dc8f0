"""What the controller is given, checked: its constructor's arguments and the features of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from budgetvlm.controller.layers import Standardiser
from budgetvlm.errors import ConfigError, InputError, KnobSpaceError
from budgetvlm.knobs import KnobSpace

RESERVED = ("joint", "feasible", "indices", "setting_index")  # keys that logits and actions have beside the knobs


def bounds_tensor(bounds_ms: Sequence[float | None]) -> Tensor:
    """Bounds ``[K]``, infinity for None."""
    return torch.tensor([math.inf if ms is None else ms for ms in bounds_ms])


def feature_matrix(feature: Tensor, what: str, layer: Standardiser) -> Tensor:
    """A feature as float ``[B, D]``; raises InputError naming both widths."""
    matrix = feature.reshape(1, -1) if feature.ndim == 1 else feature
    if matrix.ndim != 2 or matrix.shape[1] != layer.in_dim:
        raise InputError(
            f"the {what} feature has shape {list(feature.shape)}, but this controller was built for {layer.in_dim} "
            f"{what} features; use features of the model that it was trained with"
        )
    return matrix.to(layer.mean.dtype)


def check_arguments(
    sizes: Mapping[str, Any],
    space: KnobSpace,
    reference: float,
    price: float,
    latency_ms: Sequence[float | None] | None,
    bounds_ms: Sequence[float | None] | None,
) -> None:
    """Check what `GRPOController` is built with.

    Raises:
        ConfigError: sizes or numbers that cannot work, all at once.
        KnobSpaceError: a knob with a reserved name.
    """
    reserved = [name for name in space.names if name in RESERVED or not name]
    if reserved:
        raise KnobSpaceError(
            f"knobs cannot be named {', '.join(map(repr, reserved))}: these names have another meaning here"
        )
    problems = []
    for name in ("image_feat_dim", "lang_feat_dim", "budget_dim", "hidden_dim", "num_hidden_layers", "feature_dim"):
        value = sizes[name]
        if not (isinstance(value, int) and value >= 1) and not (name == "feature_dim" and value is None):
            problems.append(f"{name}={value!r} must be a whole number of at least 1")
    if not 0 <= sizes["dropout"] < 1:
        problems.append(f"dropout={sizes['dropout']!r} must be in [0, 1)")
    for name, number in (("latency_reference_ms", reference), ("logit_scale", sizes["logit_scale"])):
        if not 0 < number < math.inf:
            problems.append(f"{name}={number!r} must be a positive number")
    if not 0 <= price < math.inf:
        problems.append(f"default_price={price!r} must be 0 or more")
    for name, values in (("latency_ms", latency_ms), ("bounds_ms", bounds_ms)):
        if values is None:
            continue
        known = [value for value in values if value is not None]
        if len(values) != len(space) or not known or not all(0 < value < math.inf for value in known):
            problems.append(f"{name} must be {len(space)} positive numbers or None, one a setting: {list(values)}")
    if problems:
        raise ConfigError("this controller cannot be built: " + "; ".join(problems))

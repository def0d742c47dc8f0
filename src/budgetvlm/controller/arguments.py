"""What the controller is given, checked: its constructor's arguments and the features of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budgetvlm.controller.layers import Standardiser
from budgetvlm.errors import CheckpointError, ConfigError, InputError, KnobSpaceError
from budgetvlm.knobs import KnobSpace

RESERVED = ("joint", "feasible", "indices", "setting_index")  # keys that logits and actions have beside the knobs


@dataclass(frozen=True)
class NetworkOptions:
    """Options of a controller that are rarely changed; `GRPOController` takes them by name.

    Attributes:
        num_hidden_layers, dropout: of the network between features and heads.
        feature_dim: keep this many principal components of each feature; None keeps the features as they are.
        default_price: the price that is used where a request gives none.
        logit_scale: how sharply the policy prefers the better setting.
        bounds_by_input: whether the bounds depend on the features, see `budgetvlm.controller.layers.BoundsLayer`.
    """

    num_hidden_layers: int = 2
    dropout: float = 0.0
    feature_dim: int | None = None
    default_price: float = 0.01
    logit_scale: float = 20.0
    bounds_by_input: bool = False


def bounds_tensor(bounds_ms: Sequence[float | None]) -> Tensor:
    """Bounds ``[K]``, infinity for None."""
    return torch.tensor([math.inf if ms is None else ms for ms in bounds_ms])


def feature_matrices(
    image: Tensor, language: Tensor, image_input: Standardiser, lang_input: Standardiser
) -> tuple[Tensor, Tensor]:
    """Both features, tensors or arrays, as float ``[B, D]``. Raises InputError: other widths or counts than needed."""
    image, language = _matrix(image, "image", image_input), _matrix(language, "language", lang_input)
    if len(image) != len(language):
        raise InputError(f"{len(image)} image features but {len(language)} language features; give one of each a state")
    return image, language


def _matrix(feature: Tensor, what: str, layer: Standardiser) -> Tensor:
    feature = torch.as_tensor(feature)
    matrix = feature.reshape(1, -1) if feature.ndim == 1 else feature
    if matrix.ndim != 2 or matrix.shape[1] != layer.in_dim:
        raise InputError(
            f"the {what} feature has shape {list(feature.shape)}, but this controller was built for {layer.in_dim} "
            f"{what} features; use features of the model that it was trained with"
        )
    return matrix.to(layer.mean)


def per_state(value: Tensor | float, states: int, what: str, like: Tensor) -> Tensor:
    """Budgets or prices as a tensor ``[B]`` of the type and device of ``like``.

    ``value``: one number, ``[B]`` or ``[B, 1]``. ``what``: "budget" or "price", for the checks and their messages.
    Raises InputError: the wrong count, a budget that is not positive or a price below 0.
    """
    tensor = torch.as_tensor(value).to(like).reshape(-1)
    if tensor.numel() not in (1, states):
        raise InputError(f"{tensor.numel()} {what}s for {states} states; give one number, or one for each state")
    wrong = ~(tensor > 0) if what == "budget" else ~(tensor >= 0)
    if bool(wrong.any()):
        kind, unit = ("a positive number", "ms") if what == "budget" else ("0 or more", "accuracy")
        raise InputError(f"{what} {tensor[wrong][0].item()} cannot be used; give {kind} ({unit})")
    return tensor.expand(states)


def check_arguments(
    sizes: Mapping[str, Any],
    space: KnobSpace,
    reference: float,
    latency_ms: Sequence[float | None] | None,
    bounds_ms: Sequence[float | None] | None,
) -> None:
    """Check what `GRPOController` is built with.

    Raises ConfigError: sizes or numbers that cannot work, all at once; KnobSpaceError: a knob with a reserved name.
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
    if not 0 <= sizes["default_price"] < math.inf:
        problems.append(f"default_price={sizes['default_price']!r} must be 0 or more")
    for name, values in (("latency_ms", latency_ms), ("bounds_ms", bounds_ms)):
        if values is None:
            continue
        known = [value for value in values if value is not None]
        if len(values) != len(space) or not known or not all(0 < value < math.inf for value in known):
            problems.append(f"{name} must be {len(space)} positive numbers or None, one a setting: {list(values)}")
    if problems:
        raise ConfigError("this controller cannot be built: " + "; ".join(problems))


def check_state_dict(given: Mapping[str, Tensor | None], own: Mapping[str, Tensor], space: KnobSpace) -> None:
    """Check tensors that are to be loaded into a controller; None stands for one that is missing.

    Raises KnobSpaceError: they are of a controller over another knob space; CheckpointError: they have other sizes.
    """
    theirs = given["value_matrix"]
    if theirs is not None and not torch.equal(theirs.cpu(), own["value_matrix"].cpu()):
        raise KnobSpaceError(
            f"the checkpoint was trained on another knob space than this controller's ({space}); build it with "
            'GRPOController(**checkpoint["controller_config"])'
        )
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)} in the checkpoint but {list(own[name].shape)} here. "
                'Build it with GRPOController(**checkpoint["controller_config"])'
            )

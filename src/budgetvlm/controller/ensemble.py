"""Several controllers averaged in one network of the same kind, so that checkpoints and decisions stay as they are.

The average of M perceptrons is a perceptron: hidden layers side by side, no weight from one member to another, and
heads divided by M. Values are averaged, so the policy is the geometric mean of the members' policies.
Shapes: M members, H hidden units, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import ConfigError

SHARED = ("image_input.", "lang_input.", "latency_", "bounds_ms", "input_bounds.", "default_price", "value_matrix")


def member_seeds(seed: int, members: int) -> tuple[int, ...]:
    """Seeds of an ensemble's members, which another ensemble of that size lacks. Raises ConfigError: no member."""
    if members < 1:
        raise ConfigError(f"members={members} trains no controller; give 1 for a single one, or more to average them")
    return tuple(range(seed * members, (seed + 1) * members))


@torch.no_grad()
def merge(members: Sequence[GRPOController]) -> GRPOController:
    """Average members into one, in evaluation mode. Raises ConfigError: no member, or other sizes, knobs or data."""
    if not members:
        raise ConfigError("an ensemble needs at least one controller")
    first = members[0]
    if any(member.config != first.config for member in members) or not all(_same_data(first, m) for m in members):
        raise ConfigError("controllers of one ensemble need the same sizes, knobs and training data; train them alike")
    count = len(members)
    config = first.config
    merged = GRPOController(
        **{**config, "hidden_dim": config["hidden_dim"] * count, "budget_dim": config["budget_dim"] * count}
    )
    merged.load_state_dict({**merged.state_dict(), **_shared(first)})
    merged.trained_on = first.trained_on
    _side_by_side(merged.feature_layer, [member.feature_layer for member in members])
    for name in ("budget_embedding", "price_embedding"):
        _side_by_side(getattr(merged, name).linear, [getattr(member, name).linear for member in members])
    for layer, parts in zip(_linears(merged), zip(*(_linears(m) for m in members), strict=True), strict=True):
        _blocks(layer, parts, pieces=1)
    _blocks(merged.context_layer, [member.context_layer for member in members], pieces=2)
    merged.heads.weight.copy_(torch.cat([member.heads.weight / count for member in members], dim=1))
    merged.heads.bias.copy_(torch.stack([member.heads.bias for member in members]).mean(dim=0))
    return merged.eval()


def _shared(controller: GRPOController) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in controller.state_dict().items() if name.startswith(SHARED)}


def _same_data(one: GRPOController, two: GRPOController) -> bool:
    return all(torch.equal(tensor, _shared(two)[name]) for name, tensor in _shared(one).items())


def _linears(controller: GRPOController) -> list[nn.Linear]:
    return [layer for layer in controller.trunk if isinstance(layer, nn.Linear)]


def _side_by_side(layer: nn.Linear, parts: Sequence[nn.Linear]) -> None:
    """Fill a layer whose members read the same input and write their outputs side by side."""
    layer.weight.copy_(torch.cat([part.weight for part in parts]))
    layer.bias.copy_(torch.cat([part.bias for part in parts]))


def _blocks(layer: nn.Linear, parts: Sequence[nn.Linear], pieces: int) -> None:
    """Fill a layer whose members read only their own part of the input: ``pieces`` lists of the members' outputs."""
    layer.weight.zero_()
    rows = layer.weight.view(len(parts), -1, pieces, len(parts), parts[0].in_features // pieces)
    for number, part in enumerate(parts):
        rows[number, :, :, number] = part.weight.view(part.out_features, pieces, -1)
    layer.bias.copy_(torch.cat([part.bias for part in parts]))

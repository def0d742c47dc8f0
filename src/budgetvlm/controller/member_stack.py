"""The learnt layers of several controllers side by side, so that all members of an ensemble train at once.

Shapes: M members, A samples, B states, F standardised features, C functions of a budget or price, H hidden units,
K settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from budgetvlm.controller.network import GRPOController
from budgetvlm.policies.stacked_networks import FastDropout, StackedLinear

_DOT = "-"  # PyTorch allows no dot in a submodule's name


class MemberStack(nn.Module):
    """Copies of the linear layers of M controllers of one architecture; `GRPOController` says what they compute.

    A stack of one trains a single controller. A test holds its outputs equal to those of the controllers.
    """

    head_sum: Tensor

    def __init__(self, controllers: Sequence[GRPOController]):
        super().__init__()
        first = controllers[0]
        names = [name for name, layer in first.named_modules() if isinstance(layer, nn.Linear)]
        self.layers = nn.ModuleDict()
        for name in names:
            members = [controller.get_submodule(name) for controller in controllers]
            self.layers[name.replace(".", _DOT)] = StackedLinear([m for m in members if isinstance(m, nn.Linear)])
        self.trunk = [name for name in self.layers if name.startswith("trunk")]
        self.dropout = FastDropout(first.dropout)
        self.logit_scale = first.logit_scale
        self.register_buffer("head_sum", first.head_sum, persistent=False)

    def forward(self, features: Tensor, sample: Tensor, basis: Tensor) -> Tensor:
        """Learnt part of each setting's logit, logit_scale x value, ``[M, B, K]``.

        Args:
            features: standardised features of the samples, ``[M, A, F]``.
            sample: row of each state's sample in them, int64 ``[B]``.
            basis: what the embeddings read of budgets and prices, ``[M, B, 2, C]``.
        """
        budget = silu(self.layers["budget_embedding-linear"](basis[:, :, 0]))
        price = silu(self.layers["price_embedding-linear"](basis[:, :, 1]))
        context = self.layers["context_layer"](torch.cat([budget, price], dim=-1))
        hidden = self.layers["feature_layer"](features).index_select(1, sample)
        return self._values(hidden + context) * self.logit_scale

    def feature_values(self, features: Tensor) -> Tensor:
        """Values of each setting by the features alone, ``[M, A, F]`` -> ``[M, A, K]``; the context layer is left out.

        A fresh controller's context layer is zero, so these are its values at any budget and price.
        """
        return self._values(self.layers["feature_layer"](features))

    def _values(self, hidden: Tensor) -> Tensor:
        """First hidden layer before its activation ``[M, B, H]`` -> value of each setting ``[M, B, K]``."""
        for name in self.trunk:
            hidden = self.layers[name](self.dropout(silu(hidden)))
        heads = self.layers["heads"](self.dropout(silu(hidden)))
        split = self.head_sum.shape[0]
        return heads[..., split:] + heads[..., :split] @ self.head_sum

    def keep(self, members: Tensor) -> None:
        """Drop all but these members, int64 ``[m]``."""
        for _, layer in self._stacked():
            layer.keep(members)

    def copy_to(self, member: int, controller: GRPOController) -> None:
        """Write one member's weights into a controller of the same architecture."""
        for name, layer in self._stacked():
            target = controller.get_submodule(name)
            assert isinstance(target, nn.Linear)
            layer.copy_to(member, target)

    def _stacked(self) -> list[tuple[str, StackedLinear]]:
        """The layers under their names in the controller."""
        pairs = [(name.replace(_DOT, "."), layer) for name, layer in self.layers.items()]
        return [(name, layer) for name, layer in pairs if isinstance(layer, StackedLinear)]

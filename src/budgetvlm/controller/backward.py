"""The controller's gradient by hand: its layers forwards and backwards, with no graph of small operations.

At 64 states an update is as much bookkeeping of autograd as arithmetic. This is `GRPOController.value_logits` in
training and its derivative; a test compares both with autograd. Shapes: B states, K settings, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from budgetvlm.controller.layers import QuickDropout
from budgetvlm.controller.network import GRPOController

silu_backward = torch.ops.aten.silu_backward


class Affine:
    """A linear layer's tensors; gradients are written into those that its parameters have."""

    def __init__(self, layer: nn.Linear):
        assert layer.weight.grad is not None and layer.bias.grad is not None
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_gradient, self.bias_gradient = layer.weight.grad, layer.bias.grad

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def learn(self, x: Tensor, gradient: Tensor) -> None:
        """Note the parameters' gradient, given the input and the output's gradient."""
        torch.mm(gradient.t(), x, out=self.weight_gradient)
        torch.sum(gradient, 0, out=self.bias_gradient)


class Backward:
    """Logits of a controller whose parameters have gradients to write into, and the way back."""

    def __init__(self, controller: GRPOController):
        self.controller = controller
        self.embeddings = Affine(controller.budget_embedding.linear), Affine(controller.price_embedding.linear)
        self.features, self.context = Affine(controller.feature_layer), Affine(controller.context_layer)
        self.hidden = [Affine(layer) for layer in controller.trunk if isinstance(layer, nn.Linear)]
        self.heads = Affine(controller.heads)
        self.dropout = next(layer for layer in controller.trunk if isinstance(layer, QuickDropout))

    @torch.no_grad()
    def logits(self, encoded: Tensor, basis: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
        """`GRPOController.value_logits` ``[B, K]``, and what takes its gradient ``[B, K]`` back to the parameters."""
        bases = basis.unbind(dim=1)
        embedded = torch.cat([layer(x) for layer, x in zip(self.embeddings, bases, strict=True)], dim=1)
        context = silu(embedded)
        before = self.features(encoded).add_(self.context(context))  # [B, H], of the layer at hand
        stack, layers = (*self.hidden, self.heads), []
        drawn = self.dropout.factors(len(stack), *before.shape) if self.dropout.active else [None] * len(stack)
        for layer, kept in zip(stack, drawn, strict=True):
            after = silu(before) if kept is None else silu(before).mul_(kept)
            layers.append((layer, before, kept, after))
            before = layer(after)
        raw = before.mul_(self.controller.logit_scale)

        @torch.no_grad()
        def back(gradient: Tensor) -> None:
            gradient = gradient * self.controller.logit_scale
            gradient = torch.cat([gradient @ self.controller.head_sum.t(), gradient], dim=1)
            for layer, before, kept, after in reversed(layers):
                layer.learn(after, gradient)
                gradient = gradient @ layer.weight
                gradient = silu_backward(gradient if kept is None else gradient.mul_(kept), before)
            self.features.learn(encoded, gradient)
            self.context.learn(context, gradient)
            gradient = silu_backward(gradient @ self.context.weight, embedded)
            for layer, x, part in zip(self.embeddings, bases, gradient.chunk(2, dim=1), strict=True):
                layer.learn(x, part)

        return self.controller.summed(raw), back

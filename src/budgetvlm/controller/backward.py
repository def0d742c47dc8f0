"""The controller's gradient by hand: its layers forwards and backwards, with no graph of small operations.

At 64 states an update is as much bookkeeping as arithmetic. This is `GRPOController.value_logits` in training and its
derivative; a test compares both with autograd. Shapes: B states, K settings, H hidden units, E numbers embed a budget
or price.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from budgetvlm.controller import kernels
from budgetvlm.controller.layers import QuickDropout
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy_loss import Batch

Back = Callable[[Tensor], None]
"""Takes a gradient back to the parameters."""

silu_backward = torch.ops.aten.silu_backward


class Affine:
    """A linear layer's tensors; gradients are written into those that its parameters have."""

    def __init__(self, layer: nn.Linear):
        assert layer.weight.grad is not None and layer.bias.grad is not None
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()
        self.weight_gradient, self.bias_gradient = layer.weight.grad, layer.bias.grad
        self.transposed = self.weight.t()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addmm(self.bias, x, self.transposed, out=out)

    def learn_weight(self, x: Tensor, gradient: Tensor) -> None:
        """Note the weight's gradient, given the input and the output's gradient."""
        torch.mm(gradient.t(), x, out=self.weight_gradient)

    def learn(self, x: Tensor, gradient: Tensor) -> None:
        """The bias's too."""
        self.learn_weight(x, gradient)
        torch.sum(gradient, 0, out=self.bias_gradient)


class Backward:
    """Logits of a controller whose parameters have gradients to write into, and the way back."""

    def __init__(self, controller: GRPOController):
        self.controller = controller
        self.embeddings = Affine(controller.budget_embedding.linear), Affine(controller.price_embedding.linear)
        self.features, self.context = Affine(controller.feature_layer), Affine(controller.context_layer)
        self.layers = [Affine(layer) for layer in controller.trunk if isinstance(layer, nn.Linear)]
        self.layers.append(Affine(controller.heads))
        self.dropout = next(layer for layer in controller.trunk if isinstance(layer, QuickDropout))

    @staticmethod
    def of(controller: GRPOController) -> Backward:
        """The quickest one that can be used with this controller."""
        weight = controller.heads.weight
        return CompiledBackward(controller) if weight.is_cpu and weight.dtype == torch.float32 else Backward(controller)

    @torch.no_grad()
    def logits(self, encoded: Tensor, basis: Tensor) -> tuple[Tensor, Back]:
        """`GRPOController.value_logits` ``[B, K]``, and what takes its gradient ``[B, K]`` back."""
        raw, back_from_raw = self.raw(encoded, basis)
        controller = self.controller

        @torch.no_grad()
        def back(gradient: Tensor) -> None:
            gradient = gradient * controller.logit_scale
            back_from_raw(torch.cat([gradient @ controller.head_sum.t(), gradient], dim=1))

        return controller.summed(raw * controller.logit_scale), back

    @torch.no_grad()
    def raw(self, encoded: Tensor, basis: Tensor) -> tuple[Tensor, Back]:
        """The heads side by side and the joint term, not yet scaled, ``[B, sum(sizes) + K]``, and the way back."""
        embedded = torch.cat([layer(x) for layer, x in zip(self.embeddings, basis.unbind(dim=1), strict=True)], dim=1)
        context = nn.functional.silu(embedded)
        before = self.features(encoded).add_(self.context(context))  # [B, H], of the layer at hand
        bits, seen = self._bits(before.numel()), []
        for layer, kept in zip(self.layers, bits, strict=True):
            factors = None if kept is None else self.dropout.factors_of(kept, before.shape)
            after = nn.functional.silu(before) if factors is None else nn.functional.silu(before).mul_(factors)
            seen.append((layer, before, factors, after))
            before = layer(after)

        @torch.no_grad()
        def back(gradient: Tensor) -> None:
            for layer, before, factors, after in reversed(seen):
                layer.learn(after, gradient)
                gradient = gradient @ layer.weight
                gradient = silu_backward(gradient if factors is None else gradient.mul_(factors), before)
            self.features.learn(encoded, gradient)
            self.context.learn(context, gradient)
            gradient = silu_backward(gradient @ self.context.weight, embedded)
            parts = zip(self.embeddings, basis.unbind(dim=1), gradient.chunk(2, dim=1), strict=True)
            for layer, x, part in parts:
                layer.learn(x, part)

        return before, back

    def _bits(self, count: int) -> Tensor | list[None]:
        """`QuickDropout.bits` of each layer's input."""
        return self.dropout.bits(count, len(self.layers)) if self.dropout.active else [None] * len(self.layers)


class CompiledBackward(Backward):
    """The same for float32 on a CPU: between matrix products run compiled loops, over memory that is used again.

    So a gradient has to be taken back before the next `raw`.
    """

    def __init__(self, controller: GRPOController):
        super().__init__(controller)
        self._places = controller.head_sum.t().nonzero()[:, 1].view(controller.num_settings, -1).numpy().copy()
        self._rooms: dict[int, list[_Room]] = {}
        self._embeddings = [[x.numpy() for x in (layer.weight, layer.bias)] for layer in self.embeddings]
        self._learns = [[x.numpy() for x in (e.weight_gradient, e.bias_gradient)] for e in self.embeddings]
        below = self.features, *self.layers[:-1]
        self._totals = [layer.bias_gradient.numpy() for layer in below]
        self._expected_states, self._expected = 0, list[Tensor]()

    @torch.no_grad()
    def raw(self, encoded: Tensor, basis: Tensor) -> tuple[Tensor, Back]:
        rooms, each = self._rooms_of(len(encoded)), torch.arange(len(encoded))
        return rooms[-1].before, self._run(rooms, encoded, each, basis, self._bits(rooms[1].before.numel()))

    def exact(self, batch: Batch, entropy_coef: float) -> tuple[float, Tensor, Back]:
        """The exact policy loss of a batch with its entropy bonus, its gradient by the heads, and the way back."""
        rooms = self._rooms_of(len(batch))
        count = rooms[1].before.numel()
        bits = self._expected.pop() if self._expected and len(batch) == self._expected_states else self._bits(count)
        back = self._run(rooms, batch.features, batch.sample, batch.basis, bits)
        heads = rooms[-1].arrays
        loss = kernels.exact_policy(
            heads.before, self._places, self.controller.logit_scale, batch.offset.numpy(), batch.rewards.numpy(),
            entropy_coef, heads.gradient,
        )  # fmt: skip
        return loss, rooms[-1].gradient, back

    def expect(self, states: int, updates: int) -> None:
        """Draw for so many `exact` updates of so many states what dropout keeps: at once is ten times as fast."""
        self._expected_states, self._expected = states, []
        if self.dropout.active:
            layers = len(self.layers)
            bits = self.dropout.bits(states * self.layers[0].weight.shape[1], updates * layers)
            self._expected = list(reversed(bits.split(layers)))

    @torch.no_grad()
    def _run(
        self, rooms: list[_Room], features: Tensor, sample: Tensor, basis: Tensor, kept: Tensor | list[None]
    ) -> Back:
        """Forwards, up to the heads in the last room; returns the way back. See `Batch` for features and sample."""
        context, *inputs, _ = rooms
        bases, owner = basis.numpy(), sample.numpy()
        for i, (weight, bias) in enumerate(self._embeddings):
            kernels.embed(bases, i, weight, bias, context.arrays.before)
        context.activate()
        kernels.spread(self.features(features).numpy(), owner, self.context.bias.numpy(), inputs[0].arrays.before)
        inputs[0].before.addmm_(context.after, self.context.transposed)
        for layer, room, bits, above in zip(self.layers, inputs, kept, rooms[2:], strict=True):
            room.activate()
            if bits is not None:
                kernels.drop(bits.numpy(), self.dropout.factor, room.arrays.after, room.arrays.slope)
            layer(room.after, out=above.before)

        @torch.no_grad()
        def back(gradient: Tensor) -> None:
            torch.sum(gradient, 0, out=self.layers[-1].bias_gradient)
            for layer, room, total in reversed(list(zip(self.layers, inputs, self._totals, strict=True))):
                layer.learn_weight(room.after, gradient)
                gradient = torch.mm(gradient, layer.weight, out=room.gradient)
                kernels.through(room.arrays.slope, room.arrays.gradient, total)
            of_samples = kernels.gathered(inputs[0].arrays.gradient, owner, len(features))
            self.features.learn_weight(features, torch.from_numpy(of_samples))
            self.context.learn_weight(context.after, gradient)
            self.context.bias_gradient.copy_(self.features.bias_gradient)
            torch.mm(gradient, self.context.weight, out=context.gradient).mul_(context.slope)
            for i, learns in enumerate(self._learns):
                kernels.embed_backward(context.arrays.gradient, bases, i, *learns)

        return back

    def _rooms_of(self, states: int) -> list[_Room]:
        """For the context, the input of each layer and the heads."""
        rooms = self._rooms.get(states)
        if rooms is None:
            layers = self.context, *self.layers
            widths = [layer.weight.shape[1] for layer in layers] + [len(self.layers[-1].bias)]
            self._rooms[states] = rooms = [_Room(states, width) for width in widths]
        return rooms


class _Arrays(NamedTuple):
    """Of an activation, ``[B, D]``: what it is of, its sigmoid, what comes out, its slope, and a gradient."""

    before: np.ndarray
    sigmoid: np.ndarray
    after: np.ndarray
    slope: np.ndarray
    gradient: np.ndarray


class _Room:
    """Memory for an activation: `_Arrays`, and the same as tensors."""

    def __init__(self, states: int, width: int):
        memory = torch.empty(5, states, width)
        self.before, self._sigmoid, self.after, self.slope, self.gradient = memory
        self.arrays = _Arrays(*memory.numpy())

    def activate(self) -> None:
        torch.sigmoid(self.before, out=self._sigmoid)
        kernels.activate(*self.arrays[:4])

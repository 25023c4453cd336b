"""A quantized layer whose codes stay, while a gradient moves its bias, and if wanted its steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from subbyte.calibrate.models import CalibratedLayer
from subbyte.model.operator import beside_channels
from subbyte.model.quantized_layer import QuantizedState
from subbyte.quantizers.affine import soft_quantize


class TunedLayer:
    """`y = operator(q(x; s_x e^u, z_x), e^t W^, b)` with gradients for `b`, `t` and `u`; starts as what the layer is.

    Args:
        item: the layer; it has codes.
        with_steps: whether the steps of weights (`t`, one for each of them) and of the input (`u`) are parameters too.
    """

    def __init__(self, item: CalibratedLayer, *, with_steps: bool) -> None:
        self.item = item
        self._start, self._weight = item.quantized.state(), item.quantized.weight
        bias = self._start.bias
        self.bias = (item.float_bias().flatten() if bias is None else bias.clone()).requires_grad_()
        self.steps: list[Tensor] = []
        if with_steps:
            self.steps = [torch.zeros_like(self._start.scale).requires_grad_()]
            self.steps += [torch.zeros_like(self._start.activation[0]).requires_grad_()] if self._start.activation else []

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: float32, the shape that the layer accepts.
        """
        operator, weight = self.item.layer.operator, self._weight
        if self.steps:
            weight = weight * self._start.per_weight(self.steps[0].exp(), operator)
        if self._start.activation is not None:
            step, zero_point, grid = self._start.activation
            x = soft_quantize(x, step * self.steps[1].exp() if self.steps else step, zero_point.float(), grid)
        if not operator.multiplies:
            return operator(x, weight, None)
        y = operator(x, weight, self.bias.detach())
        return cast(Tensor, _BiasGradient.apply(y, self.bias, operator.channel_dimension))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def state(self) -> QuantizedState:
        """What the present parameters stand for; codes and zero-points are the very tensors that the layer had."""
        tuned = replace(self._start, bias=self.bias.detach().clone())
        if not self.steps:
            return tuned
        activation = tuned.activation
        if activation is not None:
            activation = (activation[0] * self.steps[1].exp(), *activation[1:])
        return replace(tuned, scale=tuned.scale * self.steps[0].exp(), activation=activation)


class _BiasGradient(torch.autograd.Function):
    """`y` itself, to which a bias has been added already, with the gradient for it.

    A convolution that is asked for its bias's gradient takes that for its weight, too, which costs as much as that for its input; and a sum
    behind it costs a pass over all outputs.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, channel_dimension: int) -> Tensor:
        ctx.channel_dimension = channel_dimension
        ctx.mark_dirty(y)  # what comes next may work in place
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient.sum(beside_channels(gradient, ctx.channel_dimension)), None

"""A quantized layer whose codes stay, while a gradient moves its bias, and if wanted its steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from subbyte.calibrate.models import CalibratedLayer
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
        y = operator(x, weight, None)  # with the bias it would get a gradient for the weight, which takes as long as that for the input
        if not operator.multiplies:
            return y
        return y + self.bias.view([-1 if d == operator.channel_dimension % y.dim() else 1 for d in range(y.dim())])

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

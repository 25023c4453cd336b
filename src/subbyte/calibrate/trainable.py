"""Quantized layers that compute with gradients: what blocks and whole models are trained with, weights and all or biases only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from subbyte.calibrate.joint import JointParameters
from subbyte.calibrate.models import CalibratedLayer


class StandIn(Protocol):
    """Computes in the place of a quantized layer."""

    item: CalibratedLayer

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: float32, the shape that the layer accepts.
        """


@dataclass(eq=False)
class TrainableLayer:
    """Computes what a `QuantizedLayer` does, with gradients for the parameters it is given.

    Args:
        item: the layer.
        parameters: weight, bias, steps and zero-point; tensors as its docstring says.
        float_share: share of the input's numbers that stay unquantized, drawn anew in each call.
        generator: draws which ones; on the layer's device.

    Source:
        Unquantized numbers: QDrop (Wei et al. 2022, arXiv 2203.05740).
    """

    item: CalibratedLayer
    parameters: JointParameters
    float_share: float = 0.0
    generator: torch.Generator | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: float32, the shape that the layer accepts.
        """
        quantized = self.parameters.inputs(x)
        if self.float_share and quantized is not x:
            stays = torch.rand(x.shape, device=x.device, generator=self.generator) < self.float_share
            quantized = torch.where(stays, x, quantized)
        operator = self.item.layer.operator
        return operator(quantized, operator.from_matrix(self.parameters.weight()), self.parameters.bias().flatten())


@contextlib.contextmanager
def standing_in(layers: Iterable[StandIn]) -> Iterator[None]:
    """Others compute in the place of the quantized model's own layers, until the context ends.

    Args:
        layers: each stands in for `item.quantized`.
    """
    layers = tuple(layers)
    for layer in layers:
        layer.item.quantized.forward = layer  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.item.quantized.forward

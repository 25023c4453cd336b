"""Everything that a layer computes with, as parameters that a gradient can move: what AdaQuant and Blockwise optimise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from subbyte.calibrate.problem import LayerSolution
from subbyte.quantizers.affine import quantize, soft_quantize
from subbyte.quantizers.grid import Grid

LEAST_SPREAD = 1e-3  # of the layer's outputs: one that varies less, as a dead channel does, is no unit for its bias


def half_cosine(share: float) -> float:
    """A rate's decay from 1 to 0.

    Args:
        share: of all iterations that are done, 0 to 1.

    Example:
        >>> half_cosine(0.0), round(half_cosine(0.5), 6), half_cosine(1.0)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1.0 + math.cos(math.pi * share))


class Rates(Protocol):
    """Adam's rates for the groups of parameters, in the parameters' own units."""

    @property
    def weight_rate(self) -> float:
        """For weights."""

    @property
    def bias_rate(self) -> float:
        """For biases."""

    @property
    def weight_step_rate(self) -> float:
        """For weight steps."""

    @property
    def activation_rate(self) -> float:
        """For input steps and zero-points."""


def adam(parameters: Sequence[JointParameters], rates: Rates) -> torch.optim.Optimizer:
    """Adam with the paper's four groups.

    Args:
        parameters: of all layers that move together.
        rates: of the groups.

    Source:
        Hubara et al., arXiv 2006.10518, section 3.1: the groups; Kingma, Ba 2014 (arXiv 1412.6980).
    """
    return torch.optim.Adam(
        [
            {"params": [each.raw_weight for each in parameters], "lr": rates.weight_rate},
            {"params": [each.raw_bias for each in parameters], "lr": rates.bias_rate},
            {"params": [each.raw_weight_step for each in parameters], "lr": rates.weight_step_rate},
            {"params": [tensor for each in parameters for tensor in each.raw_activation], "lr": rates.activation_rate},
        ]
    )


class JointParameters:
    """Weight, bias, weight steps, input step and zero-point; starts exactly at a solution's codes.

    `raw_weight`: `W + V` in units of the present step; `raw_bias`: in units of the output's spread; `raw_weight_step`, `raw_activation[0]`:
    the logarithm of the ratio to the first step; `raw_activation[1]`: the zero-point. Rounding is straight-through.

    In units of the present step a weight keeps its code when the step moves, and the step's gradient is the objective's for fixed codes.
    With absolute rates, as in the paper, all units are 1, the steps themselves are moved and have LSQ's gradient, and a step that moves
    a little makes many codes jump.

    Args:
        start: where to start; tensors as its docstring says.
        weight: trained weight, float32 (G, O, n): where inside its code's cell each weight starts.
        spread: standard deviation of each output, float32 (G, O); zeros are no harm.
        weight_grid: grid of the weights.
        activation_grid: grid of the input, or None.
        relative: whether units are relative to each tensor's scale.
    """

    def __init__(
        self, start: LayerSolution, weight: Tensor, spread: Tensor, weight_grid: Grid, activation_grid: Grid | None, *, relative: bool
    ) -> None:
        self.start, self.weight_grid, self.activation_grid, self._relative = start, weight_grid, activation_grid, relative
        step = start.per_weight(start.scale)
        on_grid = start.weight()
        inside_cell = on_grid + (weight - on_grid).clamp(-0.49 * step, 0.49 * step)
        typical = torch.where(spread.any(), spread.square().mean().sqrt(), 1.0)
        self._bias_unit = torch.where(spread > LEAST_SPREAD * typical, spread, typical) if relative else torch.ones_like(spread)
        self.raw_weight = (inside_cell / step if relative else inside_cell).requires_grad_()
        self.raw_bias = (start.bias / self._bias_unit).requires_grad_()
        self.raw_weight_step = (torch.zeros_like(start.scale) if relative else start.scale.clone()).requires_grad_()
        self.raw_activation: list[Tensor] = []
        if start.activation is not None:
            scale, zero = start.activation
            first = torch.zeros_like(scale) if relative else scale.clone()
            self.raw_activation = [first.requires_grad_(), zero.float().requires_grad_()]

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters: weight (G, O, n), bias (G, O), weight step as the solution's `scale`, input step () and zero-point ()."""
        return [self.raw_weight, self.raw_bias, self.raw_weight_step, *self.raw_activation]

    def weight(self) -> Tensor:
        """The quantized weight, float32 (G, O, n), with gradients."""
        zero, step = self.start.per_weight(self.start.zero_point).float(), self.start.per_weight(self._weight_step())
        if not self._relative:
            return soft_quantize(self.raw_weight, step, zero, self.weight_grid)
        return soft_quantize(self.raw_weight, torch.ones_like(step), zero, self.weight_grid) * step

    def bias(self) -> Tensor:
        """The bias, float32 (G, O), with gradients."""
        return self.raw_bias * self._bias_unit

    def inputs(self, x: Tensor) -> Tensor:
        """The quantized input, with gradients; `x` itself where the input stays in float32.

        Args:
            x: float32, any shape.
        """
        step, zero, grid = self._activation_step(), self._zero_point(), self.activation_grid
        return x if step is None or zero is None or grid is None else soft_quantize(x, step, zero, grid)

    @torch.no_grad()
    def solution(self, name: str) -> LayerSolution:
        """What the present parameters stand for.

        Args:
            name: of the solver.
        """
        start, weight_step = self.start, self._weight_step()
        activation_step, activation_zero = self._activation_step(), self._zero_point()
        unit = torch.ones_like(weight_step) if self._relative else weight_step
        codes = quantize(self.raw_weight, start.per_weight(unit), start.per_weight(start.zero_point), self.weight_grid)
        activation = None
        if activation_step is not None and activation_zero is not None:
            activation = (activation_step.clone(), activation_zero.round().to(torch.int32))
        found = replace(start, codes=codes.to(torch.int16), scale=weight_step.clone(), bias=self.bias().clone())
        return replace(found, activation=activation, solver=name)

    def _weight_step(self) -> Tensor:
        """`s_w`, the shape of the solution's."""
        if self._relative:
            return self.start.scale * self.raw_weight_step.exp()
        return self.raw_weight_step.clamp(min=torch.finfo(torch.float32).tiny)

    def _activation_step(self) -> Tensor | None:
        """`s_x`, ()."""
        if not self.raw_activation or self.start.activation is None:
            return None
        raw = self.raw_activation[0]
        return self.start.activation[0] * raw.exp() if self._relative else raw.clamp(min=torch.finfo(torch.float32).tiny)

    def _zero_point(self) -> Tensor | None:
        """`z_x` inside the grid, not yet rounded, ()."""
        if not self.raw_activation or self.activation_grid is None:
            return None
        return self.raw_activation[1].clamp(self.activation_grid.lowest, self.activation_grid.highest)

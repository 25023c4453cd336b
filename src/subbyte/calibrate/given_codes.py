"""The rest of a layer whose codes are given: step and zero-point of its input, steps of its weights, bias.

    minimise over s_x, z_x, s_w, b'      sum over rows || y - s_w (Q - z_w) q(x'; s_x, z_x) - b' ||^2

First the input's grid, with the best bias: `Var(y - W^ q(x'; s_x, z_x))` is made small. Then of each output channel a line: with `u` its
part of `W^ q(x')`,

    s_w' = s_w Cov(y, u) / Var(u),      b' = mean y - mean u Cov(y, u) / Var(u)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from subbyte.calibrate.guard import Judged
from subbyte.calibrate.problem import LayerProblem, LayerSolution, quantized_inputs, relative_error
from subbyte.calibrate.steps import least_output_error
from subbyte.quantizers.affine import scale_and_zero_point
from subbyte.quantizers.ranges import LeastOutputError, Range

RANGE = LeastOutputError(count=24)
SLOPES = (0.5, 2.0)  # beyond, the rows say nothing of the channel


def with_input(problem: LayerProblem, codes: LayerSolution, interval: Range = RANGE) -> LayerSolution:
    """Given codes with the best grid for the layer's input.

    Args:
        problem: the layer; tensors as its docstring says.
        codes: laid out as the layer's own.
        interval: clippings of the input's range to choose among.
    """
    grid = problem.activation_grid
    if grid is None:
        return replace(codes, activation=None)
    low, high = interval.candidates(problem.fit.inputs.reshape(1, -1))
    candidates = [scale_and_zero_point(low[k, 0], high[k, 0], grid) for k in range(len(low))]
    activation = least_output_error(problem.fit.inputs, problem.fit.targets, codes.weight(), candidates, grid)
    return replace(codes, activation=activation)


def with_bias(problem: LayerProblem, codes: LayerSolution) -> LayerSolution:
    """Given codes with the bias that makes good for the mean error on the rows to fit.

    Args:
        problem: the layer; tensors as its docstring says.
        codes: with the input's grid.
    """
    inputs = quantized_inputs(problem.fit.inputs, codes.activation, problem.activation_grid)
    mean = (codes.weight() @ inputs.mean(dim=1)[..., None])[..., 0]
    return replace(codes, bias=problem.fit.targets.mean(dim=1) - mean)


def with_steps(problem: LayerProblem, codes: LayerSolution) -> LayerSolution:
    """Given codes with the weight step and bias of least error, one factor for all steps of an output channel.

    Args:
        problem: the layer; tensors as its docstring says.
        codes: with the input's grid.
    """
    inputs = quantized_inputs(problem.fit.inputs, codes.activation, problem.activation_grid)
    u = torch.bmm(inputs, codes.weight().mT)
    mean_u, mean_y = u.mean(dim=1), problem.fit.targets.mean(dim=1)
    centred: Tensor = u - mean_u[:, None]
    variance = centred.square().sum(dim=1)
    slope = (centred * (problem.fit.targets - mean_y[:, None])).sum(dim=1) / variance.clamp(min=torch.finfo(torch.float32).tiny)
    slope = torch.where((slope > SLOPES[0]) & (slope < SLOPES[1]), slope, torch.ones_like(slope))
    scale = codes.scale * (slope if codes.scale.dim() == slope.dim() else slope[..., None])
    return replace(codes, scale=scale, bias=mean_y - slope * mean_u)


def refit(problem: LayerProblem, given: LayerSolution, plain: LayerSolution) -> Judged:
    """Keep a layer's codes, fit the rest to what arrives, and judge the outcome against plain rounding.

    Args:
        problem: the layer, with what the quantized layers before it return; tensors as its docstring says.
        given: codes that were found for other inputs, with the rest that suits these.
        plain: plain rounding of this problem.
    """
    moved = with_input(problem, given)
    candidates = (given, *(fit(problem, each) for each in (given, moved) for fit in (with_bias, with_steps)))
    errors = [relative_error(problem, each, problem.held_out) for each in candidates]
    least = min(range(len(errors)), key=errors.__getitem__)
    plain_error = relative_error(problem, plain, problem.held_out)
    kept = candidates[least] if errors[least] < plain_error else plain
    return Judged(kept, plain, errors[least], plain_error, problem.unknowns, problem.equations)

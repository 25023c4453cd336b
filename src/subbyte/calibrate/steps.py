"""Choose steps and zero-points among the candidates of a `Range` by the error that they cause in the layer's output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from subbyte.calibrate.problem import LayerProblem
from subbyte.quantizers.affine import fake_quantize, scale_and_zero_point
from subbyte.quantizers.granularity import column_groups
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.ranges import Range

SEARCH_ROWS = 1024
SEARCH_NUMBERS = 1 << 19
CANDIDATE_NUMBERS = 1 << 18  # of the weights that are tried at once: the cache holds them
SKETCH_OUTPUTS = 48


def weight_step(weight: Tensor, importance: Tensor, grid: Grid, interval: Range) -> tuple[Tensor, Tensor]:
    """Step and zero-point of each output channel: the candidate with the least `sum_j importance_j (w_j - w^_j)^2`.

    With column groups, of each of them: the best of the group's own candidates and what its whole output channel would have.

    Args:
        weight: `W`, float32 (G, O, n).
        importance: weight of each input, float32 (G, n): its second moment, the diagonal of `H`.
        grid: grid of the codes.
        interval: what to choose among.

    Returns:
        `(s_w, z_w)`, float32 and int32, (G, O) each, or with column groups (G, O, K).
    """
    whole = replace(grid, group=None)
    _, step, zero = _best_candidate(weight, importance, whole, interval)
    if grid.group is None:
        return step, zero
    parts = []
    for columns in column_groups(weight.shape[2], grid.group):
        part, share = weight[..., columns], importance[:, columns]
        cost, own_step, own_zero = _best_candidate(part, share, whole, interval)
        better = cost < _cost(part, share, step, zero, whole)
        parts.append((torch.where(better, own_step, step), torch.where(better, own_zero, zero)))
    steps, zeros = zip(*parts, strict=True)
    return torch.stack(steps, dim=2), torch.stack(zeros, dim=2)


def _best_candidate(weight: Tensor, importance: Tensor, grid: Grid, interval: Range) -> tuple[Tensor, Tensor, Tensor]:
    """The least cost, and its step and zero-point, (G, O) each."""
    most = max(1, CANDIDATE_NUMBERS // (weight.shape[0] * weight.shape[2]))
    parts = [_best_of_few(few, importance, grid, interval) for few in weight.split(most, dim=1)]
    cost, step, zero = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
    return cost, step, zero


def _best_of_few(weight: Tensor, importance: Tensor, grid: Grid, interval: Range) -> tuple[Tensor, Tensor, Tensor]:
    """`_best_candidate` of a few output channels."""
    groups, outputs, n = weight.shape
    ends = (end.view(-1, groups, outputs) for end in interval.candidates(weight.reshape(-1, n)))
    together = max(1, CANDIDATE_NUMBERS // weight.numel())
    found = []
    for low, high in zip(*(end.split(together) for end in ends), strict=True):
        scale, zero_point = scale_and_zero_point(low, high, grid)
        cost, at = _cost(weight, importance, scale, zero_point, grid).min(dim=0, keepdim=True)
        found.append((cost, scale.gather(0, at), zero_point.gather(0, at)))
    costs, steps, zeros = (torch.cat(values) for values in zip(*found, strict=True))
    best, at = costs.min(dim=0, keepdim=True)
    return best[0], steps.gather(0, at)[0], zeros.gather(0, at)[0]


def _cost(weight: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """`sum_j importance_j (w_j - w^_j)^2` of one step and zero-point for each output channel, the shape of both: (G, O) or (C, G, O)."""
    step, zero = scale[..., None], zero_point[..., None]
    codes = (weight / step).round_().add_(zero).clamp_(grid.lowest, grid.highest)
    error = codes.sub_(zero).mul_(step).sub_(weight)  # in place: memory is what it waits for
    return (error.square_() @ importance[..., None])[..., 0]


def sketched(weight: Tensor) -> Tensor:
    """Fewer output channels with the same expected squared output: `P W` with signs `P / sqrt(k)`, random but the same every time.

    Args:
        weight: `W`, float32 (G, O, n).

    Returns:
        float32 (G, min(O, k), n), k = 48; `weight` itself where O is not larger.

    Source:
        Achlioptas 2003, *Database-friendly random projections*.
    """
    outputs = weight.shape[1]
    if outputs <= SKETCH_OUTPUTS:
        return weight
    generator = torch.Generator().manual_seed(0)  # what is chosen by it depends on the layer only, not on what was drawn before
    signs = torch.randint(0, 2, (SKETCH_OUTPUTS, outputs), device="cpu", generator=generator).to(weight) * 2 - 1
    sketch: Tensor = (signs / SKETCH_OUTPUTS**0.5) @ weight
    return sketch


def starting_activation(problem: LayerProblem, interval: Range) -> tuple[Tensor, Tensor] | None:
    """`activation_step` of a problem, the same for all grids of the weights and kept for them; None where the input stays in float32.

    Args:
        problem: the layer; tensors as its docstring says.
        interval: what to choose among.

    Returns:
        `(s_x, z_x)`, float32 () and int32 ().
    """
    grid = problem.activation_grid
    if grid is None:
        return None
    return problem.once(
        "starting activation", (grid, interval), lambda: activation_step(problem.fit.inputs, problem.weight, grid, interval)
    )


def activation_step(inputs: Tensor, weight: Tensor, grid: Grid, interval: Range) -> tuple[Tensor, Tensor]:
    """Step and zero-point of the input: the candidate with the least variance of `W (x - q(x))` (its mean is the bias' matter).

    Args:
        inputs: `x'`, float32 (G, R, n).
        weight: `W`, float32 (G, O, n).
        grid: grid of the input.
        interval: what to choose among, for the values of all inputs together.

    Returns:
        `(s_x, z_x)`, float32 () and int32 ().
    """
    low, high = interval.candidates(inputs.reshape(1, -1))  # of all rows: the search itself is content with some
    candidates = [scale_and_zero_point(low[k, 0], high[k, 0], grid) for k in range(len(low))]
    return least_output_error(inputs, None, weight, candidates, grid)


def least_output_error(
    inputs: Tensor,
    targets: Tensor | None,
    weight: Tensor,
    candidates: list[tuple[Tensor, Tensor]],
    grid: Grid,
    least_gain: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The candidate with the least variance of `y - W q(x; s_x, z_x)` over some of the rows.

    Args:
        inputs: `x'`, float32 (G, R, n).
        targets: `y`, float32 (G, R, O); None: `W x`.
        weight: `W` or its quantized counterpart, float32 (G, O, n).
        candidates: `(s_x, z_x)`, float32 () and int32 () each.
        grid: grid of the input.
        least_gain: the first candidate stays unless another has an error smaller by more than this share.

    Returns:
        One of the candidates.
    """
    if len(candidates) == 1:
        return candidates[0]
    groups, count, n = inputs.shape
    every = -(-count // max(1, min(SEARCH_ROWS, SEARCH_NUMBERS // (groups * n))))
    inputs = inputs[:, ::every].contiguous()
    targets = inputs @ weight.mT if targets is None else targets[:, ::every]
    stacked = torch.cat([weight, targets.mT], dim=2)  # the same sketch for both
    stacked = sketched(stacked)
    weight, targets = stacked[..., :n], stacked[..., n:].mT.contiguous()
    targets -= targets.mean(dim=1, keepdim=True)
    costs = []
    for scale, zero_point in candidates:
        error = torch.baddbmm(targets, fake_quantize(inputs, scale, zero_point, grid), weight.mT, alpha=-1)
        costs.append((error - error.mean(dim=1, keepdim=True)).square_().sum())
    if least_gain:
        costs[0] = costs[0] * (1.0 - least_gain)
    return candidates[int(torch.stack(costs).argmin())]

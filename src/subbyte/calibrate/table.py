"""Codes of a table that is looked up in: an embedding.

A row `w` of the table leaves the layer as it is, alone. There is no input to be quantized, nothing to fit to data, and no other row to make
good for an error, so that each row is a problem of its own,

    minimise over codes q, step s and zero-point z      || w - s (q - z) ||^2

(or one step and zero-point for each column group), which is solved by turns: codes by rounding, the step in closed form,
`s = <q - z, w> / ||q - z||^2`, from several clippings of the range.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from subbyte.calibrate.guard import Judged
from subbyte.calibrate.models import CalibratedLayer
from subbyte.calibrate.problem import LayerSolution
from subbyte.calibrate.steps import weight_step
from subbyte.quantizers.affine import quantize
from subbyte.quantizers.granularity import group_sums, per_weight
from subbyte.quantizers.ranges import LeastOutputError

ROUNDS = 8
CHUNK_ROWS = 4096


def solve_table(item: CalibratedLayer, *, refine: bool) -> Judged:
    """Codes and steps of every row.

    Args:
        item: a layer that looks rows up.
        refine: whether steps are refined in turns with the codes; else the best of some clippings is taken, which is plain rounding.

    Returns:
        The solution beside plain rounding; errors are squared errors of the table as a share of its squares.
    """
    weight = item.float_weight()
    plain = _rounded(item, weight)
    plain_error = _error(weight, plain)
    found = _refined(item, weight, plain) if refine else plain
    error = _error(weight, found)
    return Judged(found if error < plain_error else plain, plain, error, plain_error, weight.shape[2], weight.shape[2])


def _rounded(item: CalibratedLayer, weight: Tensor) -> LayerSolution:
    grid, parts = item.weight_grid, weight.split(CHUNK_ROWS, dim=1)
    ones = weight.new_ones(weight.shape[0], weight.shape[2])
    found = [weight_step(part, ones, grid, LeastOutputError()) for part in parts]
    scale, zero_point = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
    steps, zeros = (per_weight(values, grid.group, weight.shape[2]) for values in (scale, zero_point))
    codes = quantize(weight, steps, zeros, grid).to(torch.int16)
    return LayerSolution(codes, scale, zero_point, weight.new_zeros(weight.shape[:2]), None, "RoundToNearest", grid.group)


def _refined(item: CalibratedLayer, weight: Tensor, start: LayerSolution) -> LayerSolution:
    scale, zero_point, grid = start.scale, start.per_weight(start.zero_point), item.weight_grid
    for _ in range(ROUNDS):
        levels = quantize(weight, start.per_weight(scale), zero_point, grid) - zero_point
        squares = group_sums(levels.square(), grid.group).view(scale.shape)
        best = group_sums(levels * weight, grid.group).view(scale.shape) / squares
        scale = torch.where((squares > 0) & (best > 0), best, scale)
    codes = quantize(weight, start.per_weight(scale), zero_point, grid).to(torch.int16)
    return replace(start, codes=codes, scale=scale, solver="Table")


def _error(weight: Tensor, solution: LayerSolution) -> float:
    total = weight.square().sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    return float((weight - solution.weight()).square().sum(dtype=torch.float64) / total)

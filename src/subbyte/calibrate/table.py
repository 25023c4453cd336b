"""Codes of a table that is looked up in: an embedding.

A row `w` of the table leaves the layer as it is, alone. There is no input to be quantized, nothing to fit to data, and no other row to make
good for an error, so that each row is a problem of its own,

    minimise over codes q, step s and zero-point z      || w - s (q - z) ||^2

which is solved by turns: codes by rounding, the step in closed form, `s = <q - z, w> / ||q - z||^2`, from several clippings of the range.
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
    steps = [weight_step(part, ones, grid, LeastOutputError()) for part in parts]
    scale, zero_point = (torch.cat(values, dim=1) for values in zip(*steps, strict=True))
    codes = quantize(weight, scale[..., None], zero_point[..., None], grid).to(torch.int16)
    return LayerSolution(codes, scale, zero_point, torch.zeros_like(scale), None, "RoundToNearest")


def _refined(item: CalibratedLayer, weight: Tensor, start: LayerSolution) -> LayerSolution:
    scale, zero_point, grid = start.scale, start.zero_point[..., None], item.weight_grid
    for _ in range(ROUNDS):
        levels = quantize(weight, scale[..., None], zero_point, grid) - zero_point
        squares = levels.square().sum(dim=2)
        best = (levels * weight).sum(dim=2) / squares
        scale = torch.where((squares > 0) & (best > 0), best, scale)
    codes = quantize(weight, scale[..., None], zero_point, grid).to(torch.int16)
    return replace(start, codes=codes, scale=scale, solver="Table")


def _error(weight: Tensor, solution: LayerSolution) -> float:
    total = weight.square().sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    return float((weight - solution.weight()).square().sum(dtype=torch.float64) / total)

"""Round to nearest: the baseline that every other solver has to beat.

    q_j = clip(round(w_j / s_w) + z_w),    b' = b

Nothing is optimised but the steps, which a `Range` chooses for the weights and for the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subbyte.calibrate.problem import LayerProblem, LayerSolution, Solver
from subbyte.calibrate.steps import starting_activation, weight_step
from subbyte.quantizers.affine import quantize
from subbyte.quantizers.granularity import per_weight
from subbyte.quantizers.ranges import LeastOutputError, Range


@dataclass(frozen=True)
class RoundToNearest(Solver):
    """Plain rounding with steps from a range.

    Args:
        weight_range: chooses the interval of each output channel, or of each of its column groups.
        activation_range: chooses the input's interval.

    Source:
        Jacob et al. 2018 (arXiv 1712.05877).

    Example:
        >>> from subbyte.quantizers.ranges import MinMax
        >>> RoundToNearest(weight_range=MinMax(), activation_range=MinMax()).name
        'RoundToNearest'
    """

    weight_range: Range = LeastOutputError()
    activation_range: Range = LeastOutputError(count=24)

    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        """See `Solver`.

        Args:
            problem: the layer.
            generator: not used.
        """
        activation = starting_activation(problem, self.activation_range)
        importance = problem.once("second moments", (), lambda: problem.fit.inputs.square().mean(dim=1))
        grid = problem.weight_grid
        scale, zero_point = weight_step(problem.weight, importance, grid, self.weight_range)
        steps, zeros = (per_weight(values, grid.group, problem.unknowns) for values in (scale, zero_point))
        codes = quantize(problem.weight, steps, zeros, grid)
        return LayerSolution(codes.to(torch.int16), scale, zero_point, problem.bias, activation, self.name, grid.group)

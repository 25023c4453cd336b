"""The ridge of least squares: how strongly weights are pulled to the trained ones.

    H = Cov(x^, x^) + lambda d I,   w* = H^-1 (c + lambda d w)

Among a few, the ridge of `H` is the one whose codes have the least error on held-out rows, at 4 bits (`best_ridge`). Real weights do not
tell: they are the trained ones, or nearly, where the input stays in float32 or has 8 bits, whatever the ridge.

Where codes are fine, `w*` takes a larger ridge than `H` (`pull_of`): the codes leave little to correct, and least squares would rather
shrink weights against the rounding noise of its inputs. With weights and inputs of 8 bits that costs the network a seventh to a quarter of
its KL divergence (`studies/fine_ridge.py`), for at most 2 % of a layer's error. What has to be corrected, such as inputs that coarser
layers before have shrunk, shows in the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subbyte.calibrate.closest_point import error_feedback
from subbyte.calibrate.moments import Moments
from subbyte.calibrate.problem import LayerProblem, quantized_inputs
from subbyte.calibrate.steps import weight_step
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.ranges import Range

JUDGED = Grid(4, symmetric=True)  # by which a ridge is chosen, for all grids of the weights
JUDGED_OUTPUTS = 48  # output channels by which it is chosen, at most
HESSIAN_NUMBERS = 1 << 22  # of the ridges that are judged at once: small layers are many small steps
PRICE_OF_PULL = 1.02  # held-out error with a larger ridge of `w*`, at most, as a multiple of that without


class HeldOutObjective:
    """The objective of weights on held-out rows, for some of the output channels and with the bias that suits the weights.

    Args:
        problem: the layer.
        moments: of its quantized inputs and its targets.
        activation: step and zero-point of the input, `(s_x, z_x)`, float32 () and int32 (), or None.

    Attributes:
        some: the output channels that are judged.
    """

    def __init__(self, problem: LayerProblem, moments: Moments, activation: tuple[Tensor, Tensor] | None) -> None:
        self.problem, self.moments = problem, moments
        self._inputs = quantized_inputs(problem.held_out.inputs, activation, problem.activation_grid)
        self.some = slice(None, None, -(-problem.weight.shape[1] // JUDGED_OUTPUTS))
        self._targets = problem.clip(problem.held_out.targets)[..., self.some]

    def __call__(self, weight: Tensor) -> float:
        """Sum of squared errors of the outputs `some`, as clipped.

        Args:
            weight: of these outputs, float64 (G, some, n).
        """
        bias = self.moments.mean_y[:, self.some] - (weight @ self.moments.mean_x[..., None])[..., 0]
        outputs = torch.baddbmm(bias.float()[:, None, :], self._inputs, weight.float().mT)
        return float((self.problem.clip(outputs) - self._targets).square().sum())


def best_ridge(objective: HeldOutObjective, ridges: Sequence[float], interval: Range) -> float:
    """The ridge of `H` whose codes have the least error, at 4 bits, by error feedback from one step.

    Args:
        objective: of the layer.
        ridges: candidates for `lambda`.
        interval: what the step of the codes is chosen among.
    """
    if len(ridges) == 1:
        return ridges[0]
    groups, _, n = objective.problem.weight.shape
    together = max(1, HESSIAN_NUMBERS // (groups * n * n))
    errors: list[float] = []
    for start in range(0, len(ridges), together):
        solved = [least_squares(objective.moments, objective.problem.weight, ridge) for ridge in ridges[start : start + together]]
        hessian = torch.cat([one for one, _ in solved])  # as if each ridge were further groups
        optimum = torch.cat([weight[:, objective.some] for _, weight in solved])
        scale, zero = weight_step(optimum.float(), hessian.diagonal(dim1=1, dim2=2).float(), JUDGED, interval)
        low, high = JUDGED.ends(zero[..., None])
        codes = error_feedback(optimum, hessian, scale[..., None], low, high)
        errors += [objective(weight) for weight in (codes * scale[..., None]).double().split(groups)]
    return ridges[errors.index(min(errors))]


def pull_of(objective: HeldOutObjective, ridge: float, candidates: Sequence[float]) -> float:
    """The ridge of `w*`: the first candidate whose real weights do nearly as well as those with the ridge of `H`, or that itself.

    Args:
        objective: of the layer.
        ridge: `lambda` of `H`.
        candidates: for the `lambda` of `w*`, the largest first.

    Source:
        Hastie, Tibshirani, Friedman 2009, *The Elements of Statistical Learning*, 7.10: the rule of one standard error, here a fixed share.
    """
    larger = [pull for pull in candidates if pull > ridge]
    if not larger:
        return ridge

    def of_real(pull: float) -> float:
        return objective(least_squares(objective.moments, objective.problem.weight, pull)[1][:, objective.some])

    limit = PRICE_OF_PULL * of_real(ridge)
    return next((pull for pull in larger if of_real(pull) <= limit), ridge)


def least_squares(moments: Moments, weight: Tensor, ridge: float, pull: float | None = None) -> tuple[Tensor, Tensor]:
    """`H` with its ridge, and the real weights that minimise the objective, `w* = H^-1 (c + lambda d w)`.

    Args:
        moments: of the quantized inputs and the targets.
        weight: trained weight, float32 (G, O, n).
        ridge: `lambda` of `H`.
        pull: `lambda` of `w*`; None: the same.

    Returns:
        `H`, float64 (G, n, n), per row; `w*`, float64 (G, O, n).
    """
    plain = moments.xx / moments.count
    mean_diagonal = plain.diagonal(dim1=1, dim2=2).mean(dim=1)
    floor = mean_diagonal.mean().clamp(min=1e-30)
    # a group without any input keeps its weights
    unit = torch.where(mean_diagonal > 1e-6 * floor, mean_diagonal, floor)[:, None]
    pull = ridge if pull is None else pull
    hessian, pulled = (plain + torch.diag_embed((share * unit).expand(-1, plain.shape[1])) for share in (ridge, pull))
    right = moments.xy / moments.count + (pull * unit)[..., None] * weight.mT.double()
    optimum = torch.cholesky_solve(right, torch.linalg.cholesky(pulled)).mT
    return hessian, optimum

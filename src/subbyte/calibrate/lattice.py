"""Lattice: a layer's codes as the closest lattice point to its least-squares weights. The default solver.

For a fixed grid of the input, with `x^ = q(x')` and centred moments

    H = Cov(x^, x^) + lambda d I,   c = Cov(x^, y),   d = mean diag Cov(x^, x^)

the bias drops out (`b' = mean y - W^ mean x^`), the best real weights are `w* = H^-1 (c + lambda d w)`, and what remains for every output
channel is to find the codes `v` (zero-point subtracted) and the step `s` that minimise

    (w* - s v)^T H (w* - s v)

1. the step: the best of many clippings, weighted by `diag H`, and a few around it;
2. for each of them column by column with error feedback through the Cholesky factor of `H^-1`, largest `H_jj` first; every output channel
   keeps the step with the lowest objective;
3. coordinate descent: in every output channel the one code moves whose move lowers the objective most, until none does;
4. the step in closed form, `s = v^T H w* / v^T H v`; 3 and 4 repeat while codes move;
5. the input's step is searched again, now against the quantized weight, while the error on held-out rows falls.

The ridge `lambda` pulls directions that the rows do not determine back to the trained weights; among a few, the one is taken whose `w*` has
the least error on held-out rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subbyte.calibrate.moments import Moments, moments_of
from subbyte.calibrate.problem import LayerProblem, LayerSolution, Solver, quantized_inputs, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.calibrate.steps import activation_step, least_output_error, weight_step
from subbyte.errors import OptionError
from subbyte.quantizers.ranges import LeastOutputError, Range

COLUMN_BLOCK = 64
CHUNK_NUMBERS = 1 << 24  # numbers of all starts that are tried at once


@dataclass(frozen=True)
class Lattice(Solver):
    """Closest lattice point by error feedback and coordinate descent.

    Args:
        ridges: candidates for `lambda`, as shares of the mean of `diag H`; the one whose real weights do best on held-out rows is taken.
        weight_range: starting intervals of the weights' steps.
        activation_range: starting intervals of the input's step.
        step_ratios: steps to start from, as multiples of the one that step 1 finds.
        most_unknowns: layers with more weights in an output channel are left to plain rounding, since `H` has their square of numbers.
        rounds: how often steps 3 and 4 alternate, at most.
        activation_rounds: how often step 5 is tried, at most.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Error feedback: GPTQ (Frantar et al. 2022, arXiv 2210.17323), which is Babai's nearest plane (Chen et al. 2025, arXiv 2507.18553).
        Coordinate descent: CDQuant (Nair, Suggala 2024, arXiv 2406.17542). The objective: AdaQuant (Hubara et al., arXiv 2006.10518).

    Example:
        >>> Lattice(ridges=(0.1,)).name
        'Lattice'
    """

    ridges: tuple[float, ...] = (0.03, 0.3, 3.0)
    weight_range: Range = LeastOutputError()
    activation_range: Range = LeastOutputError(count=24)
    step_ratios: tuple[float, ...] = (1.0, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
    most_unknowns: int = 8192
    rounds: int = 4
    activation_rounds: int = 2

    def __post_init__(self) -> None:
        positive = all(number > 0 for number in (*self.ridges, *self.step_ratios))
        if not self.ridges or not self.step_ratios or not positive or self.rounds < 1 or self.activation_rounds < 0:
            wanted = "positive ridges and step_ratios, at least one round and no negative activation_rounds"
            raise OptionError(f"Lattice needs {wanted}, not {self}")

    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        """See `Solver`.

        Args:
            problem: the layer.
            generator: used by the searches for the input's step.
        """
        if problem.unknowns > self.most_unknowns:
            rounded = RoundToNearest(self.weight_range, self.activation_range).solve(problem, generator)
            return replace(rounded, solver=f"{rounded.solver} ({problem.unknowns} unknowns are too many for {self.name})")
        grid = problem.activation_grid
        activation: tuple[Tensor, Tensor] | None = None
        if grid is not None:
            activation = activation_step(problem.fit.inputs, problem.weight, grid, self.activation_range, generator)
        best = self._solve_weights(problem, activation, start=None)
        error = relative_error(problem, best, problem.held_out)
        for _ in range(self.activation_rounds if grid is not None else 0):
            trial = self._with_better_activation(problem, best, generator)
            trial_error = error if trial is best else relative_error(problem, trial, problem.held_out)
            if trial_error >= error:
                break
            best, error = trial, trial_error
        return best

    def _with_better_activation(self, problem: LayerProblem, best: LayerSolution, generator: torch.Generator) -> LayerSolution:
        """Step 5: search the input's step around the present one, then its zero-point, and adapt the codes; or `best` itself."""
        assert best.activation is not None and problem.activation_grid is not None
        activation, fit, weight = best.activation, problem.fit, best.weight()
        for nearby in (nearby_steps, nearby_zero_points):
            candidates = nearby(activation, problem.activation_grid.highest)
            activation = least_output_error(fit.inputs, fit.targets, weight, candidates, problem.activation_grid, generator)
        return best if activation is best.activation else self._solve_weights(problem, activation, start=best)

    def _solve_weights(self, problem: LayerProblem, activation: tuple[Tensor, Tensor] | None, start: LayerSolution | None) -> LayerSolution:
        """Steps 1 to 4 for a fixed grid of the input, from scratch or from the codes of an earlier solution."""
        moments = moments_of(quantized_inputs(problem.fit.inputs, activation, problem.activation_grid), problem.fit.targets)
        hessian, optimum = self._least_squares(problem, moments, activation)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        grid = problem.weight_grid
        if start is None:
            scale, zero = weight_step(optimum.float(), diagonal.float(), grid, self.weight_range)
            low, high = (grid.lowest - zero)[..., None].float(), (grid.highest - zero)[..., None].float()
            most = max(1, CHUNK_NUMBERS // (optimum.shape[2] * len(self.step_ratios)))
            parts = [value.split(most, dim=1) for value in (optimum, scale, low, high)]  # output channels are independent
            starts = [self._best_start(w, hessian, s, ends) for w, s, *ends in zip(*parts, strict=True)]
            scale, levels = torch.cat([s for s, _ in starts], dim=1), torch.cat([v for _, v in starts], dim=1)
        else:
            scale, zero = start.scale, start.zero_point
            low, high = (grid.lowest - zero)[..., None].float(), (grid.highest - zero)[..., None].float()
            levels = (start.codes - zero[..., None]).float()
        target, h = optimum.float(), hessian.float()
        for _ in range(self.rounds):
            levels, moved = coordinate_descent(levels, target, h, scale, low, high)
            scale = closed_form_step(levels, target, h, scale)
            if moved < 1e-3:
                break
        weight = levels * scale[..., None]
        bias = (moments.mean_y - (weight.double() @ moments.mean_x[..., None])[..., 0]).float()
        codes = (levels + zero[..., None]).to(torch.int16)
        return LayerSolution(codes, scale, zero, bias, activation, self.name)

    def _best_start(self, optimum: Tensor, hessian: Tensor, scale: Tensor, ends: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Step 2 for several steps at once, as if each were further output channels; the best step and its codes for each channel."""
        groups, outputs, n = optimum.shape
        count = len(self.step_ratios)
        steps = torch.cat([scale * ratio for ratio in self.step_ratios], dim=1)
        optima, low, high = (value.repeat(1, count, 1) for value in (optimum, *ends))
        levels = error_feedback(optima, hessian, steps, low, high)
        error = optima.float() - levels * steps[..., None]
        objective = ((error @ hessian.float()) * error).sum(dim=2).view(groups, count, outputs)
        best = objective.argmin(dim=1, keepdim=True)
        levels = levels.view(groups, count, outputs, n).gather(1, best[..., None].expand(-1, -1, -1, n))[:, 0]
        return steps.view(groups, count, outputs).gather(1, best)[:, 0], levels

    def _least_squares(self, problem: LayerProblem, moments: Moments, activation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """`H` and `w*` for the ridge whose real weights have the least error on held-out rows."""
        inputs = quantized_inputs(problem.held_out.inputs, activation, problem.activation_grid)
        best, least = None, torch.inf
        for ridge in self.ridges:
            hessian, optimum = least_squares(moments, problem.weight, ridge)
            bias = moments.mean_y - (optimum @ moments.mean_x[..., None])[..., 0]
            error = float((torch.baddbmm(bias.float()[:, None, :], inputs, optimum.float().mT) - problem.held_out.targets).square().sum())
            if best is None or error < least:
                best, least = (hessian, optimum), error
        assert best is not None
        return best


def nearby_steps(activation: tuple[Tensor, Tensor], highest: int) -> list[tuple[Tensor, Tensor]]:
    """A step and others around it, the given one first.

    Args:
        activation: `(s_x, z_x)`, float32 () and int32 ().
        highest: largest code of the input's grid.
    """
    scale, zero = activation
    return [activation] + [(scale * ratio, zero) for ratio in (0.85, 0.9, 0.93, 0.96, 0.98, 1.02, 1.04, 1.07, 1.1, 1.15)]


def nearby_zero_points(activation: tuple[Tensor, Tensor], highest: int) -> list[tuple[Tensor, Tensor]]:
    """A zero-point and those beside it, the given one first; one at an end of the grid (an input without negative values) stays alone.

    Args:
        activation: `(s_x, z_x)`, float32 () and int32 ().
        highest: largest code of the input's grid.
    """
    scale, zero = activation
    return [activation, (scale, zero - 1), (scale, zero + 1)] if 0 < int(zero) < highest else [activation]


def least_squares(moments: Moments, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """`H` with its ridge, and the real weights that minimise the objective, `w* = H^-1 (c + lambda d w)`.

    Args:
        moments: of the quantized inputs and the targets.
        weight: trained weight, float32 (G, O, n).
        ridge: `lambda`.

    Returns:
        `H`, float64 (G, n, n), per row; `w*`, float64 (G, O, n).
    """
    hessian = moments.xx / moments.count
    mean_diagonal = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
    floor = mean_diagonal.mean().clamp(min=1e-30)
    # a group without any input keeps its weights
    damping = ridge * torch.where(mean_diagonal > 1e-6 * floor, mean_diagonal, floor)[:, None]
    hessian = hessian + torch.diag_embed(damping.expand(-1, hessian.shape[1]))
    right = moments.xy / moments.count + damping[..., None] * weight.mT.double()
    optimum = torch.cholesky_solve(right, torch.linalg.cholesky(hessian)).mT
    return hessian, optimum


def error_feedback(optimum: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes column by column: each is rounded, and its error is passed on to the columns that are still free.

    With `U` the upper Cholesky factor of `H^-1`: `v_j = clip(round(w_j / s))`, `w_k -= (w_j - s v_j) U_jk / U_jj` for `k > j`.

    Args:
        optimum: `w*`, float64 (G, O, n).
        hessian: `H`, float64 (G, n, n), positive definite.
        scale: `s`, float32 (G, O).
        low: smallest code, zero-point subtracted, float32 (G, O, 1).
        high: largest code, likewise, float32 (G, O, 1).

    Returns:
        Codes `v`, zero-point subtracted, float32 (G, O, n), integer-valued.

    Source:
        GPTQ (Frantar et al. 2022, arXiv 2210.17323), algorithm 1; the order by decreasing `H_jj` is its "act-order".
    """
    groups, outputs, n = optimum.shape
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    sorted_hessian = hessian.gather(1, order[:, :, None].expand(-1, -1, n)).gather(2, order[:, None, :].expand(-1, n, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    factor = (factor / factor.diagonal(dim1=1, dim2=2)[:, :, None]).float().contiguous()
    rest = optimum.gather(2, order[:, None, :].expand(-1, outputs, -1)).float().permute(2, 0, 1).contiguous()  # (n, G, O): columns are rows
    levels = torch.empty_like(rest)
    low, high = low[..., 0], high[..., 0]
    for start in range(0, n, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, n)
        errors = torch.empty_like(rest[start:end])
        for j in range(start, end):
            level = torch.clamp(torch.round(rest[j] / scale), low, high)
            levels[j] = level
            error = torch.addcmul(rest[j], level, scale, value=-1, out=errors[j - start])
            if j + 1 < end:
                rest[j + 1 : end] -= factor[:, j, j + 1 : end].T[:, :, None] * error
        if end < n:  # lazily: what the block's errors mean for all columns behind it
            rest[end:] -= torch.einsum("gjk,jgo->kgo", factor[:, start:end, end:], errors)
    back = order.argsort(dim=1)
    return levels.permute(1, 2, 0).gather(2, back[:, None, :].expand(-1, outputs, -1))


def coordinate_descent(levels: Tensor, optimum: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, float]:
    """Lower `(w* - s v)^T H (w* - s v)` by single codes: in every output channel the best move of all, until none lowers it.

    Moving code `j` by `t` steps changes the objective by `t^2 s^2 H_jj - 2 t s g_j` with `g = H (w* - s v)`; the best whole `t` inside the
    grid is `round(g_j / (s H_jj))`, clipped.

    Args:
        levels: codes `v`, zero-point subtracted, float32 (G, O, n); unchanged.
        optimum: `w*`, float32 (G, O, n).
        hessian: `H`, float32 (G, n, n).
        scale: `s`, float32 (G, O).
        low: smallest code, zero-point subtracted, float32 (G, O, 1).
        high: largest code, likewise, float32 (G, O, 1).

    Returns:
        The new codes, and the share of all codes that moved.

    Source:
        CDQuant (Nair, Suggala 2024, arXiv 2406.17542), its greedy variant.
    """
    before = levels
    groups, outputs, n = levels.shape
    levels = levels.reshape(-1, n).clone()
    step = scale.reshape(-1, 1)
    low, high = low.reshape(-1, 1), high.reshape(-1, 1)
    group = torch.arange(groups, device=levels.device).repeat_interleave(outputs)
    gradient = ((optimum - before * scale[..., None]) @ hessian).reshape(-1, n)
    diagonal = hessian.diagonal(dim1=1, dim2=2)[group]
    curvature = step.square() * diagonal
    slope = gradient * step
    active = torch.arange(len(levels), device=levels.device)
    done = torch.empty_like(levels)
    for _ in range(4 * n):
        move = (torch.clamp(levels + torch.round(slope / curvature), low, high)) - levels
        gain = move * (2 * slope - move * curvature)
        best, at = gain.max(dim=1)
        going = best > 1e-6 * (curvature.gather(1, at[:, None])[:, 0])
        if not bool(going.all()):
            done[active] = levels
            if not bool(going.any()):
                break
            keep = torch.nonzero(going)[:, 0]
            active, group, step, low, high = active[keep], group[keep], step[keep], low[keep], high[keep]
            levels, slope, curvature, move, at = levels[keep], slope[keep], curvature[keep], move[keep], at[keep]
        taken = move.gather(1, at[:, None])
        levels.scatter_add_(1, at[:, None], taken)
        slope -= taken * step.square() * hessian[group, at]
    else:
        done[active] = levels
    result = done.view(groups, outputs, n)
    return result, float((result != before).float().mean())


def closed_form_step(levels: Tensor, optimum: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """The step that fits given codes best, `s = v^T H w* / v^T H v`; the old one where that is not positive.

    Args:
        levels: codes `v`, zero-point subtracted, float32 (G, O, n).
        optimum: `w*`, float32 (G, O, n).
        hessian: `H`, float32 (G, n, n).
        scale: the old `s`, float32 (G, O).
    """
    product = levels @ hessian
    above, below = (product * optimum).sum(dim=2), (product * levels).sum(dim=2)
    fitted = above / below.clamp(min=torch.finfo(below.dtype).tiny)
    return torch.where((below > 0) & (fitted > 0), fitted, scale)

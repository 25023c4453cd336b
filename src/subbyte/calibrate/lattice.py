"""Lattice: a layer's codes as the closest lattice point to its least-squares weights. The default solver.

For a fixed grid of the input, with `x^ = q(x')` and centred moments

    H = Cov(x^, x^) + lambda d I,   c = Cov(x^, y),   d = mean diag Cov(x^, x^)

the bias drops out (`b' = mean y - W^ mean x^`), the best real weights are `w* = H^-1 (c + lambda d w)`, and what remains for every output
channel is to find the codes `v` (zero-point subtracted) and the step `s` (or one for each column group) that minimise

    (w* - s v)^T H (w* - s v)

1. the step and zero-point, of each output channel or of each of its column groups: the best of many clippings, weighted by `diag H`, and
   some around it, the same multiples in all groups of a channel;
2. for each of them column by column with error feedback through the Cholesky factor of `H^-1`, largest `H_jj` first; every output channel
   keeps the step and zero-point with the lowest objective;
3. coordinate descent: in every output channel the one code moves whose move lowers the objective most, until none does;
4. the step in closed form, `s = v^T H w* / v^T H v`, the steps of a channel's groups together; 3 and 4 repeat while codes move;
5. the input's step, until now the best for the trained weight, is searched again against the quantized one; where another promises a
   hundredth less error, 3 and 4 are done again with it, while the error on held-out rows falls;
6. where a ReLU or the like follows, 3 and 4 again for targets that ask nothing of outputs that it clips, while the held-out error falls.

With few unknowns (a depthwise convolution) a tree search takes the place of 2 and 3, and finds the very closest point nearly always. It
starts from many more steps: what `diag H` says of the best one is far off where inputs go together; few weights do not average that out.

The ridge `lambda` pulls directions that the rows do not determine back to the trained weights; `calibrate.ridge` says how it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subbyte.calibrate.closest_point import closed_form_step, coordinate_descent, error_feedback, tree_search
from subbyte.calibrate.moments import Moments, moments_of
from subbyte.calibrate.problem import LayerProblem, LayerSolution, Rows, Solver, quantized_inputs, relative_error
from subbyte.calibrate.ridge import HeldOutObjective, best_ridge, least_squares, pull_of
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.calibrate.steps import least_output_error, starting_activation, weight_step
from subbyte.errors import OptionError
from subbyte.quantizers.granularity import per_weight
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.ranges import LeastOutputError, Range

CHUNK_NUMBERS = 1 << 24  # numbers of all starts that are tried at once
LEAST_GAIN = 0.01  # in the error of some rows, by which another step of the input has to be better to be tried
FINE_BITS = 6  # weights with as many bits may take a larger ridge


@dataclass(frozen=True)
class Lattice(Solver):
    """Closest lattice point by error feedback and coordinate descent.

    Args:
        ridges: candidates for `lambda`, as shares of the mean of `diag H`; the one whose 4-bit codes do best on held-out rows is
            taken.
        fine_ridges: candidates for a larger `lambda` of `w*`, but not of `H`, where weights have 6 bits or more, the largest first; the
            first whose real weights do nearly as well on held-out rows is taken.
        weight_range: starting intervals of the weights' steps.
        activation_range: starting intervals of the input's step.
        step_ratios: steps to start from, as multiples of the one that step 1 finds; drafts take every eighth.
        shifted_ratios: likewise with the zero-point one lower and one higher, where weights have zero-points.
        most_unknowns: layers with more weights in an output channel are left to plain rounding, since `H` has their square of numbers.
        rounds: how often steps 3 and 4 alternate, at most; 0 leaves the codes as step 2 found them.
        activation_rounds: how often step 5 is tried, at most; 0: the input's step is the best of `activation_range`, as it is.
        clip_rounds: how often step 6 is tried, at most.
        searched_unknowns: layers with no more weights in an output channel are searched for the very closest point.
        searched_ratios: steps to start from there, in place of `step_ratios`; drafts take every sixth.
        search_paths: partial codes that such a search keeps; half as many for each of the steps to start from.

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
    fine_ridges: tuple[float, ...] = (30.0, 3.0)
    weight_range: Range = LeastOutputError()
    activation_range: Range = LeastOutputError(count=24)
    step_ratios: tuple[float, ...] = tuple((60 + k) / 60 for k in (0, *range(-12, 0), *range(1, 13)))
    shifted_ratios: tuple[float, ...] = (1.0, 0.9, 1.1)
    most_unknowns: int = 8192
    rounds: int = 4
    activation_rounds: int = 2
    clip_rounds: int = 0
    searched_unknowns: int = 16
    searched_ratios: tuple[float, ...] = tuple(2 ** (k / 30) for k in range(-30, 31))
    search_paths: int = 8

    def __post_init__(self) -> None:
        numbers = (*self.ridges, *self.fine_ridges, *self.step_ratios, *self.searched_ratios, *self.shifted_ratios)
        positive = all(number > 0 for number in numbers)
        counts = self.search_paths >= 1 and min(self.rounds, self.activation_rounds, self.clip_rounds, self.searched_unknowns) >= 0
        if not self.ridges or not self.step_ratios or not self.searched_ratios or not positive or not counts:
            wanted = "positive ridges, ratios and search_paths and no negative count"
            raise OptionError(f"Lattice needs {wanted}, not {self}")

    @classmethod
    def columns(cls) -> Lattice:
        """Error feedback alone, column by column: GPTQ's part of Lattice, for comparison.

        One step for all columns of a group, known before the first code; no descent, no other starts, no search of the input's step. As in
        GPTQ, 0.01 of the mean of `diag H` is added to it. Unlike there, the bias makes good for the mean error, and steps are the best of
        many clippings.

        Source:
            Frantar et al. 2022 (arXiv 2210.17323), with "act-order" and "static groups".

        Example:
            >>> Lattice.columns().rounds
            0
        """
        alone = cls(rounds=0, activation_rounds=0, clip_rounds=0, searched_unknowns=0)
        return replace(alone, ridges=(0.01,), fine_ridges=(), step_ratios=(1.0,), shifted_ratios=())

    @property
    def draft(self) -> Lattice:
        """See `Solver`: a few starts, one round, no search of the input's step."""
        return replace(
            self,
            step_ratios=self.step_ratios[::8],
            shifted_ratios=self.shifted_ratios[:1],
            searched_ratios=self.searched_ratios[::6],
            rounds=min(self.rounds, 1),
            activation_rounds=0,
            clip_rounds=0,
            search_paths=-(-self.search_paths // 2),
        )

    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        """See `Solver`.

        Args:
            problem: the layer.
            generator: handed to `RoundToNearest` where a layer is too large.
        """
        if problem.unknowns > self.most_unknowns:
            rounded = RoundToNearest(self.weight_range, self.activation_range).solve(problem, generator)
            return replace(rounded, solver=f"{rounded.solver} ({problem.unknowns} unknowns are too many for {self.name})")
        activation = self._starting_activation(problem)
        best, error = self._from_scratch(problem, activation), None
        improve = [self._with_better_activation] * (self.activation_rounds if activation is not None else 0)
        improve += [self._for_what_is_read] * (self.clip_rounds if problem.clip else 0)
        stuck = None
        for step in improve:
            if step == stuck:
                continue
            trial, stuck = step(problem, best), step
            if trial is best:
                continue
            error = relative_error(problem, best, problem.held_out) if error is None else error
            trial_error = relative_error(problem, trial, problem.held_out)
            if trial_error < error:
                best, error, stuck = trial, trial_error, None
        return best

    def _starting_activation(self, problem: LayerProblem) -> tuple[Tensor, Tensor] | None:
        """The best of the range for the trained weights, and of what is near it where the input's step is searched at all: the better it
        suits these, the fewer grids of the weights ask for another, which needs moments of its own."""
        coarse, grid = starting_activation(problem, self.activation_range), problem.activation_grid
        if coarse is None or grid is None or not self.activation_rounds:
            return coarse
        key = (grid, self.activation_range)
        return problem.once("nearby activation", key, lambda: self._near(problem, coarse, grid))

    @staticmethod
    def _near(problem: LayerProblem, activation: tuple[Tensor, Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
        for nearby in (nearby_steps, nearby_zero_points):
            activation = least_output_error(problem.fit.inputs, None, problem.weight, nearby(activation, grid.highest), grid)
        return activation

    def _from_scratch(self, problem: LayerProblem, activation: tuple[Tensor, Tensor] | None) -> LayerSolution:
        """Steps 1 to 4 for a fixed grid of the input."""
        step = None if activation is None else (float(activation[0]), int(activation[1]))
        key = (problem.activation_grid, step, self.ridges)
        ridge = problem.once("ridge", key, lambda: self._ridge(problem, activation))
        normal = problem.once("normal equations", (*key, self._fine_ridges(problem)), lambda: self._normal_equations(problem, *ridge))
        _, hessian, optimum = normal
        grid, diagonal = problem.weight_grid, hessian.diagonal(dim1=1, dim2=2)
        scale, zero = weight_step(optimum.float(), diagonal.float(), grid, self.weight_range)
        around = self._starts(grid, problem.unknowns)
        most = max(1, CHUNK_NUMBERS // (optimum.shape[2] * len(around)))
        parts = zip(*(value.split(most, dim=1) for value in (optimum, scale, zero)), strict=True)  # output channels are independent
        starts = [self._best_start(w, hessian, s, z, grid, around) for w, s, z in parts]
        scale, zero, levels = (torch.cat(values, dim=1) for values in zip(*starts, strict=True))
        return self._descended(problem, normal, (scale, zero, levels), activation)

    def _ridge(self, problem: LayerProblem, activation: tuple[Tensor, Tensor] | None) -> tuple[HeldOutObjective, float]:
        """Moments with what judges weights, and the ridge of `H`: nothing here depends on the grid of the weights."""
        moments = moments_of(quantized_inputs(problem.fit.inputs, activation, problem.activation_grid), problem.fit.targets)
        objective = HeldOutObjective(problem, moments, activation)
        return objective, best_ridge(objective, self.ridges, self.weight_range)

    def _normal_equations(self, problem: LayerProblem, objective: HeldOutObjective, ridge: float) -> tuple[Moments, Tensor, Tensor]:
        """Moments, `H` and `w*`: of the weights' grid it only matters whether it is fine."""
        pull = pull_of(objective, ridge, self._fine_ridges(problem))
        return objective.moments, *least_squares(objective.moments, problem.weight, ridge, pull)

    def _fine_ridges(self, problem: LayerProblem) -> tuple[float, ...]:
        return self.fine_ridges if problem.weight_grid.bits >= FINE_BITS else ()

    def _with_better_activation(self, problem: LayerProblem, best: LayerSolution) -> LayerSolution:
        """Step 5: search the input's step around the present one, then its zero-point, and adapt the codes; or `best` itself."""
        assert best.activation is not None and problem.activation_grid is not None
        activation, fit, weight = best.activation, problem.fit, best.weight()
        for nearby in (nearby_steps, nearby_zero_points):
            candidates = nearby(activation, problem.activation_grid.highest)
            activation = least_output_error(fit.inputs, fit.targets, weight, candidates, problem.activation_grid, LEAST_GAIN)
        return best if activation is best.activation else self._from(replace(best, activation=activation), problem)

    def _for_what_is_read(self, problem: LayerProblem, best: LayerSolution) -> LayerSolution:
        """Step 6: adapt the codes to targets that ask nothing of outputs that are clipped."""
        return self._from(best, read_only(problem, best))

    def _from(self, start: LayerSolution, problem: LayerProblem) -> LayerSolution:
        """Steps 3 and 4 from the codes and the input's grid of an earlier solution."""
        levels = (start.codes - start.per_weight(start.zero_point)).float()
        normal = self._normal_equations(problem, *self._ridge(problem, start.activation))
        return self._descended(problem, normal, (start.scale, start.zero_point, levels), start.activation)

    def _descended(
        self,
        problem: LayerProblem,
        normal: tuple[Moments, Tensor, Tensor],
        start: tuple[Tensor, Tensor, Tensor],
        activation: tuple[Tensor, Tensor] | None,
    ) -> LayerSolution:
        """Steps 3 and 4, for moments, `H` and `w*`, from a step, a zero-point and codes."""
        (moments, hessian, optimum), (scale, zero, levels) = normal, start
        group, n = problem.weight_grid.group, problem.unknowns
        zeros, steps = per_weight(zero, group, n), per_weight(scale, group, n)
        low, high = problem.weight_grid.ends(zeros)
        target, h = optimum.float(), hessian.float()
        for done in range(self.rounds):
            if n <= self.searched_unknowns:
                found, _ = tree_search(optimum, hessian, steps, low, high, self.search_paths)
                moved, levels = float((found != levels).float().mean()), found
            else:
                levels, moved = coordinate_descent(levels, target, h, steps, low, high)
            scale = closed_form_step(levels, target, h, scale, group)
            steps = per_weight(scale, group, n)
            if done and moved < 1e-3:  # the first round sees the step that its codes were found for
                break
        weight = levels * steps
        bias = (moments.mean_y - (weight.double() @ moments.mean_x[..., None])[..., 0]).float()
        codes = (levels + zeros).to(torch.int16)
        return LayerSolution(codes, scale, zero, bias, activation, self.name, group)

    def _starts(self, grid: Grid, unknowns: int) -> list[tuple[float, int]]:
        """Step 1's neighbours: factors of the step, and what is added to the zero-point."""
        starts = [(ratio, 0) for ratio in (self.searched_ratios if unknowns <= self.searched_unknowns else self.step_ratios)]
        return starts if grid.symmetric else starts + [(ratio, shift) for shift in (-1, 1) for ratio in self.shifted_ratios]

    def _best_start(
        self, optimum: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, grid: Grid, starts: Sequence[tuple[float, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step 2 for several steps and zero-points at once, as if each were further output channels; the best for each channel."""
        groups, outputs, n = optimum.shape
        steps = torch.cat([scale * ratio for ratio, _ in starts], dim=1)
        zeros = torch.cat([(zero + shift).clamp(grid.lowest, grid.highest) for _, shift in starts], dim=1)
        low, high = grid.ends(per_weight(zeros, grid.group, n))
        wide = per_weight(steps, grid.group, n)
        optima = optimum.repeat(1, len(starts), 1)
        if n <= self.searched_unknowns:
            levels, _ = tree_search(optima, hessian, wide, low, high, -(-self.search_paths // 2))
        else:
            levels = error_feedback(optima, hessian, wide, low, high)
        error = optima.float() - levels * wide
        objective = ((error @ hessian.float()) * error).sum(dim=2).view(groups, len(starts), outputs)
        best = objective.argmin(dim=1, keepdim=True)

        def of_best(values: Tensor) -> Tensor:
            each = values.view(groups, len(starts), outputs, -1)
            return each.gather(1, best[..., None].expand(-1, -1, -1, each.shape[3]))[:, 0]

        return of_best(steps).view(scale.shape), of_best(zeros).view(zero.shape), of_best(levels)


def read_only(problem: LayerProblem, solution: LayerSolution) -> LayerProblem:
    """The same problem with targets that ask nothing of outputs that are clipped anyway.

    Where the float layer's output is clipped, the target is what the solution gives, as far as that is clipped too. For these targets the
    squared error touches that behind the clip at the solution and is nowhere below it: lowering the one lowers the other.

    Args:
        problem: the layer.
        solution: where the two errors touch; tensors as its docstring says.
    """
    clip, fit = problem.clip, problem.fit
    inputs = quantized_inputs(fit.inputs, solution.activation, problem.activation_grid)
    given = torch.baddbmm(solution.bias[:, None, :], inputs, solution.weight().mT)
    targets = torch.where(fit.targets <= clip.low, given.clamp(max=clip.low), fit.targets)
    targets = torch.where(fit.targets >= clip.high, given.clamp(min=clip.high), targets)
    return replace(problem, fit=Rows(fit.inputs, targets))


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

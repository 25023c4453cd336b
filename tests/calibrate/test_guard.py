"""A solution is kept only if it wins on rows that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from subbyte.calibrate.guard import solve_guarded
from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.problem import LayerProblem, LayerSolution, Rows, Solver, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.quantizers.affine import quantize

MakeProblem = Callable[..., LayerProblem]


@dataclass(frozen=True)
class Shifted(Solver):
    """Plain rounding with a bias that is wrong by a constant."""

    by: float

    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        solution = RoundToNearest().solve(problem, generator)
        return replace(solution, bias=solution.bias + self.by, solver=self.name)


def judge(problem: LayerProblem, solver: Solver, baseline: Solver):  # type: ignore[no-untyped-def]
    return solve_guarded(problem, solver, baseline, torch.Generator().manual_seed(0))


def test_a_worse_solution_is_rejected(make_problem: MakeProblem) -> None:
    judged = judge(make_problem(), Shifted(5.0), RoundToNearest())
    assert judged.rejected and judged.solution is judged.baseline
    assert judged.solution.solver == "RoundToNearest"
    assert judged.error > judged.baseline_error


def test_a_better_solution_is_kept(make_problem: MakeProblem) -> None:
    judged = judge(make_problem(), RoundToNearest(), Shifted(5.0))
    assert not judged.rejected and judged.solution.solver == "RoundToNearest"
    assert judged.error < judged.baseline_error


def test_an_equal_solution_does_not_count_as_a_win(make_problem: MakeProblem) -> None:
    judged = judge(make_problem(activation_grid=None), RoundToNearest(), RoundToNearest())
    assert judged.rejected and judged.error == judged.baseline_error


def test_a_solution_that_is_not_finite_is_rejected(make_problem: MakeProblem) -> None:
    assert judge(make_problem(), Shifted(float("nan")), RoundToNearest()).rejected
    assert judge(make_problem(), Shifted(float("inf")), RoundToNearest()).rejected


def test_held_out_rows_judge_and_not_those_fitted_on(make_problem: MakeProblem) -> None:
    problem = make_problem()
    elsewhere = replace(problem, held_out=Rows(problem.held_out.inputs, problem.held_out.targets + 5.0))
    assert not judge(elsewhere, Shifted(5.0), RoundToNearest()).rejected


def test_what_is_judged_is_counted(make_problem: MakeProblem) -> None:
    judged = judge(make_problem(unknowns=7, rows=20), RoundToNearest(), RoundToNearest())
    assert (judged.unknowns, judged.equations) == (7, 20)


def test_relative_error_is_its_definition(make_problem: MakeProblem) -> None:
    problem = make_problem(groups=2, outputs=3, unknowns=5)
    solution = RoundToNearest().solve(problem, torch.Generator().manual_seed(0))
    assert solution.activation is not None and problem.activation_grid is not None
    scale, zero_point = solution.activation
    total = spread = 0.0
    for group in range(2):
        x, y = problem.held_out.inputs[group].double(), problem.held_out.targets[group].double()
        codes = quantize(x.float(), scale, zero_point, problem.activation_grid).double()
        given = (codes - zero_point) * scale.double() @ solution.weight()[group].double().T + solution.bias[group]
        total += float((y - given).square().sum())
        spread += float((y - y.mean(dim=0)).square().sum())
    assert relative_error(problem, solution, problem.held_out) == pytest.approx(total / spread, rel=1e-3)


def test_relative_error_without_spread_is_the_plain_sum(make_problem: MakeProblem) -> None:
    problem = make_problem(activation_grid=None)
    solution = RoundToNearest().solve(problem, torch.Generator().manual_seed(0))
    rows = Rows(torch.zeros(1, 4, 12), torch.zeros(1, 4, 6))
    assert relative_error(problem, solution, rows) == pytest.approx(4 * float(solution.bias.square().sum()), rel=1e-5)


def test_the_gap_is_told_where_a_layer_has_fewer_equations_than_weights(make_problem: MakeProblem) -> None:
    poor = make_problem(unknowns=64, rows=40)
    judged = judge(poor, Lattice(), RoundToNearest())
    errors = [relative_error(poor, judged.solution, rows) for rows in (poor.held_out, poor.fit)]
    assert judged.gap == errors[0] / errors[1] > 1.2
    assert judge(make_problem(), Lattice(), RoundToNearest()).gap == 1.0

"""The parameters that AdaQuant, Blockwise and Networkwise move: where they start, and what moving one of them does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from subbyte.calibrate.adaquant import AdaQuant
from subbyte.calibrate.joint import JointParameters, half_cosine
from subbyte.calibrate.problem import LayerProblem, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.quantizers.grid import Grid

MakeProblem = Callable[..., LayerProblem]
GRIDS = [(Grid(4, symmetric=True), Grid(4)), (Grid(3), Grid(8)), (Grid(2, symmetric=True), None)]


def parameters(problem: LayerProblem, *, relative: bool = True) -> JointParameters:
    start = RoundToNearest().solve(problem, torch.Generator().manual_seed(0))
    spread = problem.fit.targets.std(dim=1)
    return JointParameters(start, problem.weight, spread, problem.weight_grid, problem.activation_grid, relative=relative)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_they_start_at_the_solution(grids: tuple[Grid, Grid | None], relative: bool, make_problem: MakeProblem) -> None:
    problem = make_problem(groups=2, weight_grid=grids[0], activation_grid=grids[1])
    state = parameters(problem, relative=relative)
    found = state.solution("x")
    assert torch.equal(found.codes, state.start.codes)
    torch.testing.assert_close(found.scale, state.start.scale)
    torch.testing.assert_close(found.bias, state.start.bias)
    torch.testing.assert_close(state.weight(), state.start.weight())
    assert (found.activation is None) == (grids[1] is None)


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_a_moving_step_keeps_every_code(grids: tuple[Grid, Grid | None], make_problem: MakeProblem) -> None:
    state = parameters(make_problem(weight_grid=grids[0], activation_grid=grids[1]))
    with torch.no_grad():
        state.raw_weight_step += 0.3
    found = state.solution("x")
    assert torch.equal(found.codes, state.start.codes)
    torch.testing.assert_close(found.scale, state.start.scale * torch.tensor(0.3).exp())
    torch.testing.assert_close(state.weight(), found.weight())


def test_the_gradient_of_a_step_is_the_objective_s_for_fixed_codes(make_problem: MakeProblem) -> None:
    state = parameters(make_problem())
    (gradient,) = torch.autograd.grad(state.weight().sum(), state.raw_weight_step)
    torch.testing.assert_close(gradient, state.start.weight().sum(dim=2))


def test_a_weight_moves_to_the_next_code_within_half_a_step(make_problem: MakeProblem) -> None:
    state = parameters(make_problem(weight_grid=Grid(8, symmetric=True)))
    with torch.no_grad():
        state.raw_weight += 1.0
    moved = state.solution("x").codes - state.start.codes
    assert ((moved == 1) | (state.start.codes == 127)).all()


def test_rates_fall_from_one_to_nothing() -> None:
    shares = [half_cosine(k / 10) for k in range(11)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and abs(shares[-1]) < 1e-12


def test_a_channel_that_never_varies_does_not_keep_the_others_from_moving(make_problem: MakeProblem) -> None:
    problem = make_problem(weight_grid=Grid(3, symmetric=True), change=lambda _, weight: weight[:, 0].zero_())
    problem.bias[0, 0] = 8.0  # far more than the smallest float32 number, by which it was divided
    for rows in (problem.fit, problem.held_out):
        rows.targets[0, :, 0] = 8.0
    assert parameters(problem).raw_bias.isfinite().all()
    start, found = (solver.solve(problem, torch.Generator().manual_seed(0)) for solver in (RoundToNearest(), AdaQuant()))
    assert relative_error(problem, found, problem.held_out) < 0.95 * relative_error(problem, start, problem.held_out)

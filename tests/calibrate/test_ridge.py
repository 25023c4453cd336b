"""The ridge of least squares, and how it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.moments import moments_of
from subbyte.calibrate.problem import LayerProblem, Rows, relative_error
from subbyte.calibrate.ridge import HeldOutObjective, least_squares, pull_of
from subbyte.quantizers.grid import Grid

MakeProblem = Callable[..., LayerProblem]


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), st.sampled_from((0.0, 0.01, 1.0)), st.integers(0, 10**6)
)
def test_least_squares_solves_the_normal_equations(groups: int, outputs: int, n: int, rows: int, ridge: float, seed: int) -> None:
    if ridge == 0.0:
        rows += 2 * n + 2  # without a ridge the rows have to determine the weights
    chance = torch.Generator().manual_seed(seed)
    x, y = torch.randn(groups, rows, n, generator=chance) + 1, torch.randn(groups, rows, outputs, generator=chance)
    weight = torch.randn(groups, outputs, n, generator=chance)
    x = x * torch.rand(groups, 1, 1, generator=chance).add(0.1)
    hessian, optimum = least_squares(moments_of(x, y), weight, ridge)
    centred = x.double() - x.double().mean(dim=1, keepdim=True)
    covariance = centred.mT @ centred / rows
    d = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
    if rows == 1:
        return  # no covariance: every ridge is arbitrary
    expected = covariance + ridge * d[:, None, None] * torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-6)
    right = centred.mT @ (y.double() - y.double().mean(dim=1, keepdim=True)) / rows + ridge * d[:, None, None] * weight.mT.double()
    torch.testing.assert_close(expected @ optimum.mT, right, rtol=1e-3, atol=1e-4)


def test_the_ridge_keeps_weights_that_no_row_determines() -> None:
    x, weight = torch.randn(1, 50, 4), torch.randn(1, 3, 4)
    x[..., 2] = 0
    _, optimum = least_squares(moments_of(x, torch.randn(1, 50, 3)), weight, 0.01)
    torch.testing.assert_close(optimum[..., 2].float(), weight[..., 2])


def test_a_pull_leaves_the_hessian_and_draws_weights_to_the_trained_ones() -> None:
    x, weight = torch.randn(2, 50, 4), torch.randn(2, 3, 4)
    moments = moments_of(x, torch.randn(2, 50, 3))
    (hessian, optimum), (same, pulled) = least_squares(moments, weight, 0.01), least_squares(moments, weight, 0.01, pull=3.0)
    torch.testing.assert_close(same, hessian, rtol=0, atol=0)
    torch.testing.assert_close(pulled, least_squares(moments, weight, 3.0)[1])
    assert float((pulled.float() - weight).norm()) < float((optimum.float() - weight).norm())


@pytest.mark.parametrize(("bits", "matters"), [(5, False), (6, True), (8, True)])
def test_weights_of_six_bits_or_more_are_pulled(bits: int, matters: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 300, 12, generator=chance), torch.randn(1, 5, 12, generator=chance)
    targets = x @ weight.mT + torch.randn(1, 300, 5, generator=chance)
    fit, held_out = Rows(x[:, :250], targets[:, :250]), Rows(x[:, 250:], targets[:, 250:])

    def error(solver: Lattice) -> float:
        problem = LayerProblem("fc", weight, torch.zeros(1, 5), fit, held_out, Grid(bits, symmetric=True), Grid(8), 250)
        return relative_error(problem, solver.solve(problem, torch.Generator()), held_out)

    pulled, free = error(Lattice(ridges=(0.03,))), error(Lattice(ridges=(0.03,), fine_ridges=()))
    assert pulled < free if matters else pulled == free


def test_a_group_without_any_input_keeps_its_weights() -> None:
    x, weight = torch.randn(2, 50, 4), torch.randn(2, 3, 4)
    x[0] = 0
    _, optimum = least_squares(moments_of(x, torch.randn(2, 50, 3)), weight, 0.01)
    torch.testing.assert_close(optimum[0].float(), weight[0])


def test_the_ridge_that_suits_unseen_rows_is_taken(make_problem: MakeProblem) -> None:
    """As many rows as unknowns and noise in the targets: without a ridge the fit follows the noise."""
    problem = make_problem(unknowns=40, rows=60, weight_grid=Grid(8, symmetric=True), activation_grid=None)
    noisy = replace(problem, fit=Rows(problem.fit.inputs, problem.fit.targets + torch.randn(1, 60, 6)))
    errors = {
        ridges: relative_error(noisy, Lattice(ridges, fine_ridges=()).solve(noisy, torch.Generator().manual_seed(0)), noisy.held_out)
        for ridges in ((1e-6,), (30.0,), (1e-6, 30.0), (30.0, 1e-6))
    }
    assert errors[30.0,] < 0.5 * errors[1e-6,]
    assert errors[1e-6, 30.0] == errors[30.0, 1e-6] == errors[30.0,]


@pytest.mark.parametrize("shrunk", [False, True])
def test_a_pull_is_taken_only_where_it_costs_the_layer_hardly_anything(make_problem: MakeProblem, shrunk: bool) -> None:
    problem = make_problem(rows=2000, weight_grid=Grid(8, symmetric=True), activation_grid=None)
    if shrunk:  # inputs that earlier layers have scaled down: the trained weights would do badly
        smaller = [Rows(rows.inputs * 0.7, rows.targets) for rows in (problem.fit, problem.held_out)]
        problem = replace(problem, fit=smaller[0], held_out=smaller[1])
    else:
        fit = problem.fit
        problem = replace(problem, fit=Rows(fit.inputs, fit.targets + torch.randn(fit.targets.shape) / 10))
    objective = HeldOutObjective(problem, moments_of(problem.fit.inputs, problem.fit.targets), None)
    assert pull_of(objective, 0.03, (30.0, 3.0)) == (0.03 if shrunk else 30.0)
    assert pull_of(objective, 40.0, (30.0, 3.0)) == 40.0

"""Solvers on CUDA; skipped where there is no GPU."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from subbyte.calibrate.adaquant import AdaQuant
from subbyte.calibrate.adaround import AdaRound
from subbyte.calibrate.closest_point import coordinate_descent, error_feedback, tree_search
from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.problem import LayerProblem, Rows, Solver, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.quantizers.grid import Grid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SOLVERS: list[Solver] = [RoundToNearest(), Lattice(), AdaQuant(iterations=40), AdaRound(iterations=40)]


def on_cuda(problem: LayerProblem) -> LayerProblem:
    def moved(rows: Rows) -> Rows:
        return Rows(rows.inputs.cuda(), rows.targets.cuda())

    weight, bias = problem.weight.cuda(), problem.bias.cuda()
    return replace(problem, weight=weight, bias=bias, fit=moved(problem.fit), held_out=moved(problem.held_out))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_solvers_reach_there_what_they_reach_on_the_cpu(make_problem: Any, solver: Solver, bits: int) -> None:
    problem = make_problem(unknowns=40, outputs=8, weight_grid=Grid(bits, symmetric=True), activation_grid=Grid(bits))
    here = solver.solve(problem, torch.Generator().manual_seed(0))
    there = solver.solve(on_cuda(problem), torch.Generator().manual_seed(0))
    assert there.codes.is_cuda and there.scale.is_cuda and there.bias.is_cuda
    errors = [relative_error(given, found, given.held_out) for given, found in ((problem, here), (on_cuda(problem), there))]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_the_loops_never_wait_for_the_device(make_problem: Any) -> None:
    problem = on_cuda(make_problem(unknowns=30, outputs=8))
    n, outputs = problem.unknowns, 8
    hessian = (problem.fit.inputs.mT @ problem.fit.inputs / 400 + torch.eye(n, device="cuda")).double()
    optimum, step = problem.weight.double(), torch.full((1, outputs, 1), 0.05, device="cuda")
    low, high = torch.full_like(step, -8), torch.full_like(step, 7)
    levels = (problem.weight / step).round().clamp(-8, 7)
    for descend in (lambda: error_feedback(optimum, hessian, step, low, high), lambda: tree_search(optimum, hessian, step, low, high, 4)):
        waits = count_waits(descend)
        assert waits <= 3, f"{waits} waits for {n} columns: they must not grow with these"  # a factorization asks whether it succeeded
    assert count_waits(lambda: coordinate_descent(levels, optimum.float(), hessian.float(), step, low, high)) < n


@pytest.mark.parametrize("solver", [AdaQuant, AdaRound], ids=["AdaQuant", "AdaRound"])
def test_gradient_steps_never_wait_for_the_device(make_problem: Any, solver: Any) -> None:
    problem = on_cuda(make_problem())
    few, many = (count_waits(lambda k=k: solver(iterations=k).solve(problem, torch.Generator().manual_seed(0))) for k in (20, 200))
    assert many <= few + 5


def test_counting_finds_waits() -> None:
    assert count_waits(lambda: [torch.ones(1, device="cuda").item() for _ in range(3)]) >= 3


def count_waits(run: Any) -> int:
    """How often the host waits for the device."""
    run()  # what is set up once may wait
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in found)

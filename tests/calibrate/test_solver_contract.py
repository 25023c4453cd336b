"""What every solver promises: one body over all of them. A new solver adds itself to `SOLVERS`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subbyte
from subbyte.calibrate.adaquant import AdaQuant
from subbyte.calibrate.adaround import AdaRound
from subbyte.calibrate.guard import solve_guarded
from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.problem import LayerProblem, LayerSolution, Rows, Solver, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.errors import LayerError
from subbyte.quantizers.affine import dequantize
from subbyte.quantizers.granularity import column_groups, group_count, per_weight
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.ranges import LeastOutputError, MinMax, Percentile

SOLVERS: list[Solver] = [
    RoundToNearest(),
    RoundToNearest(weight_range=MinMax(), activation_range=Percentile(99.9)),
    Lattice(),
    Lattice().draft,
    Lattice.columns(),
    Lattice(weight_range=MinMax(), activation_range=LeastOutputError(count=8), rounds=1, activation_rounds=0),
    AdaQuant(iterations=6, checks=2),
    AdaQuant(iterations=4, batch_rows=5, decay=False, checks=1),
    AdaRound(iterations=4),
]
# Solvers that solve group by group when the input stays in float32; Lattice chooses one ridge for all groups, so it is given one.
SOLVES_GROUPS_APART: list[Solver] = [RoundToNearest(), RoundToNearest(weight_range=MinMax()), Lattice(ridges=(0.03,))]
BASELINE = RoundToNearest()

SHAPES: dict[str, dict[str, int]] = {
    "one group": {},
    "one unknown": {"unknowns": 1},
    "one output": {"outputs": 1},
    "grouped": {"groups": 3, "outputs": 4, "unknowns": 6},
    "depthwise": {"groups": 8, "outputs": 1, "unknowns": 9},
    "fewer rows than unknowns": {"unknowns": 30, "rows": 8},
    "one row": {"rows": 1},
    "two rows": {"rows": 2},
    "wider than a block": {"unknowns": 70, "rows": 200},
}
GRIDS: dict[str, tuple[Grid, Grid | None]] = {
    "W4A4": (Grid(4, symmetric=True), Grid(4)),
    "W2A2": (Grid(2, symmetric=True), Grid(2)),
    "W8A8": (Grid(8, symmetric=True), Grid(8)),
    "W3": (Grid(3, symmetric=True), None),
    "affine W4A8": (Grid(4), Grid(8)),
    "affine W2": (Grid(2), None),
    "W3A8 groups of 4": (Grid(3, symmetric=True, group=4), Grid(8)),
    "affine W4 groups of 5": (Grid(4, group=5), None),
    "W2 groups of 1": (Grid(2, symmetric=True, group=1), None),
    "W4 one group": (Grid(4, symmetric=True, group=1000), None),
}

solvers = pytest.mark.parametrize("solver", SOLVERS, ids=[f"{solver.name}-{index}" for index, solver in enumerate(SOLVERS)])
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
grids = pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
MakeProblem = Callable[..., LayerProblem]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(problem: LayerProblem, solution: LayerSolution) -> None:
    """`LayerSolution`'s docstring, and that nothing in it is NaN or infinite."""
    groups, outputs, n = problem.weight.shape
    grid = problem.weight_grid
    steps = (groups, outputs) if grid.group is None else (groups, outputs, group_count(n, grid.group))
    assert solution.group == grid.group
    assert (solution.codes.dtype, solution.codes.shape) == (torch.int16, problem.weight.shape)
    assert (solution.scale.dtype, solution.scale.shape) == (torch.float32, steps)
    assert (solution.zero_point.dtype, solution.zero_point.shape) == (torch.int32, steps)
    assert (solution.bias.dtype, solution.bias.shape) == (torch.float32, (groups, outputs))
    assert int(solution.codes.min()) >= grid.lowest and int(solution.codes.max()) <= grid.highest
    assert bool((solution.scale > 0).all())
    assert int(solution.zero_point.min()) >= grid.lowest and int(solution.zero_point.max()) <= grid.highest
    assert not grid.symmetric or not bool(solution.zero_point.any())
    assert all(bool(torch.isfinite(values).all()) for values in (solution.scale, solution.bias, solution.weight()))
    assert (solution.activation is None) == (problem.activation_grid is None)
    if solution.activation is not None and problem.activation_grid is not None:
        scale, zero_point = solution.activation
        assert (scale.dtype, scale.shape, zero_point.dtype, zero_point.shape) == (torch.float32, (), torch.int32, ())
        assert 0 < float(scale) < float("inf")
        assert problem.activation_grid.lowest <= int(zero_point) <= problem.activation_grid.highest


def same(a: LayerSolution, b: LayerSolution) -> bool:
    fields = (
        (a.codes, a.scale, a.zero_point, a.bias, *(a.activation or ())),
        (b.codes, b.scale, b.zero_point, b.bias, *(b.activation or ())),
    )
    return len(fields[0]) == len(fields[1]) and all(torch.equal(one, other) for one, other in zip(*fields, strict=True))


@solvers
@shapes
@grids
def test_solution_is_as_promised_and_never_worse_than_rounding(
    solver: Solver, shape: dict[str, int], grids: tuple[Grid, Grid | None], make_problem: MakeProblem
) -> None:
    problem = make_problem(**shape, weight_grid=grids[0], activation_grid=grids[1])
    solution = solver.solve(problem, generator())
    check(problem, solution)
    assert solution.solver in {solver.name, getattr(solver, "start", solver).name}
    judged = solve_guarded(problem, solver, BASELINE, generator())
    kept = relative_error(problem, judged.solution, problem.held_out)
    assert kept <= judged.baseline_error
    assert kept == (judged.baseline_error if judged.rejected else judged.error)


@solvers
@shapes
def test_the_same_twice(solver: Solver, shape: dict[str, int], make_problem: MakeProblem) -> None:
    problem = make_problem(**shape)
    first, second = solver.solve(problem, generator(1)), solver.solve(problem, generator(1))
    assert same(first, second)
    assert same(solver.solve(pickle.loads(pickle.dumps(problem)), generator(1)), first)


@solvers
def test_the_problem_is_not_changed(solver: Solver, make_problem: MakeProblem) -> None:
    problem = make_problem()
    tensors = (problem.weight, problem.bias, problem.fit.inputs, problem.fit.targets, problem.held_out.inputs, problem.held_out.targets)
    before = [tensor.clone() for tensor in tensors]
    solver.solve(problem, generator())
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@solvers
def test_global_chance_is_not_touched(solver: Solver, make_problem: MakeProblem) -> None:
    state = torch.get_rng_state()
    solver.solve(make_problem(), generator())
    assert torch.equal(torch.get_rng_state(), state)


def on_grid(weight: Tensor, grid: Grid) -> Tensor:
    """Put a weight on a grid of its own for each channel or column group, both ends of it in use; in place."""
    n = weight.shape[2]
    chance = generator(7)
    codes = torch.randint(grid.lowest, grid.highest + 1, weight.shape, generator=chance)
    for columns in column_groups(n, grid.group):
        codes[..., columns.start], codes[..., columns.stop - 1] = grid.lowest, grid.highest
    steps = (*weight.shape[:2], *([] if grid.group is None else [group_count(n, grid.group)]))
    zero_point = torch.zeros(steps) if grid.symmetric else torch.randint(1, grid.highest, steps, generator=chance)
    scale = torch.rand(steps, generator=chance) + 0.1
    return weight.copy_(dequantize(codes, per_weight(scale, grid.group, n), per_weight(zero_point, grid.group, n)))


@solvers
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 4, 5])
@pytest.mark.parametrize("shape", [{}, {"groups": 3, "outputs": 2, "unknowns": 9}], ids=["one group", "grouped"])
def test_exact_when_the_weight_is_on_the_grid(
    solver: Solver, bits: int, symmetric: bool, group: int | None, shape: dict[str, int], make_problem: MakeProblem
) -> None:
    grid = Grid(bits, symmetric=symmetric, group=group)
    problem = make_problem(**shape, weight_grid=grid, activation_grid=None, change=lambda inputs, weight: on_grid(weight, grid))
    solution = solver.solve(problem, generator())
    assert relative_error(problem, solution, problem.held_out) < 1e-9
    torch.testing.assert_close(solution.weight(), problem.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVES_GROUPS_APART, ids=lambda solver: solver.name)
@pytest.mark.parametrize("shape", [{"groups": 3, "outputs": 4, "unknowns": 6}, {"groups": 8, "outputs": 1, "unknowns": 9}], ids=str)
@pytest.mark.parametrize("grid", [Grid(3, symmetric=True), Grid(3), Grid(3, group=4)], ids=str)
def test_groups_are_solved_as_if_alone(solver: Solver, shape: dict[str, int], grid: Grid, make_problem: MakeProblem) -> None:
    problem = make_problem(**shape, weight_grid=grid, activation_grid=None)
    together = solver.solve(problem, generator())
    for group in range(shape["groups"]):
        alone = solver.solve(only(problem, group), generator())
        assert torch.equal(together.codes[group], alone.codes[0])
        assert torch.equal(together.zero_point[group], alone.zero_point[0])
        torch.testing.assert_close(together.scale[group], alone.scale[0])
        torch.testing.assert_close(together.bias[group], alone.bias[0], rtol=1e-4, atol=1e-4)


def only(problem: LayerProblem, group: int) -> LayerProblem:
    """One group of a problem as a problem of its own."""
    part = slice(group, group + 1)
    fit, held_out = (Rows(rows.inputs[part], rows.targets[part]) for rows in (problem.fit, problem.held_out))
    return replace(problem, weight=problem.weight[part], bias=problem.bias[part], fit=fit, held_out=held_out)


def dead_columns(inputs: Tensor, weight: Tensor) -> None:
    inputs[..., ::3] = 0


def constant_columns(inputs: Tensor, weight: Tensor) -> None:
    inputs[..., ::3] = 2.5


def equal_columns(inputs: Tensor, weight: Tensor) -> None:
    inputs[...] = inputs[..., :1]


def dead_groups(inputs: Tensor, weight: Tensor) -> None:
    inputs[: len(inputs) // 2] = 0


def no_weight(inputs: Tensor, weight: Tensor) -> None:
    weight.zero_()


def dead_channel(inputs: Tensor, weight: Tensor) -> None:
    weight[:, 0] = 0


def tiny(inputs: Tensor, weight: Tensor) -> None:
    inputs.mul_(1e-12)
    weight.mul_(1e-12)


def huge(inputs: Tensor, weight: Tensor) -> None:
    inputs.mul_(1e6)
    weight.mul_(1e6)


def far_from_zero(inputs: Tensor, weight: Tensor) -> None:
    inputs.add_(100)


def one_outlier(inputs: Tensor, weight: Tensor) -> None:
    inputs[:, 0, 0], weight[:, :, 0] = 1e5, 1e3


SPOILED = [dead_columns, constant_columns, equal_columns, dead_groups, no_weight, dead_channel, tiny, huge, far_from_zero, one_outlier]


@solvers
@pytest.mark.parametrize("grids", [GRIDS["W4A4"], GRIDS["affine W2"]], ids=["W4A4", "affine W2"])
@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("shape", [{}, {"groups": 4, "outputs": 2, "unknowns": 6}, {"unknowns": 30, "rows": 8}], ids=str)
def test_degenerate_layers_are_solved(
    solver: Solver, grids: tuple[Grid, Grid | None], spoil: object, shape: dict[str, int], make_problem: MakeProblem
) -> None:
    problem = make_problem(**shape, weight_grid=grids[0], activation_grid=grids[1], change=spoil)
    judged = solve_guarded(problem, solver, BASELINE, generator())
    check(problem, judged.solution)
    assert judged.baseline_error < float("inf") and not judged.error < 0


@solvers
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    unknowns=st.integers(1, 10),
    rows=st.integers(1, 60),
    bits=st.integers(2, 8),
    activation_bits=st.none() | st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.none() | st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_any_small_layer_is_solved(
    solver: Solver,
    bits: int,
    activation_bits: int | None,
    symmetric: bool,
    group: int | None,
    make_problem: MakeProblem,
    **shape: int,
) -> None:
    activation_grid = None if activation_bits is None else Grid(activation_bits)
    problem = make_problem(**shape, weight_grid=Grid(bits, symmetric=symmetric, group=group), activation_grid=activation_grid)
    judged = solve_guarded(problem, solver, BASELINE, generator())
    check(problem, judged.solution)
    assert relative_error(problem, judged.solution, problem.held_out) <= judged.baseline_error


@solvers
def test_a_solver_is_a_value(solver: Solver) -> None:
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert len({solver, pickle.loads(pickle.dumps(solver))}) == 1


@dataclass(frozen=True)
class Failing(Solver):
    """Stands in for a solver that has a defect."""

    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        raise RuntimeError(f"singular at {problem.unknowns}")


@pytest.mark.parametrize("flavour", subbyte.Flavour)
def test_an_error_inside_a_solver_names_the_layer(flavour: subbyte.Flavour) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    recipe = subbyte.Recipe(solver=Failing(), flavour=flavour)
    with pytest.raises(LayerError, match="layer '0': singular at 4") as caught:
        subbyte.quantize(model, torch.randn(32, 4), recipe=recipe)
    assert caught.value.layer == "0"
    assert isinstance(caught.value.__cause__, RuntimeError)

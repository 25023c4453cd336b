"""Weight steps for groups of columns, from the recipe to the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.problem import LayerProblem, Solver, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.calibrate.steps import weight_step
from subbyte.quantizers.affine import dequantize, quantize
from subbyte.quantizers.granularity import per_weight
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.ranges import LeastOutputError, MinMax

MakeProblem = Callable[..., LayerProblem]
ALL = [RoundToNearest(), Lattice(), Lattice.columns(), subbyte.AdaQuant(iterations=5, checks=1), subbyte.AdaRound(iterations=5)]


def solved(problem: LayerProblem, solver: Solver) -> subbyte.calibrate.problem.LayerSolution:
    return solver.solve(problem, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", ALL, ids=lambda solver: solver.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_group_of_all_columns_is_a_step_for_each_output_channel(solver: Solver, symmetric: bool, make_problem: MakeProblem) -> None:
    problem = make_problem(unknowns=37, rows=500, weight_grid=Grid(3, symmetric=symmetric))
    plain, grouped = solved(problem, solver), solved(replace(problem, weight_grid=Grid(3, symmetric=symmetric, group=37), known={}), solver)
    assert grouped.scale.shape == (*plain.scale.shape, 1)
    assert torch.equal(plain.codes, grouped.codes) and torch.equal(plain.zero_point, grouped.zero_point[..., 0])
    assert torch.equal(plain.scale, grouped.scale[..., 0]) and torch.equal(plain.bias, grouped.bias)


@pytest.mark.parametrize("interval", [LeastOutputError(), MinMax(), LeastOutputError(count=2, smallest=0.9)], ids=repr)
@pytest.mark.parametrize("grid", [Grid(2, symmetric=True), Grid(3), Grid(4, symmetric=True)], ids=str)
@pytest.mark.parametrize("group", [1, 4, 5, 36, 37])
def test_steps_of_groups_never_cost_more_than_those_of_channels(interval: subbyte.Range, grid: Grid, group: int) -> None:
    chance = torch.Generator().manual_seed(group)
    weight, importance = torch.randn(2, 9, 37, generator=chance), torch.rand(2, 37, generator=chance)

    def cost(grid: Grid) -> Tensor:
        scale, zero = (per_weight(values, grid.group, 37) for values in weight_step(weight, importance, grid, interval))
        error = weight - dequantize(quantize(weight, scale, zero, grid), scale, zero)
        return (error.square() * importance[:, None]).sum(dim=2)

    assert (cost(replace(grid, group=group)) <= cost(grid) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fitted_groups_beat_rounded_ones_and_fitted_channels(bits: int, group: int, symmetric: bool, make_problem: MakeProblem) -> None:
    grid = Grid(bits, symmetric=symmetric, group=group)
    problem = make_problem(outputs=16, unknowns=37, rows=3000, weight_grid=grid, activation_grid=None)
    channels = replace(problem, weight_grid=replace(grid, group=None), known={})
    errors = {
        solver.name + str(rounds): relative_error(problem, solved(problem, solver), problem.held_out)
        for solver, rounds in ((RoundToNearest(), 0), (Lattice.columns(), 0), (Lattice(), 1))
    }
    assert errors["Lattice1"] < 0.7 * errors["RoundToNearest0"]
    assert errors["Lattice1"] < errors["Lattice0"] < errors["RoundToNearest0"]
    assert errors["Lattice1"] < relative_error(channels, solved(channels, Lattice()), channels.held_out)
    assert errors["RoundToNearest0"] < relative_error(channels, solved(channels, RoundToNearest()), channels.held_out)


def test_columns_alone_stop_before_descent(make_problem: MakeProblem) -> None:
    problem = make_problem(unknowns=30, rows=2000, weight_grid=Grid(3, symmetric=True), activation_grid=None)
    steps, _ = weight_step(problem.weight, problem.fit.inputs.var(dim=1, correction=0) * 1.0, Grid(3, symmetric=True), LeastOutputError())
    alone = solved(problem, Lattice.columns())
    torch.testing.assert_close(alone.scale, steps, rtol=0.2, atol=0)
    further = solved(problem, replace(Lattice.columns(), rounds=4))
    assert not torch.equal(alone.codes, further.codes)
    assert relative_error(problem, further, problem.fit) < relative_error(problem, alone, problem.fit)


@pytest.mark.parametrize("bits", [None, 8])
def test_the_ridge_is_small_where_many_rows_determine_the_layer(bits: int | None, make_problem: MakeProblem) -> None:
    """Real weights are about the trained ones for every ridge, where the input is float or has 8 bits; codes are not."""
    grid = None if bits is None else Grid(bits)
    problem = make_problem(outputs=16, unknowns=40, rows=4000, weight_grid=Grid(3, symmetric=True), activation_grid=grid)
    chosen, small = (relative_error(problem, solved(problem, Lattice(ridges)), problem.held_out) for ridges in ((3.0, 0.03), (0.03,)))
    assert chosen == small < relative_error(problem, solved(problem, Lattice((3.0,))), problem.held_out)


class Mixed(nn.Module):
    """A convolution, wide and narrow linear layers, a batch norm behind one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide, self.norm = nn.Conv2d(3, 4, 3), nn.Linear(4 * 16, 21), nn.BatchNorm1d(21)
        self.narrow, self.last = nn.Linear(21, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.conv(x).relu().flatten(1))).relu()
        return self.last(self.narrow(x).relu())


X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
GROUPS = {"conv": None, "wide": 10, "narrow": 10, "last": None}


def quantized(**settings: object) -> subbyte.Result:
    torch.manual_seed(0)
    recipe = subbyte.Recipe(weight_group=10, **settings)  # type: ignore[arg-type]
    return subbyte.quantize(Mixed().eval(), X, widths=subbyte.Widths(3, 8), recipe=recipe)


@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_layers_wider_than_a_group_have_groups_from_recipe_to_file(symmetric: bool, tmp_path: Path) -> None:
    result = quantized(symmetric_weights=symmetric)
    assert {layer.name: layer.weight_group for layer in result.layers} == GROUPS
    assert result.model.get_submodule("wide").scale.shape == (21, 7)  # type: ignore[union-attr]
    lines = {line.split()[0]: line.split()[1] for line in str(result).splitlines() if line.split()[0] in GROUPS}
    assert lines == {"conv": "3", "wide": "3/10", "narrow": "3/10", "last": "3"}
    assert "W3/10A8" in repr(result.model)
    assert result.save(tmp_path / "mixed") == result.size_bytes == (tmp_path / "mixed").stat().st_size
    loaded = subbyte.load(tmp_path / "mixed", into=Mixed())
    assert torch.equal(loaded(X), result.model(X))
    assert loaded.get_submodule("narrow").weight_grid.group == 10  # type: ignore[union-attr]


REFINEMENTS: list[subbyte.Refinement] = [
    subbyte.BatchNormTuning(without_batch_norm=True),
    subbyte.BiasTuning(epochs=2, step_rate=1e-3),
    subbyte.Blockwise(iterations=20),
    subbyte.Networkwise(iterations=20),
]


@pytest.mark.parametrize("refinement", REFINEMENTS, ids=lambda refinement: refinement.name)
def test_refinements_keep_groups_and_the_file_its_size(refinement: subbyte.Refinement, tmp_path: Path) -> None:
    solver = subbyte.RoundToNearest(subbyte.MinMax())  # so that something is left to refine
    plain, refined = (quantized(solver=solver, equalization=None, refinements=some) for some in ((), (refinement,)))
    assert refined.refinements[0].kept
    a, b = (result.model.get_submodule("wide") for result in (plain, refined))
    assert b.scale.shape == (21, 7) and not torch.equal(a.weight, b.weight)  # type: ignore[union-attr,arg-type]
    assert refined.save(tmp_path / "refined") == plain.size_bytes
    assert torch.equal(subbyte.load(tmp_path / "refined", into=Mixed())(X), refined.model(X))


def test_a_budget_counts_groups_to_the_byte() -> None:
    torch.manual_seed(0)
    recipe = subbyte.Recipe(weight_group=10, solver=subbyte.RoundToNearest())
    result = subbyte.quantize(Mixed().eval(), X, budget=subbyte.Budget(size=0.9), recipe=recipe)
    assert result.plan is not None and result.plan.allocation.size_bytes == result.size_bytes


def test_what_the_bank_has_solved_knows_its_groups(tmp_path: Path) -> None:
    def run(group: int | None) -> subbyte.Result:
        torch.manual_seed(0)
        recipe = subbyte.Recipe(weight_group=group, solver=subbyte.RoundToNearest())
        return subbyte.quantize(Mixed().eval(), X, widths=subbyte.Widths(3, 8), recipe=recipe, bank=subbyte.Bank(tmp_path))

    first, again, plain = run(10), run(10), run(None)
    assert torch.equal(first.model(X), again.model(X)) and not torch.equal(first.model(X), plain.model(X))


@pytest.mark.parametrize("group", [0, -1, 1.5, True])
def test_impossible_groups_are_refused(group: object) -> None:
    with pytest.raises(subbyte.OptionError, match="a group is a positive number of weights, or None"):
        subbyte.Recipe(weight_group=group)  # type: ignore[arg-type]

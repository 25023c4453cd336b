"""The parts of Lattice against brute force and loops written for clarity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subbyte.calibrate import closest_point
from subbyte.calibrate.closest_point import closed_form_step, coordinate_descent, error_feedback, tree_search
from subbyte.calibrate.lattice import Lattice, nearby_steps, nearby_zero_points
from subbyte.calibrate.problem import LayerProblem, Rows, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.errors import OptionError
from subbyte.quantizers.granularity import column_groups, group_count, per_weight
from subbyte.quantizers.grid import Grid

MakeProblem = Callable[..., LayerProblem]


class Case:
    """One small closest-point problem: `w*` (G, O, n), `H` (G, n, n), `s` and zero-points (G, O) or, by the seed, of column groups."""

    def __init__(self, groups: int, outputs: int, n: int, bits: int, seed: int) -> None:
        self.group = (None, 1, 2, 4)[seed % 4]
        steps = (groups, outputs) if self.group is None else (groups, outputs, group_count(n, self.group))
        chance = torch.Generator().manual_seed(seed)
        rows = torch.randn(groups, n + 3, n, generator=chance, dtype=torch.float64) + torch.randn(
            groups, n + 3, 1, generator=chance, dtype=torch.float64
        )
        self.hessian = rows.mT @ rows / (n + 3) + 0.01 * torch.eye(n, dtype=torch.float64)
        self.optimum = torch.randn(groups, outputs, n, generator=chance, dtype=torch.float64)
        self.scale = torch.rand(steps, generator=chance) * 0.4 + 0.2
        zero_point = per_weight(torch.randint(0, 2**bits, steps, generator=chance), self.group, n)
        self.low, self.high = -zero_point.float(), (2**bits - 1 - zero_point).float()
        spread = torch.rand(groups, outputs, n, generator=chance)
        self.levels = (self.low + spread * (self.high - self.low)).round()

    @property
    def step(self) -> Tensor:
        """`s` as it broadcasts against the weights, (G, O, 1) or (G, O, n)."""
        return per_weight(self.scale, self.group, self.optimum.shape[2])

    def at(self, values: Tensor, column: int) -> Tensor:
        """Of the steps or ends of the grid, those of a column, (G, O)."""
        return values.expand_as(self.optimum)[..., column]

    def points(self, output: int) -> Tensor:
        """All codes of an output channel of the first group, float32 (codes, n)."""
        n = self.optimum.shape[2]
        lows, highs = ([int(self.at(ends, column)[0, output]) for column in range(n)] for ends in (self.low, self.high))
        return torch.tensor(list(product(*(range(low, high + 1) for low, high in zip(lows, highs, strict=True)))), dtype=torch.float32)

    def objective(self, levels: Tensor, scale: Tensor | None = None) -> Tensor:
        """`(w* - s v)^T H (w* - s v)`, float64 (G, O)."""
        steps = self.step if scale is None else per_weight(scale, self.group, self.optimum.shape[2])
        rest = self.optimum - levels.double() * steps.double()
        return ((rest @ self.hessian) * rest).sum(dim=2)

    def descend(self) -> Tensor:
        return coordinate_descent(self.levels, self.optimum.float(), self.hessian.float(), self.step, self.low, self.high)[0]

    def inside(self, levels: Tensor) -> bool:
        return bool(((levels >= self.low) & (levels <= self.high) & (levels == levels.round())).all())


cases = st.builds(Case, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(2, 3), st.integers(0, 10**6))
wide_cases = st.builds(Case, st.integers(1, 2), st.integers(1, 3), st.integers(5, 9), st.integers(2, 8), st.integers(0, 10**6))


@given(cases | wide_cases)
def test_descent_never_raises_the_objective(case: Case) -> None:
    before = case.levels.clone()
    levels = case.descend()
    assert torch.equal(case.levels, before)
    assert case.inside(levels)
    assert (case.objective(levels) <= case.objective(before) * (1 + 1e-5)).all()


@given(cases)
def test_descent_ends_where_no_single_move_helps(case: Case) -> None:
    levels = case.descend()
    reached = case.objective(levels)
    for index in range(levels.shape[2]):
        for value in range(-7, 8):
            moved = levels.clone()
            low, high = case.at(case.low, index), case.at(case.high, index)
            moved[..., index] = torch.clamp(torch.full_like(moved[..., index], value), low, high)
            assert (case.objective(moved) >= reached - 1e-4 * (1 + reached)).all()


@given(st.builds(Case, st.just(1), st.just(2), st.integers(1, 4), st.just(2), st.integers(0, 10**6)))
def test_descent_is_never_below_the_best_point_and_reaches_it_for_one_unknown(case: Case) -> None:
    levels = case.descend()
    for output in range(2):
        points = case.points(output)
        rest = case.optimum[0, output] - points.double() * case.step[0, output].double()
        best = ((rest @ case.hessian[0]) * rest).sum(dim=1).min()
        reached = case.objective(levels)[0, output]
        assert reached >= best - 1e-9
        assert levels.shape[2] > 1 or reached == pytest.approx(float(best), rel=1e-5, abs=1e-9)


@given(cases)
def test_descent_started_twice_stays(case: Case) -> None:
    levels = case.descend()
    again, moved = coordinate_descent(levels, case.optimum.float(), case.hessian.float(), case.step, case.low, case.high)
    assert moved == 0 and torch.equal(again, levels)


@given(cases)
def test_descent_that_asks_seldom_finds_the_same_codes(case: Case) -> None:
    """As on an accelerator, where the host would wait for each answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subbyte.calibrate.closest_point.moves_unasked", lambda device: 3)
        seldom = case.descend()
    assert torch.equal(seldom, case.descend())


@given(cases)
def test_descent_tells_the_share_of_moved_codes(case: Case) -> None:
    levels, moved = coordinate_descent(case.levels, case.optimum.float(), case.hessian.float(), case.step, case.low, case.high)
    assert moved == pytest.approx(float((levels != case.levels).float().mean()))


def test_descent_needs_more_than_one_code_at_a_time() -> None:
    """A step that is much too small: codes go to the end of the grid."""
    case = Case(1, 2, 4, 3, seed=0)
    case.scale = case.scale * 1e-3
    assert case.inside(case.descend())


def naive_error_feedback(case: Case) -> Tensor:
    """Round one column, solve for the best real values of those that are left, and so on: the definition, channel by channel."""
    levels = torch.empty_like(case.optimum)
    groups, outputs, n = levels.shape
    for group, output in product(range(groups), range(outputs)):
        hessian, optimum = case.hessian[group], case.optimum[group, output]
        steps, lows, highs = (values.expand_as(levels)[group, output].double() for values in (case.step, case.low, case.high))
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
        error = torch.zeros(n, dtype=torch.float64)  # of the columns that are fixed: s v - w*
        for place, column in enumerate(order):
            fixed = order[:place]
            free = order[place:]
            shift = torch.linalg.solve(hessian[free][:, free], hessian[free][:, fixed] @ error[fixed]) if fixed else torch.zeros(n)
            wanted = optimum[column] - shift[0]
            level = (wanted / steps[column]).round().clamp(lows[column], highs[column])
            levels[group, output, column] = level
            error[column] = steps[column] * level - optimum[column]
    return levels.float()


@given(cases | wide_cases)
def test_error_feedback_is_the_naive_loop(case: Case) -> None:
    levels = error_feedback(case.optimum, case.hessian, case.step, case.low, case.high)
    assert case.inside(levels)
    assert torch.equal(levels, naive_error_feedback(case))


@given(wide_cases, st.integers(1, 5))
def test_error_feedback_does_not_depend_on_its_blocks(case: Case, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closest_point, "COLUMN_BLOCK", block)
        levels = error_feedback(case.optimum, case.hessian, case.step, case.low, case.high)
    assert torch.equal(levels, naive_error_feedback(case))


def test_error_feedback_across_real_blocks() -> None:
    case = Case(2, 2, 2 * closest_point.COLUMN_BLOCK + 5, 4, seed=3)
    levels = error_feedback(case.optimum, case.hessian, case.step, case.low, case.high)
    assert (levels == naive_error_feedback(case)).float().mean() > 0.99  # a tie may fall the other way in float32


def test_error_feedback_without_correlation_is_rounding() -> None:
    case = Case(2, 3, 5, 3, seed=1)
    case.hessian = torch.diag_embed(torch.rand(2, 5, dtype=torch.float64) + 0.5)
    rounded = (case.optimum.float() / case.step).round().clamp(case.low, case.high)
    assert torch.equal(error_feedback(case.optimum, case.hessian, case.step, case.low, case.high), rounded)


@given(cases | wide_cases, st.integers(1, 64))
def test_a_search_that_says_it_is_proved_has_found_the_best(case: Case, paths: int) -> None:
    levels, proved = tree_search(case.optimum, case.hessian, case.step, case.low, case.high, paths)
    assert case.inside(levels)
    reached = case.objective(levels)
    wide, _ = tree_search(case.optimum, case.hessian, case.step, case.low, case.high, 4096)
    assert (reached[proved] <= case.objective(wide)[proved] * (1 + 1e-9) + 1e-12).all()


@given(st.builds(Case, st.just(1), st.just(2), st.integers(1, 4), st.just(2), st.integers(0, 10**6)))
def test_what_a_search_proves_is_the_best_point(case: Case) -> None:
    levels, proved = tree_search(case.optimum, case.hessian, case.step, case.low, case.high, 256)
    reached = case.objective(levels)
    for output in range(2):
        points = case.points(output)
        rest = case.optimum[0, output] - points.double() * case.step[0, output].double()
        best = float(((rest @ case.hessian[0]) * rest).sum(dim=1).min())
        assert float(reached[0, output]) >= best - 1e-9
        assert not proved[0, output] or float(reached[0, output]) == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_most_small_searches_are_proved_and_nearly_all_find_what_a_wide_one_finds() -> None:
    case = Case(20, 10, 9, 4, seed=5)
    case.low, case.high = torch.full_like(case.low, -8), torch.full_like(case.high, 7)
    step = case.optimum.abs().amax(dim=2, keepdim=True).float() / 8
    found, proved = tree_search(case.optimum, case.hessian, step, case.low, case.high, 32)
    wide, _ = tree_search(case.optimum, case.hessian, step, case.low, case.high, 4096)
    assert proved.float().mean() > 0.6
    assert (found == wide).all(dim=2).float().mean() > 0.95


@given(cases | wide_cases)
def test_the_closed_form_step_is_the_minimiser(case: Case) -> None:
    n = case.optimum.shape[2]
    scale = closed_form_step(case.levels, case.optimum.float(), case.hessian.float(), case.scale, case.group)
    assert scale.shape == case.scale.shape and (scale > 0).all()
    fitted = case.objective(case.levels, scale)
    assert (fitted <= case.objective(case.levels) * (1 + 1e-5)).all()
    for group, output in product(range(scale.shape[0]), range(scale.shape[1])):
        columns = [case.levels[group, output, part].double() for part in column_groups(n, case.group)]
        basis = torch.block_diag(*(part[:, None] for part in columns))  # (n, K)
        factor = torch.linalg.cholesky(case.hessian[group]).mT
        best = torch.linalg.lstsq(factor @ basis, factor @ case.optimum[group, output], driver="gelsd").solution
        if bool((best > 1e-3).all()):
            rest = factor @ (case.optimum[group, output] - basis @ best)
            assert float(fitted[group, output]) == pytest.approx(float(rest @ rest), rel=1e-3, abs=1e-6)


def test_the_step_stays_where_there_is_nothing_to_fit() -> None:
    case = Case(1, 3, 4, 3, seed=0)
    case.levels[0, 0] = 0  # no code at all
    case.levels[0, 1] = -torch.sign(case.optimum[0, 1]).float()  # the best step would be negative
    case.hessian = torch.eye(4, dtype=torch.float64)[None]
    scale = closed_form_step(case.levels, case.optimum.float(), case.hessian.float(), case.scale, case.group)
    assert torch.equal(scale[0, :2], case.scale[0, :2])


@pytest.mark.parametrize("nearby", [nearby_steps, nearby_zero_points])
@pytest.mark.parametrize("zero", [0, 1, 7, 14, 15])
def test_what_is_tried_nearby_starts_with_what_there_is_and_stays_on_the_grid(
    nearby: Callable[..., list[tuple[Tensor, Tensor]]], zero: int
) -> None:
    given = (torch.tensor(0.5), torch.tensor(zero, dtype=torch.int32))
    around = nearby(given, 15)
    assert around[0] is given
    assert all(0 <= int(z) <= 15 and z.dtype == torch.int32 and float(s) > 0 for s, z in around)
    assert len({(float(s), int(z)) for s, z in around}) == len(around)


def test_steps_are_tried_on_both_sides_and_a_zero_point_at_an_end_stays() -> None:
    given = (torch.tensor(0.5), torch.tensor(7, dtype=torch.int32))
    tried = [float(s) for s, _ in nearby_steps(given, 15)]
    assert min(tried) < 0.5 < max(tried)
    assert sorted(int(z) for _, z in nearby_zero_points(given, 15)) == [6, 7, 8]
    assert len(nearby_zero_points((given[0], torch.tensor(0, dtype=torch.int32)), 15)) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"ridges": ()}, {"ridges": (0.0,)}, {"ridges": (0.1, -1.0)}, {"ridges": (float("nan"),)}, {"rounds": -1}, {"activation_rounds": -1}],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="positive ridges, ratios and search_paths"):
        Lattice(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lattice_is_clearly_better_than_rounding_on_correlated_inputs(bits: int, make_problem: MakeProblem) -> None:
    problem = make_problem(outputs=16, unknowns=24, rows=2000, weight_grid=Grid(bits, symmetric=True), activation_grid=None)
    found, plain = (
        relative_error(problem, solver.solve(problem, torch.Generator().manual_seed(0)), problem.held_out)
        for solver in (Lattice(), RoundToNearest())
    )
    assert found < 0.6 * plain


@pytest.mark.parametrize("activation_bits", [2, 4, 8])
def test_lattice_is_better_than_rounding_with_quantized_inputs(activation_bits: int, make_problem: MakeProblem) -> None:
    problem = make_problem(outputs=16, unknowns=24, rows=2000, activation_grid=Grid(activation_bits))
    found, plain = (
        relative_error(problem, solver.solve(problem, torch.Generator().manual_seed(0)), problem.held_out)
        for solver in (Lattice(), RoundToNearest())
    )
    assert found < plain


def test_lattice_corrects_what_arrives_wrong(make_problem: MakeProblem) -> None:
    """Sequential flavour: inputs that the layers before have scaled down are scaled up again by the weights."""
    problem = make_problem(rows=2000, weight_grid=Grid(8, symmetric=True), activation_grid=Grid(8))
    smaller = [Rows(rows.inputs * 0.7 + 0.2, rows.targets) for rows in (problem.fit, problem.held_out)]
    problem = replace(problem, fit=smaller[0], held_out=smaller[1])
    solution = Lattice().solve(problem, torch.Generator().manual_seed(0))
    assert relative_error(problem, solution, problem.held_out) < 1e-3


def test_what_is_shared_between_widths_changes_nothing(make_problem: MakeProblem) -> None:
    """Several weight grids on one problem, one after the other and in any order, give what each gives alone."""
    grids = [Grid(bits, symmetric=True) for bits in (4, 2, 8)]
    alone = {grid: Lattice().solve(make_problem(weight_grid=grid), torch.Generator().manual_seed(0)) for grid in grids}
    for order in (grids, grids[::-1]):
        shared = make_problem()
        for grid in order:
            found = Lattice().solve(replace(shared, weight_grid=grid), torch.Generator().manual_seed(0))
            assert torch.equal(found.codes, alone[grid].codes) and torch.equal(found.bias, alone[grid].bias)


def test_what_is_known_of_one_problem_is_not_taken_for_another(make_problem: MakeProblem) -> None:
    problem = make_problem()
    Lattice().solve(problem, torch.Generator().manual_seed(0))
    other = replace(problem, weight=problem.weight * 2, fit=Rows(problem.fit.inputs, problem.fit.targets * 2))
    fresh = replace(other, known={})
    found, wanted = (Lattice().solve(each, torch.Generator().manual_seed(0)) for each in (other, fresh))
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)

"""Codes stay; steps, bias and the input's grid are fitted to what arrives, and judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from subbyte import Flavour, Grid, LayerProblem, Recipe, RoundToNearest, Widths, quantize
from subbyte.calibrate.given_codes import refit, with_bias, with_input, with_steps
from subbyte.calibrate.problem import Rows, relative_error


def problem(bits: int | None, gain: float, group: int | None = None) -> LayerProblem:
    """A layer whose inputs arrive scaled and shifted."""
    chance = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 5, 8, generator=chance), torch.randn(2, 5, generator=chance)
    x = torch.randn(2, 300, 8, generator=chance)
    rows = Rows(gain * x + 0.1, torch.baddbmm(bias[:, None], x, weight.mT))
    fit, held = (Rows(rows.inputs[:, part], rows.targets[:, part]) for part in (slice(0, 200), slice(200, 300)))
    return LayerProblem("fc", weight, bias, fit, held, Grid(4, symmetric=True, group=group), bits and Grid(bits), 200)


def rounded(given: LayerProblem):  # type: ignore[no-untyped-def]
    return RoundToNearest().solve(given, torch.Generator())


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_change_of_scale_and_mean_is_made_good_for_without_new_codes(bits: int | None, group: int | None) -> None:
    before = rounded(problem(bits, 1.0, group))
    arrived = problem(bits, 0.8, group)
    judged = refit(arrived, before, rounded(arrived))
    straight = relative_error(problem(bits, 1.0, group), before, problem(bits, 1.0, group).held_out)
    assert torch.equal(judged.solution.codes, before.codes) and judged.error <= 1.1 * straight
    assert relative_error(arrived, before, arrived.held_out) > 2 * judged.error
    torch.testing.assert_close(judged.solution.scale, before.scale / 0.8, rtol=0.05, atol=0)


@pytest.mark.parametrize("fit", [with_bias, with_steps, with_input])
def test_no_fit_is_worse_on_the_rows_that_it_sees_than_what_it_started_from(fit) -> None:  # type: ignore[no-untyped-def]
    arrived = problem(8, 0.8)
    start = with_bias(arrived, rounded(arrived))
    found = fit(arrived, start)
    assert relative_error(arrived, with_bias(arrived, found), arrived.fit) <= relative_error(arrived, start, arrived.fit) * (1 + 1e-6)


def test_plain_rounding_is_kept_where_the_codes_are_of_no_use() -> None:
    arrived = problem(8, 1.0)
    plain = rounded(arrived)
    useless = replace(plain, codes=torch.zeros_like(plain.codes))
    judged = refit(arrived, useless, plain)
    assert judged.rejected and judged.solution is plain and judged.error > judged.baseline_error


def test_hybrid_has_the_codes_of_parallel_and_does_better() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(part for _ in range(4) for part in (torch.nn.Linear(16, 16), torch.nn.ReLU())), torch.nn.Linear(16, 4))
    data = torch.randn(256, 16)
    recipes = {flavour: Recipe(flavour=flavour, symmetric_weights=True) for flavour in Flavour}
    results = {flavour: quantize(model.eval(), data, widths=Widths(3, 4), recipe=recipe) for flavour, recipe in recipes.items()}
    parallel, hybrid = (results[flavour] for flavour in (Flavour.PARALLEL, Flavour.HYBRID))
    for name in parallel.allocation:
        assert torch.equal(parallel.model.get_submodule(name).codes, hybrid.model.get_submodule(name).codes)
    assert hybrid.loss < parallel.loss

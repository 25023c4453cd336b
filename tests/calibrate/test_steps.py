"""Steps are the best of the candidates that a range offers: checked by trying them all."""

from __future__ import annotations

import pytest
import torch

from subbyte.calibrate.steps import SKETCH_OUTPUTS, activation_step, least_output_error, sketched, weight_step
from subbyte.quantizers.affine import dequantize, fake_quantize, quantize, scale_and_zero_point
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.ranges import LeastOutputError, MinMax


@pytest.mark.parametrize("grid", [Grid(3, symmetric=True), Grid(3), Grid(8)], ids=str)
def test_a_weights_step_is_the_best_candidate_of_its_channel(grid: Grid) -> None:
    weight, importance, interval = torch.randn(2, 3, 10), torch.rand(2, 10), LeastOutputError(count=7)
    scale, zero_point = weight_step(weight, importance, grid, interval)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    for group in range(2):
        for output in range(3):
            w, best = weight[group, output], float("inf")
            for low, high in zip(*interval.candidates(w[None]), strict=True):
                s, z = scale_and_zero_point(low[0], high[0], grid)
                best = min(best, float(((w - dequantize(quantize(w, s, z, grid), s, z)).square() * importance[group]).sum()))
            s, z = scale[group, output], zero_point[group, output]
            reached = float(((w - dequantize(quantize(w, s, z, grid), s, z)).square() * importance[group]).sum())
            assert reached == pytest.approx(best, rel=1e-4)


def test_an_input_that_does_not_matter_may_be_clipped() -> None:
    weight, importance = torch.full((1, 1, 8), 0.5), torch.ones(1, 8)
    weight[..., :4], weight[..., 0], importance[0, 0] = -0.4, 5.0, 1e-9
    scale, _ = weight_step(weight, importance, Grid(2), LeastOutputError())
    assert float(scale) < 1.0


def test_no_importance_at_all_still_gives_a_step() -> None:
    scale, zero_point = weight_step(torch.randn(1, 2, 4), torch.zeros(1, 4), Grid(4, symmetric=True), LeastOutputError())
    assert (scale > 0).all() and not zero_point.any()


def test_an_inputs_step_is_the_candidate_with_the_least_output_variance() -> None:
    inputs, weight, grid, interval = torch.randn(2, 300, 5).relu(), torch.randn(2, 4, 5), Grid(3), LeastOutputError(count=9)
    scale, zero_point = activation_step(inputs, weight, grid, interval)
    low, high = interval.candidates(inputs.reshape(1, -1))
    costs = {}
    for k in range(len(low)):
        s, z = scale_and_zero_point(low[k, 0], high[k, 0], grid)
        error = (inputs - fake_quantize(inputs, s, z, grid)) @ weight.mT
        costs[float(s), int(z)] = float(error.var(dim=1, correction=0).sum())
    assert costs[float(scale), int(zero_point)] == pytest.approx(min(costs.values()), rel=1e-4)


@pytest.mark.parametrize("bias", [0.0, 3.0, 300.0])
def test_candidates_are_judged_against_given_targets_without_their_mean(bias: float) -> None:
    inputs, weight, grid = torch.rand(1, 500, 3), torch.randn(1, 2, 3), Grid(4)
    right = (torch.tensor(2 / 15), torch.tensor(0, dtype=torch.int32))
    wrong = [(right[0] * factor, right[1]) for factor in (0.3, 0.97, 1.03)]
    targets = fake_quantize(inputs, *right, grid) @ weight.mT + bias
    assert least_output_error(inputs, targets, weight, [*wrong[:2], right, *wrong[2:]], grid) is right


def test_a_single_candidate_needs_no_search() -> None:
    inputs, weight = torch.randn(1, 10, 3), torch.randn(1, 2, 3)
    scale, zero_point = activation_step(inputs, weight, Grid(8), MinMax())
    assert (scale, zero_point) == scale_and_zero_point(inputs.min(), inputs.max(), Grid(8))


def test_a_sketch_keeps_squared_outputs() -> None:
    weight, x = torch.randn(1, 600, 20), torch.randn(1, 200, 20)
    small = sketched(weight)
    assert small.shape == (1, SKETCH_OUTPUTS, 20)
    ratio = float((x @ small.mT).square().sum() / (x @ weight.mT).square().sum())
    assert 0.8 < ratio < 1.2


def test_a_small_layer_is_not_sketched() -> None:
    weight = torch.randn(3, SKETCH_OUTPUTS, 5)
    assert sketched(weight) is weight


def test_a_sketched_search_finds_about_the_same_step() -> None:
    inputs, weight = torch.randn(1, 3000, 16).relu(), torch.randn(1, 8 * SKETCH_OUTPUTS, 16)
    wide, _ = activation_step(inputs, weight, Grid(4), LeastOutputError(count=24))
    narrow, _ = activation_step(inputs, weight[:, :SKETCH_OUTPUTS], Grid(4), LeastOutputError(count=24))
    assert 0.8 < float(wide / narrow) < 1.25

"""Layer problems with a known answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from subbyte.calibrate.problem import LayerProblem, Rows
from subbyte.quantizers.grid import Grid

MakeProblem = Callable[..., LayerProblem]


def correlated(groups: int, rows: int, unknowns: int, generator: torch.Generator) -> Tensor:
    """What leaves a rectifier: inputs of different sizes that know of each other, float32 (G, R, n)."""
    mixing = torch.randn(groups, unknowns, unknowns, generator=generator) / unknowns**0.5
    size = torch.rand(groups, 1, unknowns, generator=generator) + 0.3
    common = torch.randn(groups, rows, 1, generator=generator)
    return (torch.randn(groups, rows, unknowns, generator=generator) @ mixing + common + 0.3).relu() * size


@pytest.fixture
def make_problem() -> MakeProblem:
    """Make a layer's problem, whose targets are what the float layer makes of the inputs.

    `rows` are to fit on, a quarter as many judge; with one row, it does both. `change(inputs, weight)` may spoil both in place.
    """

    def make(
        groups: int = 1,
        outputs: int = 6,
        unknowns: int = 12,
        rows: int = 400,
        weight_grid: Grid = Grid(4, symmetric=True),  # noqa: B008 - a frozen value
        activation_grid: Grid | None = Grid(4),  # noqa: B008 - a frozen value
        seed: int = 0,
        change: Callable[[Tensor, Tensor], object] | None = None,
    ) -> LayerProblem:
        generator = torch.Generator().manual_seed(seed)
        inputs = correlated(groups, rows + -(-rows // 4), unknowns, generator)
        weight = torch.randn(groups, outputs, unknowns, generator=generator) * 0.3
        bias = torch.randn(groups, outputs, generator=generator)
        if change is not None:
            change(inputs, weight)
        targets = torch.baddbmm(bias[:, None, :], inputs, weight.mT)
        fit, judge = Rows(inputs[:, :rows], targets[:, :rows]), Rows(inputs[:, rows:], targets[:, rows:])
        return LayerProblem("layer", weight, bias, fit, fit if rows == 1 else judge, weight_grid, activation_grid, rows)

    return make

"""Recipes: which steps they take, that each can only help, and that the light one needs no backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte import Budget, Choices, Recipe, Widths

RECIPES: dict[str, Callable[[], Recipe]] = {
    make.__name__: make
    for make in (
        subbyte.default,
        subbyte.light,
        subbyte.advanced,
        subbyte.relaxed,
        subbyte.thorough,
        subbyte.weight_only,
        subbyte.rounding,
    )
}
WIDTHS = {name: Widths(3, None if name == "weight_only" else 3) for name in RECIPES}
GRADIENTS = ("torch.Tensor.backward", "torch.autograd.backward", "torch.autograd.grad")


@pytest.fixture
def network() -> nn.Module:
    layers = (nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 4, 5))
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.bias.normal_(0, 0.3)
    return model.eval()


@pytest.fixture
def data() -> Tensor:
    return torch.randn(64, 2, 6, 6)


def forbidden(*args: object, **kwargs: object) -> Any:
    raise AssertionError("a gradient was asked for")


@pytest.mark.parametrize("asked", [{"widths": Widths(3, 3)}, {"budget": Budget(size=0.6)}], ids=["widths", "budget"])
def test_light_needs_no_backward_pass(asked: dict[str, Any], network: nn.Module, data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GRADIENTS:
        monkeypatch.setattr(name, forbidden)
    result = subbyte.quantize(network, data, recipe=subbyte.light(), **asked)
    assert [report.name for report in result.refinements] == ["BatchNormTuning"]
    with pytest.raises(AssertionError, match="a gradient was asked for"):  # the patch does notice
        subbyte.quantize(network, data, recipe=subbyte.advanced(), **asked)


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_lowers_the_held_out_loss_or_is_taken_back(name: str, network: nn.Module, data: Tensor) -> None:
    result = subbyte.quantize(network, data, widths=WIDTHS[name], recipe=RECIPES[name]())
    losses = [result.measured.baseline_loss, result.measured.loss]
    for report in result.refinements:
        assert report.start_loss == losses[-1]
        losses.append(min(report.loss, report.start_loss) if report.kept else report.start_loss)
        assert f"{report.name}: {report.start_loss:.4g} -> {report.loss:.4g}" in str(result)
    assert losses == sorted(losses, reverse=True) and result.loss == losses[-1]


@pytest.mark.parametrize(
    ("name", "weight_bits", "inputs"),
    [
        ("default", range(2, 9), 8),
        ("rounding", range(2, 9), 8),
        ("light", range(2, 9), 8),
        ("advanced", range(2, 9), 8),
        ("relaxed", range(2, 9), "same"),
        ("thorough", range(2, 9), 8),
        ("weight_only", range(2, 9), None),
    ],
)
def test_a_recipe_says_among_which_widths_a_budget_chooses(
    name: str, weight_bits: range, inputs: int | str | None, network: nn.Module, data: Tensor
) -> None:
    result = subbyte.quantize(network, data, budget=Budget(average_bits=5.0), recipe=RECIPES[name]())
    assert result.plan is not None and result.plan.budget.choices == RECIPES[name]().choices
    for row in result.plan.market.options.values():
        assert row == tuple((bits, bits if inputs == "same" else inputs) for bits in weight_bits)
    assert all(result.allocation[layer] in row for layer, row in result.plan.market.options.items())


def test_a_budgets_own_choices_win_over_the_recipes(network: nn.Module, data: Tensor) -> None:
    budget = Budget(average_bits=6.0, choices=Choices((5, 6)))
    result = subbyte.quantize(network, data, budget=budget, recipe=subbyte.advanced())
    assert set(result.allocation.values()) <= {(5, 5), (6, 6)}
    assert result.plan is not None
    assert set(result.plan.solve(Budget(average_bits=5.0)).options.values()) == {(5, 5)}, "another budget has the plan's choices"


@pytest.mark.parametrize("loss", [None, subbyte.KLDivergence()])
def test_a_receipt_says_what_may_choose_better_for_a_classifier(network: nn.Module, data: Tensor, loss: subbyte.OutputLoss | None) -> None:
    result = subbyte.quantize(network, data, budget=Budget(average_bits=6.0, loss=loss), recipe=subbyte.rounding())
    assert ("--classifier" in str(result)) is (loss is None)

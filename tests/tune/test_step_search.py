"""Step search finds steps that suit the model, by losses alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte import MinMax, OptionError, Range, Recipe, RoundToNearest, StepSearch, Widths
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.models import Models
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.whole import Judge
from subbyte.run.events import Observer


@dataclass(frozen=True)
class TooWide(Range):
    """Steps that are `factor` times as large as they should be."""

    factor: float = 1.5

    def candidates(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `Range`."""
        low, high = MinMax().candidates(values)
        return low * self.factor, high * self.factor


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)).eval()


def quantized(refinement: Refinement, factor: float = 1.5, model: nn.Module | None = None) -> subbyte.Result:
    solver = RoundToNearest(weight_range=TooWide(factor), activation_range=TooWide(factor))
    recipe = Recipe(solver=solver, baseline=solver, equalization=None, refinements=(refinement,))
    return subbyte.quantize(model or net(), torch.randn(128, 8), widths=Widths(4, 4), recipe=recipe)


def test_it_undoes_steps_that_are_too_large() -> None:
    report = quantized(StepSearch(sweeps=4), factor=2.0).refinements[0]
    assert report.kept and report.loss < 0.8 * report.start_loss


def test_more_sweeps_never_have_more_loss_on_what_they_see() -> None:
    @dataclass(frozen=True)
    class Noting(Refinement):
        inner: StepSearch

        def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
            notes.extend(self.inner.refine_(models, data, judge, observer))
            return ()

    notes: list[str] = []
    for sweeps in (1, 2, 4):
        quantized(Noting(StepSearch(sweeps=sweeps)))
    losses = [[float(word) for word in note.split("sees ")[1].split(" -> ")] for note in notes]
    assert len({first for first, _ in losses}) == 1
    assert losses[0][0] > losses[0][1] >= losses[1][1] >= losses[2][1]


def test_inputs_in_float_and_codes_inside_their_grids() -> None:
    solver = RoundToNearest(weight_range=TooWide(2.0))
    recipe = Recipe(solver=solver, baseline=solver, equalization=None, refinements=(StepSearch(),))
    result = subbyte.quantize(net(), torch.randn(128, 8), widths=Widths(3, None), recipe=recipe)
    assert result.refinements[0].kept
    for name in ("0", "2", "4"):
        state = result.model.get_submodule(name).state()
        assert state.weight_grid.lowest <= int(state.codes.min()) and int(state.codes.max()) <= state.weight_grid.highest


def test_it_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a gradient was asked for")

    solver = RoundToNearest(weight_range=TooWide())
    recipe = Recipe(solver=solver, baseline=solver, equalization=None, behind_clips=False, refinements=(StepSearch(sweeps=1),))
    for name in ("torch.Tensor.backward", "torch.autograd.backward", "torch.autograd.grad"):
        monkeypatch.setattr(name, forbidden)
    assert subbyte.quantize(net(), torch.randn(64, 8), widths=Widths(4, 4), recipe=recipe).refinements


@pytest.mark.parametrize("wrong", [{"sweeps": 0}, {"samples": 0}, {"distance": 0.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="positive"):
        StepSearch(**wrong)  # type: ignore[arg-type]

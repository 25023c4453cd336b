"""Every refinement runs the same body: never worse, the same twice, nothing left behind; and the guard takes back what does not help."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte import Blockwise, Networkwise, Recipe, Refinement, StepSearch, Widths
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.models import Models
from subbyte.calibrate.whole import Judge
from subbyte.model.quantized_layer import QuantizedLayer
from subbyte.run.events import Event, Observer, StageFinished, StageStarted

TRAINING = (Blockwise(iterations=60, checks=4), Networkwise(iterations=150, mixing=0.0))
refinements = pytest.mark.parametrize("refinement", (*TRAINING, StepSearch()), ids=lambda refinement: refinement.name)
training = pytest.mark.parametrize("refinement", TRAINING, ids=lambda refinement: refinement.name)


class Net(nn.Module):
    """Two residual blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def data(count: int = 128) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, generator=chance) @ torch.randn(3, 8, generator=chance) + 0.1 * torch.randn(count, 8, generator=chance)


def run(*refinements: Refinement, samples: object = None, model: nn.Module | None = None, **others: object) -> subbyte.Result:
    recipe = Recipe(solver=subbyte.RoundToNearest(), equalization=None, refinements=refinements)  # a start with much to gain
    return subbyte.quantize(model or net(), data() if samples is None else samples, widths=Widths(3, 4), recipe=recipe, **others)  # type: ignore[arg-type]


@refinements
def test_it_lowers_the_loss_of_a_plainly_rounded_model(refinement: Refinement) -> None:
    result = run(refinement)
    report = result.refinements[0]
    assert report.kept and result.loss == report.loss < (0.8 if refinement in TRAINING else 1.0) * report.start_loss
    assert report.start_loss == result.measured.loss


@refinements
def test_the_reported_loss_is_that_of_the_returned_model(refinement: Refinement) -> None:
    result, model = run(refinement), net()
    held = subbyte.quantize(model, data(), widths=Widths(3, 4)).measured.held_out_samples
    with torch.no_grad():
        losses = [float((result.model(x) - model(x)).square().sum() / model(x).square().sum()) for x in data()[:, None]]
    assert held == 16 and min(losses) < result.loss < max(losses)


@refinements
def test_the_same_twice(refinement: Refinement) -> None:
    first, second = run(refinement), run(refinement)
    assert torch.equal(first.model(data()), second.model(data()))
    assert first.loss == second.loss


@refinements
def test_global_chance_and_the_float_model_are_not_touched(refinement: Refinement) -> None:
    model, chosen = net(), data()
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(refinement, model=model, samples=chosen)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@refinements
def test_nothing_is_left_behind_and_the_file_is_as_large_as_before(refinement: Refinement) -> None:
    result = run(refinement)
    layers = [module for module in result.model.modules() if isinstance(module, QuantizedLayer)]
    assert len(layers) == 6
    for layer in layers:
        state = layer.state()
        assert "forward" not in vars(layer) and not layer._forward_hooks
        assert state.codes.dtype == torch.int16
        assert int(state.codes.min()) >= state.weight_grid.lowest and int(state.codes.max()) <= state.weight_grid.highest
        assert not any(tensor.requires_grad for tensor in (state.scale, state.bias, layer.weight))
    assert result.size_bytes == run().size_bytes


@refinements
@pytest.mark.parametrize(
    "samples",
    [
        [data(20), data(12)],
        [(data(16),), (data(9),)],
        [{"x": data(16)}],
        data(1),
        data(2),
    ],
    ids=["batches", "tuples", "mappings", "one sample", "two samples"],
)
def test_any_batches_do(refinement: Refinement, samples: object) -> None:
    result = run(refinement, samples=samples)
    assert result.loss <= result.measured.loss <= result.measured.baseline_loss


@refinements
def test_layers_that_are_called_twice_or_skipped_do_no_harm(refinement: Refinement) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.sometimes, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.twice(torch.relu(self.twice(x))))
            return self.head(torch.relu(self.sometimes(x)) if len(x) > 10 else x)

    torch.manual_seed(0)
    result = run(refinement, samples=[data(32), data(8)], model=Odd().eval())
    assert result.loss <= result.measured.loss


@refinements
def test_the_observer_is_told_of_start_and_end(refinement: Refinement) -> None:
    seen: list[Event] = []
    run(refinement, observer=seen.append)
    assert [e.stage for e in seen if isinstance(e, StageStarted)][-1] == refinement.name
    assert [e.stage for e in seen if isinstance(e, StageFinished)][-1] == refinement.name


@dataclass(frozen=True)
class Spoiling(Refinement):
    """Makes everything worse: wrong biases, NaN if asked, and other parameters of the model too."""

    by: float

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        for item in models.layers:
            state = item.quantized.state()
            item.quantized.assign_(replace(state, bias=state.bias + self.by))
        with torch.no_grad():
            for parameter in models.quantized.parameters():
                parameter.add_(self.by)
        return ("spoilt",)


class Normed(Net):
    """With parameters that no quantized layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("by", [0.5, float("nan")])
def test_what_does_not_help_is_taken_back_to_the_bit(by: float) -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    plain, spoilt = run(model=model), run(Spoiling(by), model=model)
    report = spoilt.refinements[0]
    assert not report.kept and report.notes == ("spoilt",)
    assert spoilt.loss == plain.loss == report.start_loss
    assert torch.equal(plain.model(data()), spoilt.model(data()))
    assert "not better, so not kept" in str(spoilt)


@dataclass(frozen=True)
class Undecided(Refinement):
    """Gives layers and parameters other values, and the old ones back; or leaves them there."""

    back: bool

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        layer, state = models.layers[0].quantized, models.layers[0].quantized.state()
        layer.assign_(replace(state, scale=state.scale * 2))
        if self.back:
            layer.assign_(state)
        return (f"{judge.loss_of(models.quantized)}",)


def test_only_what_has_changed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []
    loss_of = Judge.loss_of
    monkeypatch.setattr(Judge, "loss_of", lambda judge, model: measured.append(loss_of(judge, model)) or measured[-1])
    for back, times in ((True, 1), (False, 2)):  # its own look, and the guard's if there is something to see
        run()
        before = len(measured)
        measured.clear()
        report = run(Undecided(back)).refinements[0]
        assert len(measured) == before + times
        assert not report.kept and (report.loss == report.start_loss) == back
        assert float(report.notes[0]) == report.loss, "the judge it is given is the guard's"
        measured.clear()


def test_refinements_follow_each_other_from_what_was_kept() -> None:
    result = run(Spoiling(0.5), Networkwise(iterations=150, mixing=0.0), Spoiling(0.1))
    first, second, third = result.refinements
    assert (first.kept, second.kept, third.kept) == (False, True, False)
    assert second.start_loss == first.start_loss and third.start_loss == second.loss == result.loss


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"weight_rate": -1.0}, {"batch_samples": 0}], ids=str)
@pytest.mark.parametrize("kind", [Blockwise, Networkwise])
def test_impossible_settings_are_refused(kind: type[Refinement], wrong: dict[str, float]) -> None:
    with pytest.raises(subbyte.OptionError, match="positive counts"):
        kind(**wrong)


@training
def test_a_model_without_gradients_is_left_as_it_was(refinement: Refinement) -> None:
    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    torch.manual_seed(0)
    result = run(refinement, model=Detached().eval())
    assert result.loss == result.measured.loss


@refinements
def test_it_works_in_inference_mode_too(refinement: Refinement) -> None:
    with torch.inference_mode():
        result = run(refinement)
    assert result.refinements[0].kept


def test_what_is_read_of_layers_counts_and_what_is_clipped_does_not() -> None:
    """The layers' share changes what is found: it is not only the outputs that are fitted."""
    with_layers, without = run(Networkwise(iterations=150, mixing=0.0)), run(Networkwise(iterations=150, mixing=0.0, layer_share=0.0))
    assert not torch.equal(with_layers.model(data()), without.model(data()))


def test_mixtures_of_held_out_samples_judge_too_unless_nothing_can_be_mixed() -> None:
    few, many = (subbyte.quantize(net(), data(), widths=Widths(3, 4), recipe=Recipe(mixtures=each)) for each in (0, 3))
    assert (few.measured.held_out_samples, few.measured.mixtures, many.measured.mixtures) == (16, 0, 48)
    assert torch.equal(few.model(data()), many.model(data())) and few.loss != many.loss
    assert "on 16 held-out of 128 samples and 48 mixtures of them" in str(many) and "mixtures" not in str(few)
    words = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)).eval()
    tokens = torch.arange(160).reshape(16, 10) % 10
    assert subbyte.quantize(words, tokens, widths=Widths(4, 8)).measured.mixtures == 0


def test_a_model_that_does_not_take_mixtures_is_judged_without() -> None:
    class Corners(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not bool((x.abs() == 1).all()):
                raise ValueError("corners only")
            return super().forward(x)

    result = subbyte.quantize(Corners().eval(), data().sign(), widths=Widths(3, 4), recipe=Recipe(equalization=None))
    assert (result.measured.held_out_samples, result.measured.mixtures) == (16, 0)


def test_networkwise_sees_what_the_augmentation_makes() -> None:
    seen: list[int] = []

    def noted(batch: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(batch))
        return batch

    run(Networkwise(iterations=5, augment=noted))
    assert len(seen) == 5 and max(seen) <= 32

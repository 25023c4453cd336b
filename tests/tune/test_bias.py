"""Bias tuning: what it trains, what it leaves, that it stops in time, and that chance and modes do not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import subbyte
from subbyte import BiasTuning, CosineDistance, KLDivergence, OptionError, OutputLoss, Recipe, RelativeSquaredError, Widths
from subbyte.calibrate.fit_samples import mixed
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.kept import Kept
from subbyte.calibrate.models import Models, prepare
from subbyte.calibrate.passes import calibrate_
from subbyte.calibrate.whole import MIXTURES, Judge
from subbyte.model.batches import Batch, as_batches
from subbyte.model.layers import survey
from subbyte.model.quantized_layer import QuantizedState
from subbyte.model.replace import copy_of
from subbyte.quantizers.grid import WeightGrids
from subbyte.run.bank import Bank
from subbyte.run.events import Event, StageFinished, StageStarted, StepDone, ignore
from subbyte.tune.optimizer import SGD, Adam, Optimizer
from subbyte.tune.tuned_layer import TunedLayer

ROUNDED = subbyte.rounding()
QUICK = BiasTuning(epochs=6, bias_rate=1e-2)


def network() -> nn.Sequential:
    layers = (nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(6 * 4, 5)).eval()


def rounded(model: nn.Module, batches: Sequence[Batch], held_out: int = 2) -> tuple[Models, CalibrationSet]:
    """The model with plain rounding to 3 bits; the first samples of each batch are held out."""
    batches = as_batches(batches)
    found, _ = survey(model, batches)
    options: dict[str, tuple[int, int | None]] = {layer.name: (3, 3) for layer in found.layers}
    models = prepare(copy_of(model), found.layers, options, {}, {}, WeightGrids(symmetric=True))
    counts = [len(next(iter(batch.values())) if isinstance(batch, dict) else batch) for batch in batches]
    data = CalibrationSet(batches, tuple(torch.arange(count) < held_out for count in counts), 0)
    calibrate_(models, data, ROUNDED.method, ROUNDED.flavour, Kept(Bank(), ""), ignore)
    return models, data


@pytest.fixture
def setting() -> tuple[Models, CalibrationSet]:
    return rounded(network(), list(torch.randn(48, 2, 6, 6).split(16)))


def states(models: Models) -> list[QuantizedState]:
    return [item.quantized.state() for item in models.layers]


def others(models: Models) -> dict[str, Tensor]:
    """Everything in the quantized model that is not a quantized layer's."""
    inside = tuple(f"{item.layer.name}." for item in models.layers)
    return {name: tensor.clone() for name, tensor in models.quantized.state_dict().items() if not name.startswith(inside)}


def judge_of(models: Models, data: CalibrationSet) -> Judge:
    return Judge.of(models.original, data, RelativeSquaredError()).with_mixtures(models.original, MIXTURES, data.seed)


def held_out_loss(models: Models, data: CalibrationSet, loss: OutputLoss) -> float:
    return replace(judge_of(models, data), loss=loss).loss_of(models.quantized)


def test_only_biases_change_and_the_held_out_loss_falls(setting: tuple[Models, CalibrationSet]) -> None:
    models, data = setting
    before, rest, start = states(models), others(models), held_out_loss(models, data, QUICK.stop_by)
    (note,) = QUICK.refine_(models, data, judge_of(models, data), ignore)
    for old, new in zip(before, states(models), strict=True):
        assert new.codes is old.codes and new.scale is old.scale and new.zero_point is old.zero_point
        assert old.activation is not None and new.activation is not None
        assert all(a is b for a, b in zip(old.activation, new.activation, strict=True))
        assert not torch.equal(new.bias, old.bias)
    assert all(torch.equal(tensor, rest[name]) for name, tensor in others(models).items())
    end = held_out_loss(models, data, QUICK.stop_by)
    assert end < start and f"{start:.4g} -> {end:.4g}" in note, "the best state is kept, and it is what the note says"


def test_steps_change_if_asked_for_and_codes_do_not(setting: tuple[Models, CalibrationSet]) -> None:
    models, data = setting
    before = states(models)
    replace(QUICK, step_rate=1e-2).refine_(models, data, judge_of(models, data), ignore)
    for old, new in zip(before, states(models), strict=True):
        assert new.codes is old.codes and not torch.equal(new.scale, old.scale) and bool((new.scale > 0).all())
        assert old.activation is not None and new.activation is not None
        assert new.activation[0] != old.activation[0] and new.activation[1] is old.activation[1]


def test_biases_of_norms_change_if_asked_for(setting: tuple[Models, CalibrationSet]) -> None:
    models, data = setting
    before = others(models)
    (note,) = replace(QUICK, norm_biases=True, bias_rate=2e-3).refine_(models, data, judge_of(models, data), ignore)
    assert note.startswith("best after")
    after = others(models)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["3.bias"]
    assert all(parameter.grad is None for parameter in models.quantized.parameters())


def test_a_refinement_that_is_not_kept_takes_the_biases_of_norms_back() -> None:
    @dataclass(frozen=True)
    class Opposite(OutputLoss):
        def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
            above, below = RelativeSquaredError().total(reference, output)
            return -above, below

    model, data = network(), torch.randn(48, 2, 6, 6)
    plain = subbyte.quantize(model, data, widths=Widths(3, 3), recipe=ROUNDED)
    harmful = replace(QUICK, loss=Opposite(), stop_by=Opposite(), layer_share=0.0, norm_biases=True)
    result = subbyte.quantize(model, data, widths=Widths(3, 3), recipe=replace(ROUNDED, refinements=(harmful,)))
    assert not result.refinements[0].kept and result.refinements[0].loss > result.loss
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), result.model.state_dict().values(), strict=True))


@pytest.mark.parametrize("loss", [RelativeSquaredError(), KLDivergence(), KLDivergence(4.0), CosineDistance()])
@pytest.mark.parametrize(("optimizer", "rate"), [(Adam(), 1e-2), (SGD(), None)])
def test_every_loss_falls_with_every_optimizer(
    loss: OutputLoss, optimizer: Optimizer, rate: float | None, setting: tuple[Models, CalibrationSet]
) -> None:
    models, data = setting
    start = held_out_loss(models, data, loss)
    rate = rate or (1.0 if loss == KLDivergence(4.0) else 3e-2)  # the loss's own scale counts for it
    BiasTuning(loss=loss, stop_by=loss, optimizer=optimizer, epochs=6, patience=6, bias_rate=rate).refine_(
        models, data, judge_of(models, data), ignore
    )
    assert held_out_loss(models, data, loss) < start


def test_a_users_own_loss_and_augmentation_are_used(setting: tuple[Models, CalibrationSet]) -> None:
    models, data = setting
    shown: list[int] = []

    @dataclass(frozen=True)
    class FirstClass(OutputLoss):
        def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
            return RelativeSquaredError().total(reference[:, :1], output[:, :1])

    def flipped(batch: Tensor, generator: torch.Generator) -> Tensor:
        shown.append(len(batch))
        return torch.where(torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5, batch.flip(3), batch)

    start = held_out_loss(models, data, FirstClass())
    replace(QUICK, loss=FirstClass(), stop_by=FirstClass(), augment=flipped, patience=6).refine_(
        models, data, judge_of(models, data), ignore
    )
    assert held_out_loss(models, data, FirstClass()) < start
    assert sum(shown) == 6 * (48 - 3 * 2), "every sample that is not held out, once an epoch"


def test_it_ends_when_nothing_gets_better(setting: tuple[Models, CalibrationSet]) -> None:
    models, data = setting
    before, rest = states(models), others(models)
    (note,) = BiasTuning(bias_rate=1e3, epochs=50, patience=2, norm_biases=True).refine_(models, data, judge_of(models, data), ignore)
    assert note.startswith("nothing better found in 2 epochs")
    assert all(a.bias is b.bias for a, b in zip(before, states(models), strict=True))
    assert all(torch.equal(tensor, rest[name]) for name, tensor in others(models).items())


def test_rates_that_are_too_high_are_backed_off_from(setting: tuple[Models, CalibrationSet]) -> None:
    models, data = setting
    before, start = states(models), held_out_loss(models, data, QUICK.stop_by)
    too_high = replace(QUICK, bias_rate=1e2, epochs=12, patience=12)
    (note,) = replace(too_high, backoff=1.0).refine_(models, data, judge_of(models, data), ignore)
    assert note.startswith("nothing better found") and all(a.bias is b.bias for a, b in zip(before, states(models), strict=True))
    (note,) = replace(too_high, backoff=0.1).refine_(models, data, judge_of(models, data), ignore)
    assert note.startswith("best after") and held_out_loss(models, data, QUICK.stop_by) < start


def test_layers_have_a_share_in_what_is_trained() -> None:
    """The first layer's output does not reach the model's; only its own error says where its bias has to go."""

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 3)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x) + 0.0 * self.first(x).sum(1, keepdim=True)

    models, data = rounded(Silent(), list(torch.randn(96, 4, generator=torch.Generator().manual_seed(0)).split(32)))
    for item in models.layers:
        state = item.quantized.state()
        item.quantized.assign_(replace(state, bias=state.bias + 0.5))
    silent = next(item for item in models.layers if item.layer.name == "first")
    before = silent.quantized.state().bias
    seen = torch.cat([torch.as_tensor(batch) for batch in data.batches])

    @torch.no_grad()
    def error() -> float:
        return float((silent.quantized(seen) - silent.original(seen)).square().mean())

    start = error()
    (note,) = replace(QUICK, layer_share=0.0).refine_(models, data, judge_of(models, data), ignore)
    assert note.startswith("best after") and torch.equal(silent.quantized.state().bias, before)
    (note,) = replace(QUICK, bias_rate=3e-2).refine_(models, data, judge_of(models, data), ignore)
    assert note.startswith("best after") and error() < start


def test_held_out_samples_have_no_say_in_what_is_trained(setting: tuple[Models, CalibrationSet]) -> None:
    """One epoch, so that there is nothing to choose: what the held-out samples are changes nothing."""
    models, data = setting
    twin = replace(models, quantized=copy_of(models.quantized))
    twin = replace(twin, layers=tuple(replace(item, quantized=twin.quantized.get_submodule(item.layer.name)) for item in models.layers))
    spoiled = tuple(
        torch.where(mask[:, None, None, None], 0.9 * batch, batch) for batch, mask in zip(data.batches, data.held_out, strict=True)
    )
    once = replace(QUICK, epochs=1, mixing=0.0)
    once.refine_(models, data, judge_of(models, data), ignore)
    other = replace(data, batches=spoiled)
    once.refine_(twin, other, judge_of(twin, other), ignore)
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(states(models), states(twin), strict=True))


def test_the_layer_computes_what_the_quantized_layer_does_and_rounding_is_passed_straight_through() -> None:
    models, _ = rounded(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), [torch.randn(32, 4)])
    item = models.layers[0]
    for with_steps in (False, True):
        tuned = TunedLayer(item, with_steps=with_steps)
        x = torch.randn(9, 4)
        assert torch.equal(tuned(x), item.quantized(x))
        inside = torch.zeros(1, 4, requires_grad=True)  # zero is on every grid, so never clipped
        tuned(inside).sum().backward()
        torch.testing.assert_close(inside.grad, item.quantized.weight.sum(dim=0, keepdim=True))
        outside = torch.full((1, 4), 1e6, requires_grad=True)
        tuned(outside).sum().backward()
        assert not outside.grad.any()
        with torch.no_grad():
            tuned.bias += 1.0
            for step in tuned.steps:
                step += 0.1
        expected = tuned(x)
        item.quantized.assign_(tuned.state())
        torch.testing.assert_close(item.quantized(x), expected)


def test_biases_alone_want_no_gradient_of_the_weight() -> None:
    models, _ = rounded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), [torch.randn(32, 3, 8, 8)])
    item, asked = models.layers[1], []
    tuned, x = TunedLayer(item, with_steps=False), torch.randn(5, 4, 6, 6, requires_grad=True)

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.convolution_backward.default:
                asked.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Asked():
        y = tuned(x)
        y.sum().backward()
    assert asked == [[True, False, False]]
    assert x.grad is not None and torch.equal(tuned.bias.grad, torch.full((2,), float(5 * 4 * 4)))
    torch.testing.assert_close(y, item.quantized(x))


def test_a_table_has_no_bias_to_tune() -> None:
    models, _ = rounded(Embedded().eval(), [{"ids": torch.randint(0, 11, (8, 5))}])
    item = next(item for item in models.layers if not item.layer.operator.multiplies)
    tuned, ids = TunedLayer(item, with_steps=False), torch.arange(11)
    with torch.no_grad():
        tuned.bias += 1.0
    assert torch.equal(tuned(ids), item.quantized(ids))


def test_mixing_is_convex_and_leaves_integers() -> None:
    batch = {"x": torch.randn(50, 3), "ids": torch.arange(50), "scale": torch.tensor(2.0)}
    generator = torch.Generator().manual_seed(0)
    given = mixed(batch, 0.5, generator)
    assert torch.equal(given["ids"], batch["ids"]) and given["scale"] is batch["scale"]
    shares = []
    for row in range(50):
        away, span = given["x"][row] - batch["x"][row], batch["x"] - batch["x"][row]
        ratios = [float(away @ d / (d @ d)) for d in span if bool(d.any()) and torch.allclose(away, (away @ d / (d @ d)) * d, atol=1e-5)]
        shares.append(min(ratios, default=0.0) if bool(away.abs().max() > 1e-6) else 0.0)
    assert 0 <= min(shares) and 0.4 < max(shares) <= 0.5


class Embedded(nn.Module):
    """Token ids, by name, in; as in a text model."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.table(ids))), "lengths": torch.full((len(ids),), ids.shape[1])}


def test_token_ids_are_served_and_the_receipt_says_that_they_were_not_mixed() -> None:
    batches = [{"ids": torch.randint(0, 11, (8, length))} for length in (5, 7, 6)]
    recipe = replace(ROUNDED, refinements=(replace(QUICK, mixing=0.5),))
    result = subbyte.quantize(Embedded().eval(), batches, widths=Widths(3, 3), recipe=recipe)
    assert "nothing was mixed: inputs are no floating-point numbers" in str(result)
    assert result.refinements[0].loss <= result.refinements[0].start_loss


def test_a_model_that_takes_no_part_of_a_batch_is_left_as_it_is() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(16, 4))

    models, data = rounded(Fixed().eval(), [torch.randn(16, 4)])
    before = states(models)
    assert QUICK.refine_(models, data, judge_of(models, data), ignore)[0].startswith(
        "nothing done: the model does not run on a part of a batch"
    )
    assert states(models)[0].bias is before[0].bias


@pytest.mark.parametrize("obstacle", [lambda y: y.detach(), lambda y: torch.from_numpy(y.numpy() * 1.0)], ids=["detach", "numpy"])
def test_a_model_without_gradients_is_left_as_it_is(obstacle: Callable[[Tensor], Tensor]) -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return obstacle(self.fc(x))

    models, data = rounded(Opaque().eval(), [torch.randn(16, 4)])
    before = states(models)
    (note,) = replace(QUICK, layer_share=0.0).refine_(models, data, judge_of(models, data), ignore)
    assert note.startswith("nothing done: the model cannot be differentiated: ")
    assert states(models)[0].bias is before[0].bias
    assert all(parameter.grad is None for parameter in models.quantized.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_chance_and_mode_of_the_caller_do_not_matter(mode: Callable[[], Any]) -> None:
    model, data = network(), torch.randn(48, 2, 6, 6)
    recipe = Recipe(refinements=(replace(QUICK, mixing=0.5),))
    expected = subbyte.quantize(model, data, widths=Widths(3, 3), recipe=recipe).model.state_dict()
    torch.manual_seed(9)
    with mode():
        given = subbyte.quantize(model, data.clone(), widths=Widths(3, 3), recipe=recipe).model.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in expected.items())


def test_the_observer_is_told(setting: tuple[Models, CalibrationSet]) -> None:
    events: list[Event] = []
    QUICK.refine_(*setting, judge_of(*setting), events.append)
    (started, *steps, ended) = events
    assert (
        isinstance(started, StageStarted) and (started.stage, started.unit) == ("BiasTuning", "steps") and isinstance(ended, StageFinished)
    )
    assert 0 < len(steps) <= started.total and set(steps) == {StepDone("BiasTuning")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: BiasTuning(epochs=0),
        lambda: BiasTuning(batch_samples=0),
        lambda: BiasTuning(patience=0),
        lambda: BiasTuning(bias_rate=-1.0),
        lambda: BiasTuning(step_rate=-1.0),
        lambda: BiasTuning(mixing=1.5),
        lambda: BiasTuning(layer_share=-1.0),
        lambda: BiasTuning(backoff=0.0),
        lambda: BiasTuning(backoff=2.0),
        lambda: Adam(betas=(0.9, 1.0)),
        lambda: Adam(epsilon=0.0),
        lambda: SGD(momentum=1.0),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(OptionError):
        make()


@pytest.mark.parametrize(("stop_by", "known"), [(RelativeSquaredError(), True), (KLDivergence(), False)])
def test_a_loss_that_is_known_is_not_measured_again(setting: tuple[Models, CalibrationSet], stop_by: OutputLoss, *, known: bool) -> None:
    models, data = setting
    judge = replace(judge_of(models, data), start_loss=1e-12)  # nothing is better than that
    (note, *_) = replace(QUICK, epochs=1, stop_by=stop_by).refine_(models, data, judge, ignore)
    assert ("1e-12" in note) is known and ("nothing better" in note) >= known

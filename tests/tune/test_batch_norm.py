"""Batch-norm tuning against a batch norm that really is put back, re-estimated and folded, and on layers of every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte import BatchNormTuning, Recipe, Widths
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.kept import Kept
from subbyte.calibrate.models import Models, prepare
from subbyte.calibrate.passes import calibrate_
from subbyte.calibrate.whole import Judge
from subbyte.model.batches import as_batches
from subbyte.model.fold import fold_batch_norms_, norm_outputs
from subbyte.model.input_factors import exponents_of, put_exponents_
from subbyte.model.layers import survey
from subbyte.model.operators import Linear
from subbyte.model.quantized_layer import QuantizedLayer
from subbyte.model.replace import copy_of
from subbyte.quantizers.grid import Grid, WeightGrids
from subbyte.run.bank import Bank
from subbyte.run.events import Event, StageFinished, StageStarted, ignore
from subbyte.tune.batch_norm import ChannelStatistics, Reference, re_estimated

ROUNDED = subbyte.rounding()


def trained(*modules: nn.Module) -> nn.Sequential:
    """A network whose batch norms have gains, biases and statistics of their own."""
    model = nn.Sequential(*modules)
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)  # of both signs
            nn.init.normal_(module.bias)
    return model.eval()


def rounded(
    model: nn.Module, data: Tensor | Sequence[Tensor], held_out: Sequence[int] = (), factors: Mapping[str, Tensor] | None = None
) -> tuple[Models, CalibrationSet]:
    """The model with plain rounding to 2-bit weights and 3-bit inputs, and its calibration set; `held_out` counts over all samples.
    `factors`: exponents of what linear layers multiply their input by, by name."""
    batches = as_batches(data)
    found, _ = survey(model, batches)
    original = copy_of(model)
    folds = fold_batch_norms_(original, found.layers, batches)
    for name, exponents in (factors or {}).items():
        put_exponents_(original.get_submodule(name), exponents, Linear())
    options = {layer.name: (2, 3) for layer in found.layers}
    models = prepare(original, found.layers, options, {}, norm_outputs(model, folds), WeightGrids(symmetric=True))
    counts = [len(batch) for batch in batches]
    mask = torch.zeros(sum(counts), dtype=torch.bool)
    mask[list(held_out)] = True
    calibration = CalibrationSet(batches, mask.split(counts), 0)
    calibrate_(models, calibration, ROUNDED.method, ROUNDED.flavour, Kept(Bank(), ""), ignore)
    return models, calibration


def judge_of(models: Models, data: CalibrationSet) -> Judge:
    return Judge.of(models.original, data, subbyte.RelativeSquaredError())


def fit_samples(data: CalibrationSet) -> list[Tensor]:
    return [batch[~mask] for batch, mask in zip(data.batches, data.held_out, strict=True)]


def outputs_of(layer: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """What a layer returns, call by call."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return seen


def moments(outputs: Sequence[Tensor], dimension: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel, by hand, in double precision."""
    flat = torch.cat([output.double().movedim(dimension, 0).flatten(1) for output in outputs], dim=1)
    return flat.mean(dim=1), flat.var(dim=1, correction=0)


def test_it_is_the_papers_identity_re_estimated_and_folded_again() -> None:
    """The literal way: batch norms behind the quantized layers, identities at first; then each is given exact statistics, in order."""
    model = trained(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.02), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2), nn.BatchNorm2d(4), nn.ReLU())
    models, data = rounded(model, torch.randn(40, 3, 8, 8), held_out=[0, 3, 39])
    literal = copy_of(models.quantized)
    for place, norm in ((1, model[1]), (4, model[4])):
        back = type(norm)(norm.num_features, eps=norm.eps).eval()
        back.running_mean.copy_(norm.bias.detach())
        back.running_var.copy_(norm.weight.detach().square())
        with torch.no_grad():
            back.bias.copy_(norm.bias)
            back.weight.copy_((norm.weight.square() + norm.eps).sqrt())
        literal[place] = back
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(literal(x), models.quantized(x))  # an identity at first
    for place in (0, 3):
        mean, variance = moments(outputs_of(literal[place], literal, fit_samples(data)), 1)
        literal[place + 1].running_mean.copy_(mean)
        literal[place + 1].running_var.copy_(variance)
    codes = [item.quantized.codes for item in models.layers]
    notes = BatchNormTuning.paper().refine_(models, data, judge_of(models, data), ignore)
    torch.testing.assert_close(models.quantized(x), literal(x), rtol=1e-4, atol=1e-5)
    assert [item.quantized.codes for item in models.layers] == codes, "codes are the very tensors they were"
    assert notes == ("2 batch norms re-estimated, reference: batch norm",)


KINDS: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (20, 3, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (20, 4, 6, 5)),
    (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), (20, 6, 6, 5)),
    (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (20, 2, 4, 4, 3)),
    (nn.Linear(6, 4), nn.BatchNorm1d(4), (60, 6)),
    (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (20, 3, 6)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (20, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3), (20, 2, 3, 3, 2)),
]


@pytest.mark.parametrize("reference", Reference, ids=lambda reference: reference.value)
@pytest.mark.parametrize(("layer", "norm", "shape"), KINDS, ids=[f"{layer}" for layer, _, _ in KINDS])
def test_every_channel_gets_the_statistics_of_the_reference(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], reference: Reference
) -> None:
    model = trained(layer, norm)
    models, data = rounded(model, torch.randn(shape), held_out=range(4))
    BatchNormTuning(reference).refine_(models, data, judge_of(models, data), ignore)
    dimension = -1 if isinstance(layer, nn.Linear) else 1
    if reference is Reference.BATCH_NORM:
        mean, variance = norm.bias.detach().double(), norm.weight.detach().double().square()
    else:
        mean, variance = moments(outputs_of(models.original[0], models.original, fit_samples(data)), dimension)
    found_mean, found_variance = moments(outputs_of(models.quantized[0], models.quantized, fit_samples(data)), dimension)
    torch.testing.assert_close(found_mean, mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found_variance, variance, rtol=1e-2, atol=1e-3)


def test_held_out_samples_have_no_say() -> None:
    model, data = trained(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), torch.randn(12, 2, 5, 5)
    models, calibration = rounded(model, data, held_out=[1, 2])
    spoiled = data.clone()
    spoiled[[1, 2]] *= 100
    states = []
    for batches in (calibration.batches, as_batches(spoiled)):
        again = replace(models, quantized=copy_of(models.quantized))
        layers = tuple(replace(item, quantized=again.quantized.get_submodule(item.layer.name)) for item in models.layers)
        other = replace(calibration, batches=batches)
        BatchNormTuning.paper().refine_(replace(again, layers=layers), other, judge_of(again, other), ignore)
        states.append(layers[0].quantized.state())
    assert torch.equal(states[0].scale, states[1].scale) and torch.equal(states[0].bias, states[1].bias)


def test_a_gain_of_zero_leaves_finite_numbers() -> None:
    for epsilon in (1e-5, 0.0):
        model = trained(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, eps=epsilon))
        with torch.no_grad():
            model[1].weight[1] = 0
        models, data = rounded(model, torch.randn(12, 2, 5, 5))
        BatchNormTuning.paper().refine_(models, data, judge_of(models, data), ignore)
        state = models.layers[0].quantized.state()
        assert bool(torch.isfinite(state.scale).all()) and bool((state.scale > 0).all()) and bool(torch.isfinite(state.bias).all())
        assert state.bias[1] == model[1].bias[1], "a channel that is constant is its batch norm's bias"


def test_layers_without_a_batch_norm_are_left_unless_asked_for() -> None:
    model = trained(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2))
    for asked in (False, True):
        models, data = rounded(model, torch.randn(12, 2, 6, 6))
        before = models.layers[1].quantized.state()
        notes = BatchNormTuning.paper() if not asked else replace(BatchNormTuning.paper(), without_batch_norm=True)
        told = notes.refine_(models, data, judge_of(models, data), ignore)
        after = models.layers[1].quantized.state()
        assert (after.bias is before.bias) == (not asked)
        if asked:
            wanted = moments(outputs_of(models.original[3], models.original, fit_samples(data)), 1)
            found = moments(outputs_of(models.quantized[3], models.quantized, fit_samples(data)), 1)
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)
            assert told[1] == "1 layers without a batch norm re-estimated, reference: float model"
        else:
            assert told[1] == "left as they are, without a batch norm: 3"


class Twice(nn.Module):
    """One layer that is called on its own output, before one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(x).relu()).relu())


def test_a_layer_that_is_called_twice_is_re_estimated_on_both_calls() -> None:
    models, data = rounded(Twice().eval(), list(torch.randn(60, 6).split(15)))
    shared = models.layers[0]
    before = shared.quantized.state()
    found = moments(outputs_of(shared.quantized, models.quantized, fit_samples(data)), -1)
    wanted = moments(outputs_of(shared.original, models.original, fit_samples(data)), -1)
    BatchNormTuning(without_batch_norm=True).refine_(models, data, judge_of(models, data), ignore)
    after = shared.quantized.state()
    torch.testing.assert_close(after.scale, (before.scale * (wanted[1] / found[1]).sqrt()).float(), rtol=1e-3, atol=1e-6)
    last = models.layers[1]  # sees what the shared layer has become
    got = moments(outputs_of(last.quantized, models.quantized, fit_samples(data)), -1)
    torch.testing.assert_close(got, moments(outputs_of(last.original, models.original, fit_samples(data)), -1), rtol=1e-2, atol=1e-3)


def test_a_layer_multiplies_its_input_by_its_factors_once() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    models, data = rounded(model, torch.randn(60, 4), factors={"2": torch.tensor([3, -2, 0, 1, -3, 2], dtype=torch.int8)})
    last = models.layers[1]
    assert exponents_of(last.quantized) is not None
    BatchNormTuning(without_batch_norm=True).refine_(models, data, judge_of(models, data), ignore)
    got = moments(outputs_of(last.quantized, models.quantized, data.batches), -1)
    torch.testing.assert_close(got, moments(outputs_of(last.original, models.original, data.batches), -1), rtol=1e-2, atol=1e-3)


def test_a_model_without_batch_norms_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    result = subbyte.quantize(model, torch.randn(64, 8), widths=Widths(4, 4), recipe=Recipe(refinements=(BatchNormTuning(),)))
    assert result.refinements[0].notes == ("nothing to do: no batch norm was folded into a layer",)
    assert "nothing to do: no batch norm was folded into a layer" in str(result)


def test_it_repairs_a_coarse_network_and_the_receipt_shows_it() -> None:
    torch.manual_seed(3)
    blocks = [module for _ in range(3) for module in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model, data = trained(*blocks, nn.Flatten(), nn.Linear(8 * 36, 5)), torch.randn(64, 8, 6, 6)
    recipe = replace(ROUNDED, symmetric_weights=True, refinements=(BatchNormTuning(),))
    events: list[Event] = []
    result = subbyte.quantize(model, data, widths=Widths(2, 3), recipe=recipe, observer=events.append)
    (report,) = result.refinements
    assert report.kept and result.loss == report.loss < report.start_loss
    assert "3 batch norms re-estimated" in str(result)
    stages = [event.stage for event in events if isinstance(event, StageStarted | StageFinished)]
    assert stages[-2:] == ["BatchNormTuning", "BatchNormTuning"]


@pytest.mark.parametrize("make", [lambda: torch.randn(7, 3, 5), lambda: torch.randn(7, 3), lambda: 1e4 + torch.randn(7, 3, 2, 2)])
def test_statistics_of_parts_add_up(make: Callable[[], Tensor]) -> None:
    outputs = make()
    whole = ChannelStatistics.of(outputs, 1)
    parts = ChannelStatistics.of(outputs[:0], 1) + ChannelStatistics.of(outputs[:2], 1) + ChannelStatistics.of(outputs[2:], 1)
    mean, variance = moments([outputs], 1)
    for statistics in (whole, parts):
        assert statistics.count == outputs.numel() // 3
        torch.testing.assert_close(statistics.mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(statistics.variance, variance, rtol=1e-3, atol=1e-6)


def test_a_channel_that_does_not_vary_keeps_its_step() -> None:
    layer = QuantizedLayer(nn.Linear(1, 2), subbyte.model.operators.Linear())
    grid, zeros = Grid(2, symmetric=True), torch.zeros(2, dtype=torch.int32)
    codes = torch.ones(2, 1, dtype=torch.int16)
    layer.assign_(subbyte.model.quantized_layer.QuantizedState(codes, torch.ones(2), zeros, torch.ones(2), grid, None))
    found = ChannelStatistics(5, torch.tensor([1.0, 1.0]).double(), torch.tensor([0.0, 4.0]).double())
    new = re_estimated(layer.state(), found, torch.tensor([3.0, 3.0]).double(), torch.ones(2).double(), 0.0)
    assert new.scale.tolist() == [1.0, 0.5] and new.bias.tolist() == [3.0, 3.0] and new.codes is codes

"""Networkwise: all layers' codes, steps and biases together, against the float model.

    minimise over the V, b', s_w, s_x, z_x of all layers
        e(model(x), model^(x)) + share * mean over layers l of e(y_l, y^_l),       e(a, b) = ||a - b||^2 / ||a - mean a||^2

`y_l` is what the model reads of a layer's output, behind its ReLU. The outputs alone would be fitted by heart on a few hundred samples; the
layers in between give every sample as many targets as there are activations.

Parameters, units and gradients are AdaQuant's, the model takes the place of the layer. A gradient step keeps what the batch makes of every
layer in memory, unlike everything else in this package: `batch_samples` bounds it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.joint import JointParameters, adam, half_cosine
from subbyte.calibrate.models import CalibratedLayer, Models, assign_, solution_of
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.rows import generator_for
from subbyte.calibrate.trainable import TrainableLayer, standing_in
from subbyte.errors import OptionError
from subbyte.model.batches import Batch, call, joined, sample_count, select_samples, tensors
from subbyte.run.events import Observer, StageFinished, StageStarted


@dataclass(frozen=True)
class Networkwise(Refinement):
    """Gradient descent on all layers at once.

    Args:
        iterations: gradient steps.
        batch_samples: samples of one gradient step, at most.
        weight_rate: Adam's rate for the weights, in weight steps.
        bias_rate: for biases, in standard deviations of the layer's output.
        weight_step_rate: for weight steps, as a share of themselves.
        activation_rate: for input steps as a share of themselves, and zero-points in codes.
        layer_share: weight of the layers' errors beside the error of the model's outputs.
        checks: how often held-out samples are looked at, evenly over the iterations.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Network reconstruction: BRECQ (Li et al. 2021, arXiv 2102.05426), section 3.2; the layers' outputs as hints: FitNets (Romero et al.
        2014, arXiv 1412.6550).

    Example:
        >>> Networkwise(iterations=200).batch_samples
        32
    """

    iterations: int = 500
    batch_samples: int = 32
    weight_rate: float = 0.01
    bias_rate: float = 1e-2
    weight_step_rate: float = 5e-3
    activation_rate: float = 5e-3
    layer_share: float = 1.0
    checks: int = 10

    def __post_init__(self) -> None:
        rates = (self.weight_rate, self.bias_rate, self.weight_step_rate, self.activation_rate, self.layer_share)
        if min(self.iterations, self.batch_samples, self.checks) < 1 or min(rates) < 0:
            raise OptionError(f"Networkwise needs positive counts and no negative rate or share, not {self}")

    def refine_(self, models: Models, data: CalibrationSet, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`.

        Args:
            models: see there.
            data: see there; samples of different batches are mixed where the batches fit together.
            observer: is told when it starts and ends.
        """
        started = time.perf_counter()
        observer(StageStarted(self.name))
        masks = zip(data.batches, data.held_out, strict=True)
        parts = [(select_samples(batch, ~mask), select_samples(batch, mask)) for batch, mask in masks]
        fit, held = (joined([batch for batch in side if sample_count(batch)]) for side in zip(*parts, strict=True))
        note = _Training(models, self, data.seed).run_(fit or held, held or fit)
        observer(StageFinished(self.name, time.perf_counter() - started))
        return (note,)


class _Training:
    """The quantized layers of a model, with parameters in their place."""

    def __init__(self, models: Models, settings: Networkwise, seed: int) -> None:
        self.models, self.settings = models, settings
        device = models.layers[0].float_weight().device
        self.generator = torch.Generator(device).manual_seed(generator_for(seed, settings.name).initial_seed())

    @torch.enable_grad()
    def run_(self, fit: Sequence[Batch], held: Sequence[Batch]) -> str:
        """Give the quantized model the best solutions found; say what became of the error on held-out samples."""
        settings = self.settings
        layers = self._trainable(next(self._cut(fit[0])))
        start = self._judge(held)
        optimizer = adam([layer.parameters for layer in layers], settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: half_cosine(k / settings.iterations))
        parameters = [tensor for layer in layers for tensor in layer.parameters.tensors]
        shares = torch.tensor([float(sample_count(batch)) for batch in fit], device=self.generator.device)
        turns = torch.multinomial(shares, settings.iterations, replacement=True, generator=self.generator).tolist()
        every, least, best = -(-settings.iterations // settings.checks), start, None
        with standing_in(layers):
            for k, turn in enumerate(turns, start=1):
                count = sample_count(fit[turn])
                some = torch.randperm(count, device=self.generator.device, generator=self.generator)[: settings.batch_samples]
                optimizer.zero_grad()
                self._loss(select_samples(fit[turn], some)).backward(inputs=parameters)
                optimizer.step()
                schedule.step()
                if k % every == 0 or k == settings.iterations:
                    error = self._judge(held)
                    if error < least:
                        least, best = error, {layer.item.layer.name: layer.parameters.solution(settings.name) for layer in layers}
        if best is None:
            return f"error of outputs and layers {start:.4g}, nothing better found"
        assign_(self.models, best)
        return f"error of outputs and layers {start:.4g} -> {least:.4g}"

    @torch.no_grad()
    def _judge(self, held: Sequence[Batch]) -> float:
        losses = [(float(self._loss(part)), sample_count(part)) for batch in held for part in self._cut(batch)]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        for some in torch.arange(sample_count(batch)).split(self.settings.batch_samples):
            yield select_samples(batch, some)

    def _loss(self, batch: Batch) -> Tensor:
        items = self.models.layers
        with torch.no_grad(), _outputs(items, [item.original for item in items]) as wanted:
            reference = _floats(call(self.models.original, batch))
        with _outputs(items, [item.quantized for item in items]) as given:
            outputs = _floats(call(self.models.quantized, batch))
        total = torch.stack([_error(a, b) for a, b in zip(reference, outputs, strict=True)]).mean()
        calls = [(a, b) for name in wanted for a, b in zip(wanted[name], given[name], strict=False)]
        if self.settings.layer_share and calls:
            total = total + self.settings.layer_share * torch.stack([_error(a, b) for a, b in calls]).mean()
        return total

    @torch.no_grad()
    def _trainable(self, batch: Batch) -> list[TrainableLayer]:
        """Parameters of each layer, at its present solution."""
        items = self.models.layers
        with _outputs(items, [item.original for item in items]) as outputs:
            call(self.models.original, batch)
        layers = []
        for item in items:
            start = solution_of(item)
            seen = outputs.get(item.layer.name)
            spread = (seen[0].std() if seen else start.scale.mean()).expand(start.scale.shape)
            parameters = JointParameters(start, start.weight(), spread, item.weight_grid, item.activation_grid, relative=True)
            layers.append(TrainableLayer(item, parameters, self.generator))
        return layers


def _floats(output: object) -> list[Tensor]:
    return [tensor for tensor in tensors(output) if tensor.is_floating_point()]


def _error(reference: Tensor, output: Tensor) -> Tensor:
    """Squared error, as a share of the reference's spread over the samples; of a single sample, of its size."""
    centre = reference.mean(dim=0) if len(reference) > 1 else torch.zeros_like(reference)
    spread = (reference - centre).square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (output - reference).square().sum() / spread


@contextlib.contextmanager
def _outputs(items: Sequence[CalibratedLayer], modules: Sequence[nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """What is read of the layers' outputs, by layer name, one for each call."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def keep(item: CalibratedLayer):  # type: ignore[no-untyped-def]
        return lambda module, args, output: found[item.layer.name].append(item.clip(output))

    handles = [module.register_forward_hook(keep(item)) for item, module in zip(items, modules, strict=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

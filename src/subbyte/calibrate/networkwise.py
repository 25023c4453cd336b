"""Networkwise: all layers' codes, steps and biases together, against the float model.

    minimise over the V, b', s_w, s_x, z_x of all layers
        e(model(x), model^(x)) + share * mean over layers l of e(y_l, y^_l),       e(a, b) = ||a - b||^2 / ||a - mean a||^2

`y_l` is what the model reads of a layer's output, behind its ReLU (see `hints`); mixing samples with each other gives more targets.

Parameters, units and gradients are AdaQuant's, the model takes the place of the layer. The rates fall to nothing, and the last iterate is
taken: which of the earlier ones is best on a few dozen held-out samples is mostly chance. Those judge the refinement as a whole.

A gradient step keeps what the batch makes of every layer in memory, unlike the layers' own calibration: `batch_samples` bounds it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.calibrate.fit_samples import Augmentation, fit_parts, shuffled, varied
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.hints import layer_outputs, layers_error, relative_error
from subbyte.calibrate.joint import JointParameters, adam, half_cosine
from subbyte.calibrate.models import Models, assign_, solution_of
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.rows import generator_for
from subbyte.calibrate.trainable import TrainableLayer, standing_in
from subbyte.calibrate.whole import Judge
from subbyte.errors import OptionError
from subbyte.model.batches import Batch, call, sample_count, select_samples
from subbyte.model.padding import read_outputs, real_positions, without_padding
from subbyte.run.events import Observer, StageFinished, StageStarted, StepDone


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
        mixing: how much of another sample is mixed into each, at most; drawn evenly from 0 to this. 0: nothing is mixed.
        augment: changes batches before they are mixed, for example by flipping images; None: they are used as they are.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Network reconstruction: BRECQ (Li et al. 2021, arXiv 2102.05426), section 3.2; the layers' outputs as hints: FitNets (Romero et al.
        2014, arXiv 1412.6550); mixing: mixup (Zhang et al. 2018, arXiv 1710.09412), here without labels.

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
    mixing: float = 1.0
    augment: Augmentation | None = None

    def __post_init__(self) -> None:
        rates = (self.weight_rate, self.bias_rate, self.weight_step_rate, self.activation_rate, self.layer_share)
        if min(self.iterations, self.batch_samples) < 1 or min(rates) < 0 or not 0 <= self.mixing <= 1:
            raise OptionError(f"Networkwise needs positive counts, no negative rate or share and mixing from 0 to 1, not {self}")

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`.

        Args:
            models: see there.
            data: see there; samples of different batches are mixed where the batches fit together.
            judge: see there.
            observer: is told when it starts and ends, and of every step.
        """
        parts = fit_parts(models.original, data)
        if not parts:
            return ("nothing done: the model does not run on a part of a batch, so that samples cannot be held out",)
        started = time.perf_counter()
        observer(StageStarted(self.name, self.iterations, "steps"))
        note = _Training(models, self).run_(parts, generator_for(data.seed, self.name), observer)
        observer(StageFinished(self.name, time.perf_counter() - started))
        return (note,)


class _Training:
    """The quantized layers of a model, with parameters in their place."""

    def __init__(self, models: Models, settings: Networkwise) -> None:
        self.models, self.settings = models, settings

    def run_(self, parts: Sequence[Batch], generator: torch.Generator, observer: Observer) -> str:
        """Give the quantized model what is found last; say what became of the error."""
        settings = self.settings
        epochs = (shuffled(parts, settings.batch_samples, generator) for _ in itertools.count())
        batches = itertools.islice(itertools.chain.from_iterable(epochs), settings.iterations)
        with torch.inference_mode(mode=False), torch.enable_grad():
            layers = self._trainable(select_samples(parts[0], torch.arange(min(settings.batch_samples, sample_count(parts[0])))))
            optimizer = adam([layer.parameters for layer in layers], settings)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: half_cosine(k / settings.iterations))
            parameters = [tensor for layer in layers for tensor in layer.parameters.tensors]
            errors: list[Tensor] = []
            with standing_in(layers):
                for batch in batches:
                    optimizer.zero_grad()
                    loss = self._loss(varied(batch, settings.augment, settings.mixing, generator))
                    if not loss.requires_grad:
                        return "nothing done: the model's outputs have no gradient"
                    loss.backward(inputs=parameters)
                    optimizer.step()
                    schedule.step()
                    errors.append(loss.detach())
                    observer(StepDone(settings.name))
        assign_(self.models, {layer.item.layer.name: layer.parameters.solution(settings.name) for layer in layers})
        each = -(-len(errors) // 10)
        first, last = (float(torch.stack(some).mean()) for some in (errors[:each], errors[-each:]))
        return f"error of outputs and layers in the first and last tenth of {settings.iterations} steps: {first:.4g}, {last:.4g}"

    def _loss(self, batch: Batch) -> Tensor:
        items = self.models.free
        with torch.no_grad(), layer_outputs(items, [item.original for item in items]) as wanted:
            reference = read_outputs(call(self.models.original, batch), batch)
        with layer_outputs(items, [item.quantized for item in items]) as given:
            outputs = read_outputs(call(self.models.quantized, batch), batch)
        total = torch.stack([relative_error(a, b) for a, b in zip(reference, outputs, strict=True)]).mean()
        share = self.settings.layer_share
        layers = layers_error(items, wanted, given, batch) if share else None
        return total if layers is None else total + share * layers

    @torch.no_grad()
    def _trainable(self, batch: Batch) -> list[TrainableLayer]:
        """Parameters of each layer, at its present solution."""
        items = self.models.free
        with layer_outputs(items, [item.original for item in items]) as outputs:
            call(self.models.original, batch)
        layers = []
        for item in items:
            start = solution_of(item)
            seen = outputs.get(item.layer.name)
            spread = item.clip(without_padding(seen[0], real_positions(batch))).std() if seen else start.scale.mean()
            spreads = spread.expand(start.bias.shape)
            parameters = JointParameters(start, start.weight(), spreads, item.weight_grid, item.activation_grid, relative=True)
            layers.append(TrainableLayer(item, parameters))
        return layers

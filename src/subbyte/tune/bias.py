"""Bias tuning: train the biases of the whole quantized model so that it returns what the float model does.

    minimise over the biases b of all layers        loss(float(x), quantized(x; b)) + share * mean over layers l of e(y_l, y^_l)

The float model is the teacher, so no label is needed; `y_l` is what it reads of a layer's output, `e` the error of `hints.relative_error`.
Biases are few (one for each output channel), so that a few hundred samples determine them, and they cost nothing: codes and steps stay what
they are. Rounding of inputs is passed straight through by the gradient. The state that is best on held-out samples is kept, and taken up
again at lower rates after an epoch that brought nothing better.

Samples that the float model was trained on make a poor teacher: it is sure of them, and its outputs say little. Where data may be mixed,
convex combinations of two samples show it what it is not sure of, and it labels them as well as any other. That is worth nothing for the
ResNet-20 of studies/tuning.py, and neither are mirrored images, which only the user knows to be allowed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from subbyte.calibrate.fit_samples import Augmentation, fit_parts, mixable, shuffled, varied
from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.hints import layer_outputs, layers_error
from subbyte.calibrate.joint import half_cosine
from subbyte.calibrate.loss import OutputLoss, RelativeSquaredError, compare
from subbyte.calibrate.models import Models
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.rows import generator_for
from subbyte.calibrate.trainable import standing_in
from subbyte.calibrate.whole import Judge
from subbyte.errors import OptionError
from subbyte.model.batches import Batch, call, sample_count, select_samples
from subbyte.model.padding import real_positions, without_padding
from subbyte.run.events import Observer, StageFinished, StageStarted, StepDone
from subbyte.tune.optimizer import Adam, Optimizer
from subbyte.tune.tuned_layer import TunedLayer


@dataclass(frozen=True)
class BiasTuning(Refinement):
    """Distillation of the float model into the quantized model's biases.

    Args:
        loss: what is to become small on the samples that are not held out.
        stop_by: what is to become small on those that are held out, and on the mixtures of them that judge; the best state by it is kept.
        optimizer: how parameters are moved.
        epochs: how often every sample is seen, at most.
        backoff: what rates are multiplied by after an epoch that brought nothing better, when the best state is taken up again; 1: rates
            and state go on as they are.
        batch_samples: samples of one gradient step, at most; of different batches only where these fit together. What they make of
            every layer is kept in memory until the step is done, twice where layers have a share.
        bias_rate: rate of the biases, in standard deviations of the layer's output.
        step_rate: rate of the steps of weights and inputs, as a share of themselves; 0: they stay.
        layer_share: weight of the error of what the model reads of the layers' outputs, beside the loss: the mean over all layers of their
            squared errors as shares of their spreads over the samples.
        norm_biases: whether biases of norm layers (layer, group, instance and batch norms that are still there) are trained too.
        mixing: how much of another sample is mixed into each, at most; drawn evenly from 0 to this. 0: nothing is mixed, for inputs of
            which no mixture makes sense. Integers, such as token ids, are never mixed.
        augment: changes batches before they are used, for example by flipping images; None: they are used as they are.
        patience: epochs without a better state after which it ends.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Hubara et al., arXiv 2006.10518, section 3.4; mixing: mixup (Zhang et al. 2018, arXiv 1710.09412), here without labels.

    Example:
        >>> BiasTuning(step_rate=1e-3).name
        'BiasTuning'
    """

    loss: OutputLoss = RelativeSquaredError()
    stop_by: OutputLoss = RelativeSquaredError()
    optimizer: Optimizer = Adam()
    epochs: int = 2
    backoff: float = 0.3
    batch_samples: int = 32
    bias_rate: float = 1e-3
    step_rate: float = 0.0
    layer_share: float = 1.0
    norm_biases: bool = False
    mixing: float = 1.0
    augment: Augmentation | None = None
    patience: int = 2

    def __post_init__(self) -> None:
        counts, rates = (self.epochs, self.batch_samples, self.patience), (self.bias_rate, self.step_rate, self.layer_share)
        if min(counts) < 1 or min(rates) < 0 or not 0 <= self.mixing <= 1 or not 0 < self.backoff <= 1:
            raise OptionError(f"BiasTuning needs positive counts, no negative rate or share, mixing and backoff up to 1, not {self}")

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`.

        Args:
            models: see there.
            data: see there.
            judge: see there.
            observer: see there.
        """
        parts = fit_parts(models.original, data)
        if not parts:
            return ("nothing done: the model does not run on a part of a batch, so that samples cannot be held out",)
        tuning = _Tuning(models, parts, self, judge if self.stop_by == judge.loss else replace(judge, loss=self.stop_by, start_loss=None))
        if obstacle := tuning.obstacle():
            return (f"nothing done: the model cannot be differentiated: {obstacle}",)
        started = time.perf_counter()
        observer(StageStarted(self.name, self.epochs * tuning.steps, "steps"))
        note = tuning.run_(data.seed, observer)
        observer(StageFinished(self.name, time.perf_counter() - started))
        several = not self.mixing or any(mixable(part) for part in parts)
        return (note,) if several else (note, "nothing was mixed: inputs are no floating-point numbers, or padded")


class _Descent:
    """An optimizer whose rates fall to 0 in half a cosine, and may be told to go slower.

    Args:
        kind: of optimizer.
        groups: parameters, each with its rate.
        steps: until rates are 0.
    """

    def __init__(self, kind: Optimizer, groups: Sequence[tuple[Tensor, float]], steps: int) -> None:
        self._kind, self._groups, self._steps, self._done, self._slowed = kind, groups, steps, 0, 1.0
        self.slow_down(1.0)

    def slow_down(self, factor: float) -> None:
        """Multiply all rates by a factor, and forget where the parameters were heading."""
        self._slowed *= factor
        self._optimizer = self._kind.over([(parameter, self._slowed * rate) for parameter, rate in self._groups])
        done = self._done
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda k: half_cosine(min((done + k) / self._steps, 1.0)))

    def step(self, loss: Tensor) -> None:
        """One step down the gradient; none where the loss depends on no parameter, as of a batch that reaches no layer that is trained."""
        if loss.requires_grad:
            self._optimizer.zero_grad()
            loss.backward(inputs=[parameter for parameter, _ in self._groups])
            self._optimizer.step()
            self._schedule.step()
            self._done += 1


class _Tuning:
    """The parameters, and how they are trained."""

    def __init__(self, models: Models, parts: Sequence[Batch], settings: BiasTuning, judge: Judge) -> None:
        self._models, self._parts, self._settings, self._judge = models, parts, settings, judge
        norms = _norms(models.quantized) if settings.norm_biases else []
        modules = [*(norm for norm, _ in norms), *(item.quantized for item in models.free)]
        spreads = _spreads(models.quantized, modules, parts[0], settings.batch_samples)
        self._layers = [TunedLayer(item, with_steps=settings.step_rate > 0) for item in models.free]
        biases = [(layer.bias, spreads[layer.item.quantized]) for layer in self._layers] + [(bias, spreads[norm]) for norm, bias in norms]
        self._groups: list[tuple[Tensor, float]] = [(bias, settings.bias_rate * spread) for bias, spread in biases]
        self._groups += [(step, settings.step_rate) for layer in self._layers for step in layer.steps]
        self._parameters = [parameter for parameter, _ in self._groups]

    def obstacle(self) -> str:
        """Why the model's outputs have no gradient for the parameters; empty if they do."""
        few = select_samples(self._parts[0], torch.arange(min(2, sample_count(self._parts[0]))))
        try:
            with torch.inference_mode(mode=False), torch.enable_grad(), _with_gradients(self._parameters), standing_in(self._layers):
                self._loss(few).backward(inputs=self._parameters)
        except RuntimeError as error:  # torch's, or the model's own, which may do what has no gradient
            return str(error)
        return ""

    @property
    def steps(self) -> int:
        """In an epoch."""
        return sum(-(-sample_count(part) // self._settings.batch_samples) for part in self._parts)

    def run_(self, seed: int, observer: Observer) -> str:
        """Train, and leave the best state in the quantized model; what became of it in words."""
        settings, generator = self._settings, generator_for(seed, "bias tuning")
        known = self._judge.start_loss
        first = least = self._judge.loss_of(self._models.quantized) if known is None else known
        best, best_epoch, epoch = self._values(), 0, 0
        with torch.inference_mode(mode=False), torch.enable_grad(), _with_gradients(self._parameters), standing_in(self._layers):
            descent = _Descent(settings.optimizer, self._groups, settings.epochs * self.steps)
            for epoch in range(1, settings.epochs + 1):
                for batch in shuffled(self._parts, settings.batch_samples, generator):
                    descent.step(self._loss(varied(batch, settings.augment, settings.mixing, generator)))
                    observer(StepDone(settings.name))
                reached = self._judge.loss_of(self._models.quantized)
                if reached < least:
                    least, best, best_epoch = reached, self._values(), epoch
                elif settings.backoff < 1:
                    self._restore_(best)
                    descent.slow_down(settings.backoff)
                if epoch - best_epoch >= settings.patience:
                    break
        self._restore_(best)
        if best_epoch:
            for tuned in self._layers:
                tuned.item.quantized.assign_(tuned.state())
        named = f"{type(settings.stop_by).__name__} {first:.4g} -> {least:.4g}"
        return f"best after {best_epoch} of {epoch} epochs, {named}" if best_epoch else f"nothing better found in {epoch} epochs, {named}"

    def _loss(self, batch: Batch) -> Tensor:
        items, share = self._models.free if self._settings.layer_share else (), self._settings.layer_share
        with torch.no_grad(), layer_outputs(items, [item.original for item in items]) as wanted:
            reference = call(self._models.original, batch)
        with layer_outputs(items, [item.quantized for item in items]) as given:
            output = call(self._models.quantized, batch)
        above, below = compare(reference, output, self._settings.loss, batch)
        total, layers = above / below.clamp(min=torch.finfo(torch.float32).tiny), layers_error(items, wanted, given, batch)
        return total if layers is None else total + share * layers

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _restore_(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def _norms(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Norm layers that have a bias, with their biases."""
    kinds = (nn.LayerNorm, nn.GroupNorm, _NormBase)
    return [(module, module.bias) for module in model.modules() if isinstance(module, kinds) and isinstance(module.bias, Tensor)]


@torch.no_grad()
def _spreads(model: nn.Module, modules: Sequence[nn.Module], part: Batch, samples: int) -> dict[nn.Module, float]:
    """The standard deviation of what each module returns for a few samples; of a module that is not called, 1."""
    spreads = dict.fromkeys(modules, 1.0)
    few = select_samples(part, torch.arange(min(samples, sample_count(part))))
    real = real_positions(few)

    def note(module: nn.Module, args: object, output: Tensor) -> None:
        spreads[module] = float(without_padding(output, real).std(correction=0))

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        call(model, few)
    finally:
        for handle in handles:
            handle.remove()
    return spreads


@contextlib.contextmanager
def _with_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients are taken for the parameters; afterwards each is as it was."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = None

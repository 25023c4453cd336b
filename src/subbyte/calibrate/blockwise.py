"""Blockwise: after the layers, refine a block's codes, steps and biases together against the block's float output.

    minimise over the V, b', s_w, s_x, z_x of all layers in a block
        || block(x) - block^(x') ||^2

`x` is what the float model feeds to the block, `x'` what arrives through the quantized blocks before it. Layers that follow each other can
then make good each other's errors, and only what leaves the block counts: behind its ReLUs and its residual sum.

Parameters, units and gradients are AdaQuant's. The iterate that is best on held-out samples is kept, and the block's old codes if none is
better than they are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.joint import JointParameters, adam, half_cosine
from subbyte.calibrate.models import CalibratedLayer, Models, assign_, solution_of
from subbyte.calibrate.problem import LayerSolution
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.rows import generator_for, spread_mask
from subbyte.calibrate.trainable import TrainableLayer, standing_in
from subbyte.calibrate.whole import Judge
from subbyte.errors import LayerError, OptionError, naming_layer
from subbyte.model.batches import floating_tensors, map_tensors, probes, sample_count
from subbyte.model.blocks import Arguments, Block, find_blocks
from subbyte.model.lockstep import Forward, Lockstep, Stop
from subbyte.model.padding import real_positions, without_padding
from subbyte.run.events import LayerSolved, Observer, StageFinished, StageStarted


@dataclass(frozen=True)
class Blockwise(Refinement):
    """Gradient descent on all layers of a block at once, block after block.

    Args:
        iterations: gradient steps for each block.
        batch_samples: samples of one gradient step, at most.
        weight_rate: Adam's rate for the weights, in weight steps.
        bias_rate: for biases, in standard deviations of the layer's output.
        weight_step_rate: for weight steps, as a share of themselves.
        activation_rate: for input steps as a share of themselves, and zero-points in codes.
        float_share: share of the inputs' numbers that stay unquantized in a gradient step, drawn anew each time; makes what is found less
            particular to the samples.
        most_layers: layers in a module that is to be a block, at most.
        span_layers: layers in a span, where layers do not stand in such modules, at most.
        checks: how often held-out samples are looked at, evenly over the iterations.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Blocks: BRECQ (Li et al. 2021, arXiv 2102.05426) and the ICML version of Hubara et al., arXiv 2006.10518; unquantized numbers: QDrop
        (Wei et al. 2022, arXiv 2203.05740).

    Example:
        >>> Blockwise(iterations=200).batch_samples
        32
    """

    iterations: int = 500
    batch_samples: int = 32
    weight_rate: float = 0.02
    bias_rate: float = 1e-3
    weight_step_rate: float = 1e-3
    activation_rate: float = 1e-3
    float_share: float = 0.0
    most_layers: int = 6
    span_layers: int = 4
    checks: int = 10

    def __post_init__(self) -> None:
        rates = (self.weight_rate, self.bias_rate, self.weight_step_rate, self.activation_rate)
        whole = (self.iterations, self.batch_samples, self.checks, self.most_layers, self.span_layers)
        if min(whole) < 1 or min(rates) < 0 or not 0 <= self.float_share < 1:
            wanted = "positive counts, no negative rate and a float_share from 0 to below 1"
            raise OptionError(f"Blockwise needs {wanted}, not {self}")

    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`.

        Args:
            models: see there.
            data: see there.
            judge: see there.
            observer: is told of every block.
        """
        return tuple(str(report) for report in refine_blocks_(models, data, self, observer))


@dataclass(frozen=True)
class RefinedBlock:
    """What became of one block.

    Args:
        name: of the module or span.
        layers: names of its layers, in running order.
        start_error: squared error of the block's output on held-out samples, relative to its variance, with the layers' own solutions.
        error: likewise, of the refined ones; not below `start_error` where these were given up, NaN where the block could not be tried.
        note: why it could not; otherwise empty.
    """

    name: str
    layers: tuple[str, ...]
    start_error: float
    error: float
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the refined solutions are better, and are used."""
        return self.error < self.start_error

    def __str__(self) -> str:
        if self.note:
            return f"{self.name or 'the whole model'}: left as it was, {self.note}"
        found = f"{self.start_error:.3g} -> {self.error:.3g}" if self.kept else f"{self.start_error:.3g}, nothing better found"
        return f"{self.name or 'the whole model'} ({len(self.layers)} layers): {found}"


def refine_blocks_(models: Models, data: CalibrationSet, settings: Blockwise, observer: Observer) -> tuple[RefinedBlock, ...]:
    """Refine every block, in running order, and give the quantized model the new codes.

    Args:
        models: `models.quantized` has the layers' solutions; is changed in place.
        data: calibration set; its held-out samples judge.
        settings: how.
        observer: is told of every block.

    Raises:
        LayerError: if the two models do not reach a block with the same samples.
    """
    started = time.perf_counter()
    solutions = {item.layer.name: solution_of(item) for item in models.free}
    layers, probe = [item.layer for item in models.free], probes(data.batches)[0]
    blocks = {block.entry: block for block in find_blocks(models.original, layers, probe, settings.most_layers, settings.span_layers)}
    observer(StageStarted(settings.name, len(blocks), "blocks"))
    reports: list[RefinedBlock] = []
    forwards = [
        Forward(model, batch, {name: model.get_submodule(name) for name in blocks})
        for model in (models.original, models.quantized)
        for batch in data.batches
    ]
    with Lockstep(forwards, list(blocks), read=Arguments.of) as lockstep:
        for stop in lockstep:
            began, block = time.perf_counter(), blocks[stop.layer]
            with naming_layer(block.layers[0], f"block '{block.name}'"):
                report, refined = _refine_(models, block, _samples(models, block, stop, data), solutions, settings, data.seed)
            solutions |= refined
            reports.append(report)
            observer(LayerSolved(settings.name, block.name, report.error, report.start_error, time.perf_counter() - began))
    observer(StageFinished(settings.name, time.perf_counter() - started))
    return tuple(reports)


@dataclass(frozen=True, eq=False)
class _Part:
    """Samples of a block that can be computed together: its quantized arguments and what the float block returns.

    Args:
        arguments: of the quantized model.
        targets: floating-point outputs of the float model, float32 (samples, ...) each.
        held_out: bool (samples,).
        real: bool (samples, positions), those that are no padding; None where all are real.
    """

    arguments: Arguments
    targets: list[Tensor]
    held_out: Tensor
    real: Tensor | None

    def chosen(self, index: Tensor) -> _Part:
        """Some of the samples, by their index, int64."""
        real = None if self.real is None else self.real[index]
        return _Part(_cut(self.arguments, index), [target[index] for target in self.targets], self.held_out[index], real)

    def outputs(self, model: nn.Module, block: Block) -> list[tuple[Tensor, Tensor]]:
        """What a model's block returns, beside the targets, both without padding."""
        pairs = zip(floating_tensors(block.run(model, self.arguments)), self.targets, strict=True)
        return [(without_padding(given, self.real), without_padding(wanted, self.real)) for given, wanted in pairs]


def _cut(arguments: Arguments, index: Tensor) -> Arguments:
    given = (arguments.positional, arguments.keyword)
    count = sample_count(given)
    return Arguments(*map_tensors(given, lambda tensor: tensor[index] if tensor.dim() and tensor.shape[0] == count else tensor))


@torch.no_grad()
def _samples(models: Models, block: Block, stop: Stop, data: CalibrationSet) -> list[_Part]:
    """Every forward's samples at a block; none where its samples cannot be told apart."""
    count = len(data.batches)
    here = [index for index in range(count) if index in stop.runs]
    if any(index + count not in stop.runs for index in here) or 2 * len(here) != len(stop.runs):
        raise LayerError(block.layers[0], f"block '{block.name}' is reached by other samples in the quantized model than in the float one")
    parts: list[_Part] = []
    for index in here:
        floats: Arguments = stop.input(index)
        samples = sample_count((floats.positional, floats.keyword))
        targets = floating_tensors(block.run(models.original, floats))
        if samples == 0 or not targets or any(target.dim() == 0 or target.shape[0] != samples for target in targets):
            return []
        if not parts:
            few = torch.arange(min(2, samples), device=targets[0].device)
            alone = floating_tensors(block.run(models.original, _cut(floats, few)))
            if not all(_close(a, b[few]) for a, b in zip(alone, targets, strict=True)):
                return []
        device, real = targets[0].device, real_positions(data.batches[index])
        held_out = spread_mask(data.held_out[index], samples).to(device)
        parts.append(_Part(stop.input(index + count), targets, held_out, None if real is None or len(real) != samples else real.to(device)))
    return _merged(parts)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def _merged(parts: list[_Part]) -> list[_Part]:
    """One part of all, where the block takes one tensor, in the same shape in all; then samples of different batches mix."""
    single = [part.arguments.positional[0] for part in parts if len(part.arguments.positional) == 1 and not part.arguments.keyword]
    shapes = {tuple(x.shape[1:]) if isinstance(x, Tensor) else None for x in single}
    if len(single) < len(parts) or len(shapes) != 1 or None in shapes or any(part.real is not None for part in parts):
        return parts
    targets = [torch.cat(same) for same in zip(*(part.targets for part in parts), strict=True)]
    return [_Part(Arguments((torch.cat(single),), {}), targets, torch.cat([part.held_out for part in parts]), None)]


def _refine_(
    models: Models, block: Block, parts: list[_Part], solutions: Mapping[str, LayerSolution], settings: Blockwise, seed: int
) -> tuple[RefinedBlock, dict[str, LayerSolution]]:
    items = [item for item in models.free if item.layer.name in block.layers]
    if not parts:
        return RefinedBlock(block.name, block.layers, torch.nan, torch.nan, "its samples cannot be told apart"), {}
    held = [part.chosen(torch.nonzero(part.held_out)[:, 0]) for part in parts if bool(part.held_out.any())]
    fit = [part.chosen(torch.nonzero(~part.held_out)[:, 0]) for part in parts if not bool(part.held_out.all())]
    held, fit = held or fit, fit or held
    before = {name: solutions[name] for name in block.layers}
    start_error = _error(models.quantized, block, held)
    training = _Training(models, block, items, before, settings)
    trained = training.run(fit, held, start_error, generator_for(seed, f"refine {block.name}"))
    if training.obstacle:
        return RefinedBlock(block.name, block.layers, start_error, torch.nan, training.obstacle), {}
    assign_(models, trained)
    error = _error(models.quantized, block, held) if trained else torch.inf
    if not error < start_error:
        assign_(models, before)
    return RefinedBlock(block.name, block.layers, start_error, error), trained if error < start_error else {}


@torch.no_grad()
def _error(model: nn.Module, block: Block, parts: Sequence[_Part]) -> float:
    """Squared error of the block's outputs, relative to their variance."""
    above, below = 0.0, 0.0
    for part in parts:
        for start in range(0, len(part.held_out), 64):
            some = part.chosen(torch.arange(start, min(start + 64, len(part.held_out)), device=part.held_out.device))
            for given, wanted in some.outputs(model, block):
                above += float((given - wanted).square().sum(dtype=torch.float64))
        for target in part.targets:
            wanted = without_padding(target, part.real)
            below += float((wanted - wanted.mean(dim=0)).square().sum(dtype=torch.float64))
    return above / below if below > 0 else above


class _Training:
    """The quantized layers of a block, with parameters in their place."""

    def __init__(
        self, models: Models, block: Block, items: Sequence[CalibratedLayer], start: Mapping[str, LayerSolution], settings: Blockwise
    ) -> None:
        self.model, self.block, self.items, self.start, self.settings = models.quantized, block, items, start, settings
        self.obstacle = ""

    @torch.enable_grad()
    def run(self, fit: Sequence[_Part], held: Sequence[_Part], start_error: float, generator: torch.Generator) -> dict[str, LayerSolution]:
        """The best solutions found, by layer name; none if no iterate is better than the start."""
        settings = self.settings
        device = fit[0].targets[0].device
        generator = torch.Generator(device).manual_seed(generator.initial_seed())
        layers = self._trainable(fit[0], generator)
        optimizer = adam([layer.parameters for layer in layers.values()], settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: half_cosine(k / settings.iterations))
        parameters = [tensor for layer in layers.values() for tensor in layer.parameters.tensors]
        scale = sum(float(without_padding(target, fit[0].real).var()) for target in fit[0].targets) or 1.0
        shares = torch.tensor([float(len(part.held_out)) for part in fit], device=device)
        turns = torch.multinomial(shares, settings.iterations, replacement=True, generator=generator).tolist()
        every = max(1, settings.iterations // settings.checks)
        best: dict[str, LayerSolution] = {}
        least = start_error
        with standing_in(layers.values()):
            for k in range(1, settings.iterations + 1):
                part = fit[turns[k - 1]]
                count = len(part.held_out)
                some = part.chosen(torch.randperm(count, device=device, generator=generator)[: settings.batch_samples])
                optimizer.zero_grad()
                outputs = some.outputs(self.model, self.block)
                loss = torch.stack([(given - wanted).square().mean() for given, wanted in outputs]).sum() / scale
                if not loss.requires_grad:
                    self.obstacle = "its outputs have no gradient"
                    break
                loss.backward(inputs=parameters)
                optimizer.step()
                schedule.step()
                if k % every == 0:
                    error = self._judge(layers, held)
                    if error < least:
                        least = error
                        best = {name: layer.parameters.solution(f"{self.start[name].solver}, block") for name, layer in layers.items()}
        return best

    def _judge(self, layers: Mapping[str, TrainableLayer], held: Sequence[_Part]) -> float:
        for layer in layers.values():
            layer.float_share = 0.0
        error = _error(self.model, self.block, held)
        for layer in layers.values():
            layer.float_share = self.settings.float_share
        return error

    @torch.no_grad()
    def _trainable(self, part: _Part, generator: torch.Generator) -> dict[str, TrainableLayer]:
        """Parameters of each layer, at its present solution."""
        spreads: dict[str, Tensor] = {}
        some = part.chosen(torch.arange(min(self.settings.batch_samples, len(part.held_out)), device=part.held_out.device))

        def keep(name: str):  # type: ignore[no-untyped-def]
            return lambda module, args, output: spreads.__setitem__(name, without_padding(output, some.real).std())

        handles = [item.quantized.register_forward_hook(keep(item.layer.name)) for item in self.items]
        try:
            self.block.run(self.model, some.arguments)
        finally:
            for handle in handles:
                handle.remove()
        layers = {}
        for item in self.items:
            name = item.layer.name
            start = self.start[name]
            spread = spreads[name].expand(start.bias.shape)
            parameters = JointParameters(start, start.weight(), spread, item.weight_grid, item.activation_grid, relative=True)
            layers[name] = TrainableLayer(item, parameters, self.settings.float_share, generator)
        return layers

"""Batch-norm tuning: after the layers, give back to every channel the mean and the spread that its batch norm had given it.

A layer whose batch norm, with gain `gamma_o` and bias `beta_o`, was folded gets one back that is an exact identity at first,

    mu = beta_r = beta_o,    sigma^2 = gamma_o^2,    gamma_r = sqrt(gamma_o^2 + eps)

because that is the mean and the variance that the fold left in the layer's output `y`, over the data that the model was trained on. Then
`mu` and `sigma` are estimated anew, on what the quantized layer returns for the calibration set, and the batch norm is folded again:

    s_w' = s_w gamma_r / sqrt(sigma^2 + eps),    b' = (b - mu) gamma_r / sqrt(sigma^2 + eps) + beta_r

Codes do not change, and no gradient is needed. Means are exact, over all samples that are not held out, where the authors' release goes
41 % of the way (momentum 0.1, five batches). All forwards wait at each layer in turn, so that one pass shows every layer what its
predecessors, already re-estimated, make of the set.

Ours: a few hundred samples have other means than the data that the model was trained on, with its augmentations, and the paper's identity
takes that difference for an effect of quantization: it costs ResNet-20 2.4 points at 8 bits, where there is nothing to repair (see
studies/tuning.py). So by default `mu` and `sigma` start at what the float layer returns for the very samples on which they are
estimated anew. It needs a float forward beside the quantized one, and serves layers without a batch norm just as well.
`BatchNormTuning.paper()` is the paper's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.models import CalibratedLayer, Models
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.rows import spread_mask
from subbyte.calibrate.whole import Judge
from subbyte.errors import naming_layer
from subbyte.model.batches import Batch, call
from subbyte.model.layers import layer_input
from subbyte.model.lockstep import Forward, Lockstep
from subbyte.model.operator import beside_channels
from subbyte.model.padding import real_rows
from subbyte.model.quantized_layer import QuantizedState
from subbyte.quantizers.pieces import pieces
from subbyte.run.events import Observer, StageFinished, StageStarted

RELATIVE_EPSILON = 1e-5  # of the mean variance of a layer's channels: what a batch norm's eps is where there was none


class Reference(Enum):
    """Where the mean and the variance come from that a channel is to have.

    Example:
        >>> Reference("batch norm")
        <Reference.BATCH_NORM: 'batch norm'>
    """

    BATCH_NORM = "batch norm"
    FLOAT_MODEL = "float model"


@dataclass(frozen=True)
class BatchNormTuning(Refinement):
    """Re-estimate the batch norms that were folded.

    Args:
        reference: the batch norm's own `beta_o` and `gamma_o^2`, or what the float layer returns for the same samples.
        without_batch_norm: whether layers that had no batch norm are re-estimated too; their reference is the float model in any case.

    Source:
        Hubara et al., arXiv 2006.10518, section 3.3; exact means and the float model as reference are ours.

    Example:
        >>> BatchNormTuning().reference, BatchNormTuning.paper().reference
        (<Reference.FLOAT_MODEL: 'float model'>, <Reference.BATCH_NORM: 'batch norm'>)
    """

    reference: Reference = Reference.FLOAT_MODEL
    without_batch_norm: bool = False

    @classmethod
    def paper(cls) -> BatchNormTuning:
        """The paper's identity, which knows of the float model only its batch norms."""
        return cls(reference=Reference.BATCH_NORM)

    @torch.no_grad()
    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """See `Refinement`.

        Args:
            models: see there.
            data: see there.
            judge: see there.
            observer: see there.
        """
        tuned = [item for item in models.free if item.norm is not None or self.without_batch_norm]
        if not tuned:
            return ("nothing to do: no batch norm was folded into a layer",)
        started = time.perf_counter()
        observer(StageStarted(self.name))
        # a layer that is called several times is re-estimated on all its calls, once these are over; those after it then see it as it is
        repeated, single = [item for item in tuned if item.layer.calls > 1], [item for item in tuned if item.layer.calls == 1]
        for items in (repeated, single):
            if items:
                _pass_(models, items, data, self.reference)
        observer(StageFinished(self.name, time.perf_counter() - started))
        normed, left = sum(item.norm is not None for item in tuned), [item.layer.name for item in models.free if item not in tuned]
        notes = [f"{normed} batch norms re-estimated, reference: {self.reference.value}"] if normed else []
        notes += [f"{len(tuned) - normed} layers without a batch norm re-estimated, reference: float model"] if len(tuned) > normed else []
        return (*notes, *([f"left as they are, without a batch norm: {', '.join(left)}"] if left else []))


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Count, mean and variance of the numbers in each channel; those of two sets of numbers add up.

    Args:
        count: numbers in each channel.
        mean: float64 (C,).
        variance: mean squared distance from the mean, float64 (C,).

    Example:
        >>> parts = [ChannelStatistics.of(torch.tensor([[values]]), 1) for values in ([1.0, 2.0], [6.0])]
        >>> (parts[0] + parts[1]).mean
        tensor([3.], dtype=torch.float64)
    """

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, outputs: Tensor, channel_dimension: int) -> ChannelStatistics:
        """Those of a layer's output.

        Args:
            outputs: float32, any shape.
            channel_dimension: where it counts its channels.
        """
        channels = outputs.shape[channel_dimension]
        if outputs.numel() == 0:
            nothing = torch.zeros(channels, dtype=torch.float64, device=outputs.device)
            return cls(0, nothing, nothing)
        others = beside_channels(outputs, channel_dimension)
        count = outputs.numel() // channels
        near = outputs.mean(others, keepdim=True)
        rest, squares = torch.zeros(2, channels, dtype=torch.float64, device=outputs.device)
        for piece in pieces(outputs):
            centred = piece - near
            rest += centred.sum(others)
            squares += centred.square_().sum(others)
        rest /= count
        return cls(count, near.flatten() + rest, (squares / count - rest.square()).clamp(min=0.0))

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        """Those of both sets of numbers together.

        Args:
            other: of the same channels.

        Source:
            Chan, Golub, LeVeque 1979, *Updating formulae and a pairwise algorithm for computing sample variances*.
        """
        count = self.count + other.count
        if count == 0:
            return self
        share, apart = other.count / count, other.mean - self.mean
        variance = self.variance + share * (other.variance - self.variance) + share * (1 - share) * apart.square()
        return ChannelStatistics(count, self.mean + share * apart, variance)


def re_estimated(state: QuantizedState, found: ChannelStatistics, mean: Tensor, variance: Tensor, epsilon: float) -> QuantizedState:
    """Steps and bias under which a layer's output has another mean and variance in each channel; the codes stay.

        s_w' = s_w r,    b' = (b - mu) r + mean,    r = sqrt((variance + eps) / (sigma^2 + eps))

    Args:
        state: of the layer; tensors as its docstring says.
        found: `mu` and `sigma^2` of its output, (C_out,) each.
        mean: what `mu` is to be, float64 (C_out,).
        variance: what `sigma^2` is to be, float64 (C_out,).
        epsilon: of the batch norm. Where nothing can be learned about the spread (`sigma^2` is 0, or `variance + eps` is), `r` is 1.

    Example:
        >>> from subbyte.quantizers.grid import Grid
        >>> grid, zero = Grid(2, symmetric=True), torch.zeros(1, dtype=torch.int32)
        >>> state = QuantizedState(torch.tensor([[1]], dtype=torch.int16), torch.tensor([0.5]), zero, torch.tensor([1.0]), grid, None)
        >>> found = ChannelStatistics.of(torch.tensor([[2.0], [4.0]]), 1)
        >>> wanted = ChannelStatistics.of(torch.tensor([[5.0], [9.0]]), 1)
        >>> new = re_estimated(state, found, wanted.mean, wanted.variance, 0.0)
        >>> new.scale, new.bias
        (tensor([1.]), tensor([3.]))
    """
    ratio = ((variance + epsilon) / (found.variance + epsilon)).sqrt()
    ratio = torch.where((found.variance > 0) & (ratio > 0), ratio, 1.0)
    ratios = ratio.view(-1, *[1] * (state.scale.dim() - 1))  # the same for all column groups of a channel
    scale = (state.scale * ratios).float().clamp(min=torch.finfo(torch.float32).tiny)
    bias = 0.0 if state.bias is None else state.bias
    return replace(state, scale=scale, bias=((bias - found.mean) * ratio + mean).float())


def _pass_(models: Models, items: Sequence[CalibratedLayer], data: CalibrationSet, reference: Reference) -> None:
    """Forwards in lockstep; a layer is re-estimated as soon as all its calls have been seen."""
    by_name = {item.layer.name: item for item in items}
    wanted = _float_statistics(models, [item for item in items if item.norm is None or reference is Reference.FLOAT_MODEL], data)
    forwards = [Forward(models.quantized, batch, {item.layer.name: item.quantized for item in items}) for batch in data.batches]
    seen: dict[str, list[ChannelStatistics]] = defaultdict(list)
    with Lockstep(forwards, list(by_name)) as lockstep:
        for stop in lockstep:
            item, name = by_name[stop.layer], stop.layer
            with naming_layer(name, f"weight {item.layer.weight_shape}"):
                for index in stop.runs:
                    x = stop.input(index)
                    fit = _fit_samples(x, data.held_out[index])
                    outputs = item.quantized.forward(x if bool(fit.all()) else x[fit])  # without hooks: the input is behind them already
                    seen[name].append(_statistics(item, outputs, _real_rows(item, x, data.batches[index]), fit))
                if item.layer.calls == 1:
                    _re_estimate_(item, seen.pop(name), wanted[name])
    for name, several in seen.items():
        _re_estimate_(by_name[name], several, wanted[name])


def _float_statistics(models: Models, items: Sequence[CalibratedLayer], data: CalibrationSet) -> dict[str, list[ChannelStatistics]]:
    """What the float model's layers return for the samples that are not held out, by name, in a pass of its own."""
    found: dict[str, list[ChannelStatistics]] = defaultdict(list)

    def noting(item: CalibratedLayer, batch: Batch, held_out: Tensor):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], outputs: Tensor) -> None:
            x = layer_input(item.layer.name, args, kwargs)
            fit = _fit_samples(x, held_out)
            chosen = outputs if bool(fit.all()) else outputs[fit]
            found[item.layer.name].append(_statistics(item, chosen, _real_rows(item, x, batch), fit))

        return note

    for batch, held_out in zip(data.batches, data.held_out, strict=True) if items else ():
        handles = [item.original.register_forward_hook(noting(item, batch, held_out), with_kwargs=True) for item in items]
        try:
            call(models.original, batch)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _fit_samples(x: Tensor, held_out: Tensor) -> Tensor:
    """Which samples of a layer's input are not held out, bool (samples of the layer,)."""
    return ~spread_mask(held_out, x.shape[0]).to(x.device)


def _real_rows(item: CalibratedLayer, x: Tensor, batch: Batch) -> Tensor | None:
    """Which rows of a layer's output are no padding, bool (samples of the layer, positions of each); None where all are."""
    return real_rows(batch, item.layer.operator.layout(x))


def _statistics(item: CalibratedLayer, outputs: Tensor, real: Tensor | None, fit: Tensor) -> ChannelStatistics:
    """Of what a layer returned for the samples `fit`, without padding."""
    channels = item.layer.operator.channel_dimension
    if real is None:
        return ChannelStatistics.of(outputs, channels)
    return ChannelStatistics.of(outputs.movedim(channels, -1).flatten(1, -2)[real.to(outputs.device)[fit]], -1)


def _re_estimate_(item: CalibratedLayer, seen: Sequence[ChannelStatistics], floats: Sequence[ChannelStatistics]) -> None:
    found = reduce(add, seen)
    if floats:
        wanted = reduce(add, floats)
        mean, variance = wanted.mean, wanted.variance
    else:
        assert item.norm is not None
        mean, variance = item.norm.beta.double(), item.norm.gamma.double().square()
    epsilon = RELATIVE_EPSILON * float(variance.mean()) if item.norm is None else item.norm.epsilon
    if found.count:  # not where all samples that reach the layer are held out
        item.quantized.assign_(re_estimated(item.quantized.state(), found, mean, variance, epsilon))

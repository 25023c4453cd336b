"""Equalize channels between layers: scale a channel up where it leaves one module, and down where the layers behind read it.

Channels that share a step should fill their grid alike; as they are trained, some use a fiftieth of it. Between a module with one gain for
each channel (a layer, or a norm with weight and bias) and the layers that read what it gives, a factor `k > 0` for each channel

    source:  W_c' = k_c W_c,  b_c' = k_c b_c             reader:  W'[:, c] = W[:, c] / k_c

changes nothing that the model computes, if all that lies between passes positive factors on: ReLU, pooling, concatenation, attention to
values. A ReLU6 passes them on below its bound, so that `k_c` goes up to where the channel's largest output meets it.

Who reads a source is found by running (`channel_flow`). The finished change is proved by comparing outputs, as that of `fold` is, and
undone where they differ.

A linear layer on sequences that no source can serve, because what it reads is read elsewhere too, multiplies its input itself
(`input_factors`), where the predicted noise is less by enough: the multiplication is one more step at run time, and layers that read the
same, as query, key and value do, have the same factors, so that one multiplication serves all. The noise of weights counts little there:
solvers make up for it, and nothing makes up for that of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.errors import OptionError
from subbyte.model.batches import Batch, probes
from subbyte.model.channel_flow import EXACT, Flow, find_flows, scale_source_
from subbyte.model.channel_ranges import ChannelRanges
from subbyte.model.fold import NormOutput, outputs_of_those_that_run, same_outputs
from subbyte.model.input_factors import put_exponents_
from subbyte.model.layers import Layer
from subbyte.model.operators import Convolution, Linear
from subbyte.quantizers.grid import WeightGrids
from subbyte.widths import Option

LEFT_OF_WEIGHTS = 0.05  # of the noise of rounding weights: what counts where a layer scales its own input


@dataclass(frozen=True)
class Equalization:
    """How channels are scaled.

    Args:
        strengths: 0 to 1, powers of the ratio of ranges that a channel's factor may be, where readers mix channels: what their inputs gain
            in evenness, their weights may lose. The one with the least noise of rounding, predicted from ranges and second moments at the
            readers' widths, is taken. Where a reader has a step of its own for each channel's weights, as a depthwise convolution,
            nothing is lost, and the power is 1.
        most: ratio of the largest factor of a source to the smallest, at most.
        own_below: a linear layer on sequences that no source serves multiplies its input itself if that brings the predicted noise below
            this share of what it is; 0: never.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Nagel et al. 2019 (arXiv 1906.04721), section 4.1; Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), section 4. There by layer
        types and names, here by data flow, with ReLU6 left in place.

    Example:
        >>> Equalization(strengths=(0.0, 0.5)).most
        50.0
    """

    strengths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    most: float = 50.0
    own_below: float = 0.9

    def __post_init__(self) -> None:
        if not self.strengths or not all(0 <= share <= 1 for share in (*self.strengths, self.own_below)) or not self.most >= 1:
            raise OptionError(f"Equalization needs strengths from 0 to 1, own_below too, and a ratio of at least 1, not {self}")


@dataclass(frozen=True, eq=False)
class Equalized:
    """A module whose channels were scaled, or a layer that scales its own input.

    Args:
        source: its qualified name.
        readers: names of the layers that undo it; of a layer that scales its own input, its name alone.
        factors: float32 (C,), positive.
    """

    source: str
    readers: tuple[str, ...]
    factors: Tensor

    @property
    def is_own(self) -> bool:
        """Whether the layer scales its own input."""
        return self.readers == (self.source,)


@torch.no_grad()
def equalize_(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    options: Mapping[str, Sequence[Option]],
    settings: Equalization,
    weights: WeightGrids = WeightGrids(),  # noqa: B008 - a frozen value
) -> tuple[Equalized, ...]:
    """Equalize channels wherever that changes nothing the model computes.

    Args:
        model: float model in evaluation mode, batch norms folded; is changed in place.
        layers: its layers that multiply, from `layers.survey`.
        batches: calibration set, see `batches.as_batches`; ranges are taken from all of it.
        options: widths that each layer may have, by name.
        settings: how.
        weights: what the grids of weights have in common; column groups are those of linear layers.

    Returns:
        What was scaled.

    Example:
        >>> from subbyte.model.layers import survey
        >>> net, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval(), torch.randn(64, 2)
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.01]])), net[0].bias.data.zero_()
        >>> (done,) = equalize_(net, survey(net, [x])[0].layers, [x], {"0": [(4, 4)], "2": [(4, 4)]}, Equalization())
        >>> done.source, done.readers, bool(done.factors[1] > 4)
        ('0', ('2',), True)
    """
    usable = {layer.name: layer for layer in layers if layer.calls == 1 and not layer.tied_with and layer.shares is None}
    before = outputs_of_those_that_run(model, probes(batches))
    if not before:
        return ()
    flows = find_flows(model, usable, before[0][0])
    served = {name for flow in flows for name in flow.readers}
    alone = [name for name, layer in usable.items() if name not in served and _may_scale_itself(layer, options[name], settings)]
    seen = _ranges(model, flows, alone, usable, batches)
    if seen is None:
        return ()
    kept = _scale_sources_(model, seen, flows, _factors(seen, flows, options, settings, weights), before)
    for names in seen.reading_the_same(alone):
        factors = _own_factors(seen, names, options, settings, weights)
        if factors is None:
            continue
        for name in names:
            put_exponents_(model.get_submodule(name), factors.log2().to(torch.int8), usable[name].operator)
            kept.append(Equalized(name, (name,), factors))
    return tuple(kept)


def _scale_sources_(
    model: nn.Module, seen: ChannelRanges, flows: Sequence[Flow], found: Sequence[Equalized], before: _Outputs
) -> list[Equalized]:
    """Scale sources, all for which the outputs stay."""
    done = [one for one in found if float(one.factors.max()) > float(one.factors.min()) * (1 + EXACT)]
    readers = {flow.source: flow.readers for flow in flows}
    undo = [_scale_(model, seen.layers, one, readers[one.source]) for one in done]
    if same_outputs(model, before):
        return done
    for step in reversed(undo):
        _restore_(step)
    kept = []
    for one in done:  # one of them is wrong: try each alone
        step = _scale_(model, seen.layers, one, readers[one.source])
        if same_outputs(model, before):
            kept.append(one)
        else:
            _restore_(step)
    return kept


def scaled_norms(norms: Mapping[str, NormOutput], equalized: Sequence[Equalized]) -> dict[str, NormOutput]:
    """What folded batch norms made of their layers' outputs, as these are now.

    Args:
        norms: by the layer's name, from `fold.norm_outputs`.
        equalized: what was scaled since.
    """
    factors = {one.source: one.factors for one in equalized if not one.is_own}
    return {
        name: NormOutput(norm.gamma * factors[name], norm.beta * factors[name], norm.epsilon) if name in factors else norm
        for name, norm in norms.items()
    }


_Outputs = Sequence[tuple[Batch, list[Tensor]]]  # batches, and what the model returned
_Undo = list[tuple[nn.Module, dict[str, nn.Parameter | None]]]  # modules, and their parameters before


def _scale_(model: nn.Module, layers: Mapping[str, Layer], one: Equalized, readers: Mapping[str, Tensor]) -> _Undo:
    undo = [(module, dict(module._parameters)) for module in map(model.get_submodule, (one.source, *readers))]
    scale_source_(model.get_submodule(one.source), layers.get(one.source), one.factors)
    for name, channel in readers.items():
        module = model.get_submodule(name)
        factors = torch.where(channel >= 0, one.factors[channel.clamp(min=0)], 1.0)
        assert isinstance(module.weight, Tensor)
        module.weight = nn.Parameter(module.weight / layers[name].operator.per_input(factors, module.weight), requires_grad=False)
    return undo


def _restore_(undo: _Undo) -> None:
    for module, parameters in reversed(undo):
        for name, parameter in parameters.items():
            module.register_parameter(name, parameter)


def _factors(
    seen: ChannelRanges, flows: Sequence[Flow], options: Mapping[str, Sequence[Option]], settings: Equalization, weights: WeightGrids
) -> list[Equalized]:
    """Factors of every source, from ranges over all batches."""
    found = []
    for flow in flows:
        power, largest = seen.inputs(flow)
        widest = max(float(seen.power(name).amax()) for name in flow.readers)  # of other sources too, where a reader joins several
        ratio = _ratios(power, widest, settings)
        alone = all(_has_own_steps(seen.layers[name], len(channel)) for name, channel in flow.readers.items())
        top = seen.outputs.get(flow.source)
        tried = [_below_bound(ratio.pow(strength), top, largest) for strength in ((1.0,) if alone else settings.strengths)]
        best = min(range(len(tried)), key=[_noise(seen, flow, options, factors, weights) for factors in tried].__getitem__)
        found.append(Equalized(flow.source, tuple(flow.readers), tried[best].float()))
    return found


def _ratios(power: Tensor, widest: float, settings: Equalization) -> Tensor:
    """What would make channels as wide as the widest, float64 (C,)."""
    return widest / power.clamp(min=widest / settings.most if widest > 0 else 1.0)


def _below_bound(factors: Tensor, top: Tensor | None, largest: Tensor) -> Tensor:
    """Factors that bring no output above the bound of a ReLU6, if there is one.

    Args:
        factors: float64 (C,), at least 1.
        top: the source's largest outputs, float32 (C,); None where it is no layer.
        largest: the same where they are read.
    """
    if top is None or not bool(((top > largest * (1 + EXACT)) & (top > 0)).any()):
        return factors
    bound = largest.max()  # or a mean between, as by pooling: then this is more careful than needed
    return torch.where(top > 0, torch.minimum(factors, (bound / top.clamp(min=1e-30)).clamp(min=1.0)), factors)


def _noise(
    seen: ChannelRanges, flow: Flow, options: Mapping[str, Sequence[Option]], factors: Tensor, weights: WeightGrids, share: float = 1.0
) -> float:
    """Predicted noise of rounding the readers' inputs and weights, over what it is without factors; mean of readers and options.

    Rounding to steps `s` adds a variance of `s^2 / 12` to each input and each weight; the twelfth cancels.

    Args:
        seen: ranges and moments of the readers.
        flow: source and readers.
        options: of the readers.
        factors: float64 (C,).
        weights: see `equalize_`.
        share: of the noise of weights that counts.
    """
    shares = []
    for name, channel in flow.readers.items():
        mine = torch.where(channel >= 0, factors[channel.clamp(min=0)], 1.0)
        both: dict[bool, list[tuple[float, float]]] = {}  # without and with factors, by whether weights have zero-points
        for weight_bits, activation_bits in options[name]:
            grid = weights.at(weight_bits)
            if grid.symmetric not in both:
                both[grid.symmetric] = [seen.noises(name, some, grid) for some in (torch.ones_like(mine), mine)]
            weight_levels, levels = 2**weight_bits - 1, math.inf if activation_bits is None else 2**activation_bits - 1
            before, after = (share * noises[0] / weight_levels**2 + noises[1] / levels**2 for noises in both[grid.symmetric])
            shares.append(after / max(before, 1e-300))
    return math.fsum(shares) / len(shares)


def _may_scale_itself(layer: Layer, options: Sequence[Option], settings: Equalization) -> bool:
    """Whether a layer is linear, sees several rows of each sample, and has a quantized input at every option.

    Where a sample has one row, as in a classifier's head, a calibration set has few of them, and their ranges differ by chance.
    """
    fits = isinstance(layer.operator, Linear) and len(layer.input_shape) > 2
    return settings.own_below > 0 and fits and all(bits is not None for _, bits in options)


def _own_factors(
    seen: ChannelRanges, names: Sequence[str], options: Mapping[str, Sequence[Option]], settings: Equalization, weights: WeightGrids
) -> Tensor | None:
    """Powers of two by which layers that read the same best multiply it, float32 (C_in,); None where that does not bring enough."""
    squares = seen.squares[names[0]]
    flow = Flow(names[0], dict.fromkeys(names, torch.arange(len(squares), device=squares.device)), len(squares))
    power, _ = seen.inputs(flow)
    ratio = _ratios(power, float(power.amax()), settings)
    tried = [ratio.pow(strength).log2().round().exp2() for strength in settings.strengths]
    noises = [_noise(seen, flow, options, factors, weights, LEFT_OF_WEIGHTS) for factors in tried]
    best = min(range(len(tried)), key=noises.__getitem__)
    return tried[best].float() if noises[best] < settings.own_below else None


def _ranges(
    model: nn.Module, flows: Sequence[Flow], alone: Sequence[str], layers: Mapping[str, Layer], batches: Sequence[Batch]
) -> ChannelRanges | None:
    """Ranges over all batches; None if the model does not accept one of them, which the calibration pass will report."""
    reading = list(dict.fromkeys([*(name for flow in flows for name in flow.readers), *alone]))
    if not reading:
        return None
    seen = ChannelRanges(model, reading, [flow.source for flow in flows if flow.source in layers], layers)
    try:
        for batch in batches:
            seen.add(batch)
    except Exception:  # noqa: BLE001 - whatever the user's model raises
        return None
    return seen


def _has_own_steps(layer: Layer, inputs: int) -> bool:
    """Whether no two input channels of a layer share a weight step: a depthwise convolution."""
    return isinstance(layer.operator, Convolution) and layer.operator.groups == inputs

"""Where a module's channels go: which layers read them and nothing else, and as which of their input channels.

Found by running, never from names: with a module's channels scaled, a reader's input is its former one times those factors. It is then
given its former input, so that what lies behind sees no change; if the model returns what it did, nothing else reads the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.model.batches import Batch, call, tensors
from subbyte.model.layers import Layer

LEAST_FACTOR = 0.5  # of those that detect readers
EXACT = 1e-4  # how far, relatively, an input may be from the former one times its factor: float32 rounding


@dataclass(frozen=True, eq=False)
class Flow:
    """A module, called its source, and who reads it.

    Args:
        source: its qualified name.
        readers: by the layer's name, int64 (C_in,): the source's channel that each of its inputs is, -1 for none.
        channels: of the source.
    """

    source: str
    readers: Mapping[str, Tensor]
    channels: int


def scale_source_(module: nn.Module, layer: Layer | None, factors: Tensor) -> None:
    """Multiply what a module gives, channel by channel.

    Args:
        module: a layer, or one with vectors `weight` and perhaps `bias`; gets new parameters.
        layer: what it is, None if it is no layer.
        factors: float32 (C,).
    """
    assert isinstance(module.weight, Tensor)
    weight = factors if layer is None else layer.operator.per_channel(factors, module.weight)
    module.weight = nn.Parameter(module.weight * weight, requires_grad=False)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        module.bias = nn.Parameter(bias * factors, requires_grad=False)


@contextlib.contextmanager
def _scaled(module: nn.Module, layer: Layer | None, factors: Tensor) -> Iterator[None]:
    weight, bias = module.weight, getattr(module, "bias", None)
    scale_source_(module, layer, factors)
    try:
        yield
    finally:
        module.weight = weight
        if isinstance(bias, Tensor):
            module.bias = bias


def _sources(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, int]:
    """What may have one gain for each channel, and how many channels: layers, and modules with vectors `weight` and perhaps `bias`."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        shapes = {tuple(parameter.shape) for parameter in own.values()}
        if name in layers:
            found[name] = layers[name].outputs
        elif weight is not None and weight.dim() == 1 and own.keys() <= {"weight", "bias"} and len(shapes) == 1 and len(weight) > 1:
            found[name] = len(weight)
    return found


class _Spoilt(BaseException):
    """Ends a forward in which something reads a source and cannot undo its factors; no Exception, so that no model catches it."""


def find_flows(model: nn.Module, layers: Mapping[str, Layer], batch: Batch) -> list[Flow]:
    """The sources all of whose readers are layers that can undo its factors.

    Args:
        model: float model in evaluation mode; is left as it was.
        layers: that may be source or reader, by name.
        batch: what to run it on; two samples do.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    inputs: dict[str, Tensor] = {}
    handles = [module.register_forward_pre_hook(_keeping(name, inputs), with_kwargs=True) for name, module in modules.items()]
    try:
        expected = [tensor.clone() for tensor in tensors(call(model, batch))]
    finally:
        removed(handles)
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, channels in _sources(model, layers).items():
        order = torch.randperm(channels, generator=generator)
        module = model.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        factors = torch.linspace(LEAST_FACTOR, 1.0, channels + 1)[:-1][order].to(module.weight.device)
        readers: dict[str, Tensor] = {}
        hooks = [
            other.register_forward_pre_hook(_restoring(layers[reader], inputs, factors, readers), with_kwargs=True)
            for reader, other in modules.items()
            if reader in inputs
        ]
        try:
            with _scaled(module, layers.get(name), factors):
                given = list(tensors(call(model, batch)))
        except (_Spoilt, Exception):  # noqa: BLE001 - a model that checks its own numbers, say: then it is none
            continue
        finally:
            removed(hooks)
        if readers and len(given) == len(expected) and all(map(_close, given, expected)):
            found.append(Flow(name, readers, channels))
    return found


def removed(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    """Take hooks off.

    Args:
        handles: of the hooks.
    """
    for handle in handles:
        handle.remove()


def _keeping(name: str, inputs: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (x,) = (*args, *kwargs.values())
        inputs[name] = x.clone()

    return keep


def _restoring(layer: Layer, inputs: Mapping[str, Tensor], factors: Tensor, readers: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    def restore(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        (x,) = (*args, *kwargs.values())
        former = inputs[layer.name]
        if x.shape == former.shape and torch.equal(x, former):
            return args, kwargs
        channel = _channels(channels_first(x, layer), channels_first(former, layer), factors) if x.shape == former.shape else None
        if channel is None:
            raise _Spoilt
        readers[layer.name] = channel
        return (former.clone(),), {}

    return restore


def channels_first(x: Tensor, layer: Layer) -> Tensor:
    """What a layer is fed or returns as (channels, numbers).

    Args:
        x: any dtype, the shape that the layer accepts or returns.
        layer: the layer.
    """
    return x.movedim(layer.operator.channel_dimension, 0).flatten(1)


def _channels(x: Tensor, former: Tensor, factors: Tensor) -> Tensor | None:
    """The source's channel that each row is, int64 (C_in,), -1 for rows that are as they were; None if a row is something else.

    Args:
        x: input with the source scaled, float32 (C_in, numbers).
        former: input without.
        factors: of the source's channels, all different and below 1.
    """
    changed = (x != former).any(dim=1)
    bound = former.max()
    free = former < bound * (1 - EXACT) if bool((former == bound).sum() > 1) else torch.ones_like(former, dtype=torch.bool)  # no ReLU6
    ratio = (x * former * free).sum(1, dtype=torch.float64) / (former.square() * free).sum(1, dtype=torch.float64).clamp(min=1e-30)
    nearest = (ratio.float()[:, None] - factors).abs().argmin(dim=1)
    matched = factors[nearest][:, None] * former
    wrong = ((x - matched).abs() > EXACT * former.abs().amax()) & free & changed[:, None]
    bounded = (x <= former + EXACT) & (x >= former * LEAST_FACTOR - EXACT)  # at the bound: between the least factor's and none
    if bool(wrong.any()) or not bool((bounded | free).all()):
        return None
    silent = (~free | (former == 0)).all(dim=1)  # a row of nothing but zeros and bounds tells nothing
    known = torch.where(changed & ~silent, nearest, -1)
    return _completed(known, silent, len(factors)) if bool(silent.any()) else known


def _completed(known: Tensor, silent: Tensor, channels: int) -> Tensor | None:
    """The channels of silent rows, from the order of the others: one after the other, each as often as the others; None if there is none.

    Args:
        known: int64 (C_in,), -1 for none.
        silent: bool (C_in,), rows whose channel is not known.
        channels: of the source.
    """
    rows = torch.arange(len(known), device=known.device)
    if not bool((known >= 0).any()):
        return None
    first = int((known >= 0).int().argmax())
    for times in dict.fromkeys((1, len(known) // channels)):
        start = first - int(known[first]) * times if times == 1 else 0
        place = torch.div(rows - start, max(times, 1), rounding_mode="floor")
        guess = torch.where((place >= 0) & (place < channels), place, -1)
        if bool(((guess == known) | silent).all()):
            return guess
    return None


def _close(given: Tensor, expected: Tensor) -> bool:
    if given.shape != expected.shape or not given.is_floating_point():
        return given.shape == expected.shape
    return bool((given - expected).abs().max() <= EXACT * expected.abs().max()) if given.numel() else True

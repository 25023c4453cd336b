"""Find blocks: parts of a model with a few layers each that can be run again on their own inputs, from the module tree and the data flow.

* A **module** that is called once in a forward and holds a few layers, each called once: a residual block, an inverted bottleneck, a
  transformer layer. Of nested ones it is the outermost that is small enough, but no plain sequence of several.
* A **span** of layers that run one after the other outside of such modules, as in VGG or in a forward that calls functions: from the input
  of its first layer to the input of the layer behind its last one. It is run again by running the model on one sample, with every layer
  before the span answering zeros at no cost, and handing the span's first layer the input that is wanted.

Nothing goes by names: that a block computes its output from its input alone is proved by running it again.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.model.batches import Batch, call, map_tensors, sample_count, select_samples, tensors
from subbyte.model.layers import Layer


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a module is called with.

    Args:
        positional: positional arguments; tensors of any shape, structures of such, anything else.
        keyword: keyword arguments.
    """

    positional: tuple[Any, ...]
    keyword: dict[str, Any]

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """What a lockstep keeps of a call, without gradients (see `layers.layer_input`).

        Args:
            name: of the module.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
        """
        return cls(*map_tensors((args, kwargs), torch.Tensor.detach))

    def copied(self) -> Arguments:
        """The same with tensors of their own, for a model that works in place."""
        return Arguments(*map_tensors((self.positional, self.keyword), torch.Tensor.clone))


class Block(ABC):
    """Layers that are calibrated together."""

    name: str
    layers: tuple[str, ...]

    @property
    @abstractmethod
    def entry(self) -> str:
        """Name of the module whose call starts the block; its arguments are the block's."""

    @abstractmethod
    def run(self, model: nn.Module, arguments: Arguments) -> Any:
        """What the block returns; arguments are left as they are.

        Args:
            model: the model that the block was found in, or a copy of it with other layers.
            arguments: of `entry`, tensors of any shape.
        """


@dataclass(frozen=True, eq=False)
class ModuleBlock(Block):
    """A module.

    Args:
        name: its qualified name; empty for the model itself.
        layers: names of the layers in it, in running order.
    """

    name: str
    layers: tuple[str, ...]

    @property
    def entry(self) -> str:
        """See `Block`."""
        return self.name

    def run(self, model: nn.Module, arguments: Arguments) -> Any:
        """See `Block`.

        Args:
            model: see `Block`.
            arguments: of the module, tensors of any shape.
        """
        fresh = arguments.copied()
        return model.get_submodule(self.name)(*fresh.positional, **fresh.keyword)


class _Reached(BaseException):
    """Ends a forward at the end of a span; not an Exception, so that a model's own `except Exception` lets it pass."""


def _leaving(caught: list[Any]):  # type: ignore[no-untyped-def]
    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.extend((*args, *kwargs.values()))
        raise _Reached

    return leave


@dataclass(frozen=True, eq=False)
class Span(Block):
    """Layers that run one after the other, and what happens between them.

    Args:
        layers: their names, in running order.
        sample: a batch of one sample, to get the model running.
        before: by name, what the layers before the span answer: zeros in the shape of their outputs for that sample, float32.
        after: name of the layer behind the span, whose input is the span's output; None: the model's output.
    """

    layers: tuple[str, ...]
    sample: Batch
    before: Mapping[str, Tensor]
    after: str | None

    @property
    def name(self) -> str:  # type: ignore[override]
        """First and last layer."""
        return f"{self.layers[0]} to {self.layers[-1]}"

    @property
    def entry(self) -> str:
        """See `Block`."""
        return self.layers[0]

    def run(self, model: nn.Module, arguments: Arguments) -> Any:
        """See `Block`.

        Args:
            model: see `Block`.
            arguments: of the first layer: its input, a tensor of any shape.
        """
        caught: list[Any] = []

        def enter(module: nn.Module, args: object, kwargs: object) -> tuple[Any, Any]:
            fresh = arguments.copied()
            return fresh.positional, fresh.keyword

        handles = [model.get_submodule(self.entry).register_forward_pre_hook(enter, with_kwargs=True, prepend=True)]
        if self.after is not None:
            handles.append(model.get_submodule(self.after).register_forward_pre_hook(_leaving(caught), with_kwargs=True, prepend=True))
        try:
            with _answering(model, self.before):
                return call(model, self.sample)
        except _Reached:
            return caught[0]
        finally:
            for handle in handles:
                handle.remove()


def find_blocks(model: nn.Module, layers: Sequence[Layer], batch: Batch, most_layers: int, span_layers: int) -> tuple[Block, ...]:
    """The blocks of a model, in running order; a layer is in one of them or in none.

    Args:
        model: float model in evaluation mode.
        layers: its layers, from `layers.survey`.
        batch: what to run it on; two samples do.
        most_layers: layers in a module that is to be a block, at most.
        span_layers: layers in a span, at most.

    Source:
        Block reconstruction: BRECQ (Li et al. 2021, arXiv 2102.05426), section 3.2.

    Example:
        >>> from subbyte.model.layers import survey
        >>> pair = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        >>> net, x = nn.Sequential(pair, nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.ones(2, 3)
        >>> [block.layers for block in find_blocks(net, survey(net, [x])[0].layers, x, most_layers=3, span_layers=2)]
        [('0.0', '0.2'), ('1', '3')]
    """
    once = _called_once(model, batch)
    repeated = {name for layer in layers if layer.calls > 1 for name in (layer.name, *layer.other_names)}
    inside = {name: tuple(layer.name for layer in layers if _holds(name, layer.name)) for name, _ in model.named_modules()}
    usable = {name for name, found in inside.items() if name in once and not repeated.intersection(found)}
    modules = [block for block in _modules(model, "", inside, usable, most_layers) if _is_proved(model, block, batch)]
    taken = {name for block in modules for name in block.layers}
    spans = _spans(model, [(layer.name, layer.name not in taken and layer.calls == 1) for layer in layers], batch, span_layers)
    position = {layer.name: index for index, layer in enumerate(layers)}
    return tuple(sorted([*modules, *spans], key=lambda block: position[block.layers[0]]))


def _holds(module: str, layer: str) -> bool:
    return not module or layer == module or layer.startswith(f"{module}.")


def _modules(model: nn.Module, name: str, inside: Mapping[str, tuple[str, ...]], usable: set[str], most: int) -> list[Block]:
    """Modules from the root down that could be blocks."""
    module, layers = model.get_submodule(name), inside[name]
    if len(layers) < 2:
        return []
    children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
    is_stack = type(module).forward is nn.Sequential.forward and sum(len(inside[child]) > 1 for child in children) > 1
    if name in usable and len(layers) <= most and not is_stack:
        return [ModuleBlock(name, layers)]
    return [block for child in children for block in _modules(model, child, inside, usable, most)]


def _spans(model: nn.Module, layers: Sequence[tuple[str, bool]], batch: Batch, most: int) -> list[Block]:
    """Spans among layers in running order, each with whether it is free; from every free layer the longest that is proved."""
    if most < 2 or sum(free for _, free in layers) < 2:
        return []
    sample = select_samples(batch, torch.arange(sample_count(batch)) < 1)
    answers = _answers(model, [name for name, _ in layers], sample)
    names = [name for name, _ in layers]
    found: list[Block] = []
    start = 0
    while start < len(names):
        end = start
        while end < len(names) and layers[end][1] and end - start < most:
            end += 1
        for stop in range(end, start + 1, -1):
            after = names[stop] if stop < len(names) else None
            span = Span(tuple(names[start:stop]), sample, {name: answers[name] for name in names[:start] if name in answers}, after)
            if _is_proved(model, span, batch):
                found.append(span)
                start = stop
                break
        else:
            start += 1
    return found


def _called_once(model: nn.Module, batch: Batch) -> set[str]:
    """Names of the modules that one forward calls once."""
    names = {module: name for name, module in model.named_modules()}
    calls = dict.fromkeys(names, 0)

    def count(module: nn.Module, args: object) -> None:
        calls[module] += 1

    handles = [module.register_forward_pre_hook(count) for module in names]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name for module, name in names.items() if calls[module] == 1}


def _answers(model: nn.Module, names: Sequence[str], sample: Batch) -> dict[str, Tensor]:
    """Zeros in the shape of what each layer returns for a batch."""
    found: dict[str, Tensor] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        return lambda module, args, output: found.__setitem__(name, torch.zeros_like(output))

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def _answering(model: nn.Module, answers: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers that return a given tensor and compute nothing."""
    modules = [model.get_submodule(name) for name in answers]
    for module, answer in zip(modules, answers.values(), strict=True):
        module.forward = lambda *args, answer=answer, **kwargs: answer
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _is_proved(model: nn.Module, block: Block, batch: Batch) -> bool:
    """Whether a block returns the same when it is run again on the arguments that it was called with."""
    seen: dict[str, Any] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["arguments"] = Arguments(args, kwargs).copied()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["output"] = map_tensors(output, torch.Tensor.clone)

    def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["output"] = map_tensors([*args, *kwargs.values()], torch.Tensor.clone)

    handles = [model.get_submodule(block.entry).register_forward_pre_hook(enter, with_kwargs=True)]
    if isinstance(block, ModuleBlock):
        handles.append(model.get_submodule(block.name).register_forward_hook(leave))
    elif isinstance(block, Span) and block.after is not None:
        handles.append(model.get_submodule(block.after).register_forward_pre_hook(reach, with_kwargs=True))
    with torch.no_grad():
        try:
            output = call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        try:
            again = block.run(model, seen["arguments"])
        except Exception:  # noqa: BLE001 - whatever cannot be run again is no block
            return False
    expected, given = list(tensors(seen.get("output", output))), list(tensors(again))
    return bool(given) and len(expected) == len(given) and all(_close(x, y) for x, y in zip(expected, given, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().amax() if a.numel() else 1)))

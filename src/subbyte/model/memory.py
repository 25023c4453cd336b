"""Memory: one forward many times over, in which only a layer and what comes after it are computed.

Modules that have returned before the layer's first call answer with what they returned in the float forward. Only the outermost of them are
remembered, so that memory holds what is alive between blocks and inside one; and only those that do nothing else: a module that changes its
input returns it, or is run; one that gets a list, a cache or any other object that it could write to is run, and its children are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.model.batches import Batch, call

Compute = Callable[[Tensor], Tensor]
_Path = tuple[tuple[int, int], ...]
"""A call: for it and all that it is nested in, which module it is, and how many of its calls the surrounding one has made before."""


class Memory:
    """Context manager around forwards of a model, whose modules ask the memory first.

    Args:
        model: a module in evaluation mode; is left as it was.
        layers: modules of it, by name.
        keep: False: nothing is remembered, and every forward runs in full.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> with Memory(net, {"0": net[0], "2": net[2]}) as memory:
        ...     reference = memory.run(torch.ones(1, 2))
        ...     memory.advance("2", torch.ones(1, 2))
        ...     doubled = memory.changed("2", lambda x: 2 * torch.nn.functional.linear(x, net[2].weight), torch.ones(1, 2))
        >>> memory.order, torch.allclose(doubled, 2 * (reference - net[2].bias))
        (('0', '2'), True)
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], *, keep: bool = True) -> None:
        self._model, self._keep = model, keep
        self._names = {module: name for name, module in layers.items()}
        modules = (module for module in model.modules() if module is not model and not isinstance(module, torch.jit.ScriptModule))
        self._modules = list(dict.fromkeys([*modules, *self._names])) if keep else list(self._names)
        self._own: dict[nn.Module, Any] = {}
        self._known: dict[_Path, _Answer] = {}
        self._calls: list[tuple[_Path, dict[int, int]]] = []
        self._order: dict[str, None] = {}
        self._until: str | None = None
        self._change: tuple[str, Compute] | None = None

    def __enter__(self) -> Memory:
        for index, module in enumerate(self._modules):
            self._own[module] = vars(module).get("forward")
            module.forward = self._asking(index, module)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for module, forward in self._own.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        self._known.clear()

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the layers that forwards have called so far, in the order of their first calls."""
        return tuple(self._order)

    def run(self, batch: Batch) -> object:
        """What the model returns, answered by memory as far as that goes.

        Args:
            batch: see `model.batches.as_batches`; always the same.
        """
        self._calls = [((), {})]
        return call(self._model, batch)

    def advance(self, name: str, batch: Batch) -> None:
        """Remember what comes before a layer, and not what is inside of that.

        Args:
            name: of the layer, behind those of earlier calls in `order`.
            batch: see `run`.
        """
        if not self._keep:
            return
        self._until = name
        try:
            self.run(batch)
        except _Reached:
            pass
        finally:
            self._until = None

    def changed(self, name: str, compute: Compute, batch: Batch) -> object:
        """What the model returns when one layer computes something else.

        Args:
            name: of the layer to which the memory has been advanced last.
            compute: the layer's output for its input, float32, the shapes that the layer receives and returns.
            batch: see `run`.
        """
        self._change = name, compute
        try:
            return self.run(batch)
        finally:
            self._change = None

    def _asking(self, index: int, module: nn.Module) -> Callable[..., Any]:
        forward, name = module.forward, self._names.get(module)

        def ask(*args: Any, **kwargs: Any) -> Any:
            outer, counts = self._calls[-1]
            counts[index] = counts.get(index, -1) + 1
            path = (*outer, (index, counts[index]))
            if path in self._known:
                return self._known[path].given((args, kwargs))
            if name is not None:
                self._order.setdefault(name)
                if name == self._until:
                    raise _Reached
                if self._change is not None and name == self._change[0]:
                    return self._change[1](*args, *kwargs.values())
            before = _versions((args, kwargs)) if self._until is not None else None
            self._calls.append((path, {}))
            try:
                output = forward(*args, **kwargs)
            finally:
                self._calls.pop()
            if before is not None and (answer := _answer((args, kwargs), before, output)) is not None:
                self._known = {known: value for known, value in self._known.items() if known[: len(path)] != path}
                self._known[path] = answer
            return output

        return ask


class _Reached(BaseException):
    """Ends a forward at a layer; not an Exception, so that a model's own `except Exception` lets it pass."""


@dataclass(frozen=True, eq=False)
class _Answer:
    """What a call has returned: `output`, tensors in tuples; `written`: into the argument of that place, which was returned."""

    output: Any
    written: int | None

    def given(self, arguments: Any) -> Any:
        """The answer to a call with these arguments; a copy, because a model may change it in place."""
        if self.written is None:
            return _copied(self.output)
        return list(_tensors(arguments))[self.written].copy_(self.output)


def _answer(arguments: Any, before: list[int], output: Any) -> _Answer | None:
    """What to remember of a call; None where the output is not all that it did.

    Args:
        arguments: of the call.
        before: their versions before it.
        output: what it returned.
    """
    tensors = list(_tensors(arguments))
    if not _plain(arguments[0]) or not _plain(tuple(arguments[1].values())) or not _plain(output) or any(map(Tensor.is_inference, tensors)):
        return None
    written = [place for place, (tensor, version) in enumerate(zip(tensors, before, strict=True)) if tensor._version != version]
    if written:
        return _Answer(output.clone(), written[0]) if len(written) == 1 and output is tensors[written[0]] else None
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    shared = any(tensor.untyped_storage().data_ptr() in inputs for tensor in _tensors(output))  # a view, or the input itself
    return None if shared else _Answer(_copied(output), None)


def _versions(arguments: Any) -> list[int]:
    """How often each tensor has been written to."""
    return [0 if tensor.is_inference() else tensor._version for tensor in _tensors(arguments)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _plain(value: Any) -> bool:
    """Whether nothing can be written to a value but its tensors."""
    if isinstance(value, tuple):
        return type(value) in (tuple, torch.Size) and all(map(_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value

"""Lockstep forwards: run a model on every batch at once, pausing at every layer until all batches have arrived there.

Each forward is a greenlet (a call stack of its own in the caller's thread) and switches back to the caller in a pre-hook in front of every
layer. So only one runs at a time, memory holds what is alive at one layer, and the order is the same every time. When every forward has
stopped, the one that stands at the earliest layer decides where the stop is; those that stand there are handed to the caller, who may look
at their inputs and change the layer, and then go on. So one pass over the calibration set serves all layers, and later layers see what
earlier layers have become.

Threads would do too, but each one that has computed keeps a pool of OpenMP workers, and these are in each other's way: a third of the time
of a whole run on two cores.

* A layer that is called twice in a forward makes two stops.
* A layer that some batches skip makes a stop with only the others.
* An exception in a forward surfaces once, in the caller, with the layer's name; leaving the context ends all forwards, also after Ctrl-C.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from subbyte.errors import LayerError, ModelError, SubbyteError
from subbyte.model.batches import Batch, call, describe
from subbyte.model.layers import layer_input

Reader = Callable[[str, tuple[object, ...], dict[str, object]], Any]
"""What a stop is to show of a call, from the module's name, its positional and its keyword arguments."""


class _Cancelled(BaseException):
    """Unwinds a paused forward; not an Exception, so that a model's own `except Exception` lets it pass."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward to be run in lockstep.

    Args:
        model: a module in evaluation mode; several forwards may share it.
        batch: what to call it with.
        layers: the modules of `model` to stop at, by name.
    """

    model: nn.Module
    batch: Batch
    layers: Mapping[str, nn.Module]


@dataclass(frozen=True, eq=False)
class Stop:
    """A layer at which forwards are paused.

    Args:
        layer: name of the layer.
        runs: the paused forwards, by their index; keeps no tensor alive once they go on.
    """

    layer: str
    runs: Mapping[int, _Run]

    def input(self, index: int) -> Any:
        """What one paused forward is about to feed to the layer.

        Args:
            index: of the forward, one of `runs`.

        Returns:
            What the lockstep's reader returned for the call; of `layer_input`, a tensor, float32, the shape that the layer receives.
        """
        return self.runs[index].waiting


class Lockstep:
    """Context manager over paused forwards; iterate to get the stops.

    Args:
        forwards: what to run.
        order: names of the layers in running order.
        keep_outputs: whether `outputs` will be asked for; else they are dropped as they come.
        read: what `Stop.input` is to give; nothing else of a call is kept alive.

    Raises:
        LayerError: while iterating, if a model fails after it has reached a layer.
        ModelError: while iterating, if a model fails before its first layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> layers = {"0": net[0], "2": net[2]}
        >>> with Lockstep([Forward(net, torch.ones(1, 2), layers) for _ in range(3)], ["0", "2"]) as lockstep:
        ...     [(stop.layer, len(stop.runs)) for stop in lockstep]
        [('0', 3), ('2', 3)]
    """

    def __init__(
        self, forwards: Sequence[Forward], order: Sequence[str], *, keep_outputs: bool = False, read: Reader = layer_input
    ) -> None:
        self._read = read
        self._position = {name: index for index, name in enumerate(order)}
        self._runs = [_Run(forward, keep_output=keep_outputs) for forward in forwards]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Lockstep:
        by_stack = {run.stack: run for run in self._runs}
        for name, module in {(name, module) for run in self._runs for name, module in run.forward.layers.items()}:
            self._handles.append(module.register_forward_pre_hook(_pause_at(name, by_stack, self._read), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_leave(by_stack)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for run in self._runs:
            run.cancel()
        for handle in self._handles:
            handle.remove()

    def __iter__(self) -> Iterator[Stop]:
        active = dict(enumerate(self._runs))
        moving = active
        while moving:
            for run in moving.values():
                run.go_on()
            active = {index: run for index, run in active.items() if not run.finished}
            if not active:
                return
            here = min((run.layer for run in active.values()), key=lambda name: self._position[name])
            moving = {index: run for index, run in active.items() if run.layer == here}
            yield Stop(here, moving)

    def outputs(self) -> list[object]:
        """What each forward returned, in the order in which they were given, once the iteration has ended; None unless they were kept."""
        return [run.output for run in self._runs]


class _Run:
    """One forward on a call stack of its own; it runs while the caller waits in `go_on` or `cancel`."""

    def __init__(self, forward: Forward, *, keep_output: bool) -> None:
        self.forward = forward
        self._keep_output = keep_output
        self.stack = greenlet(self._main)
        self.layer = ""
        self.waiting: Any = None
        self.output: object = None
        self.finished = False
        self._inside = False
        self._error: BaseException | None = None
        self._cancelled = False

    def go_on(self) -> None:
        """Let the forward run until its next layer or its end; raise what it raised."""
        self.waiting = None
        with _modes_kept():
            self.stack.switch()
        if self._error is not None:
            named = self._named(self._error)
            raise named from (None if named is self._error else self._error)

    def cancel(self) -> None:
        """End the forward, wherever it is; returns when it has ended."""
        self._cancelled = True
        self.waiting = None
        if self.stack:  # has started, and not ended
            with _modes_kept():
                self.stack.switch()

    def pause(self, layer: str, waiting: Any) -> None:
        """In the forward: go back to the caller, and wait until it lets the forward go on."""
        if self._cancelled:  # the model has swallowed what should have ended it
            raise _Cancelled
        self.layer, self.waiting = layer, waiting
        del waiting
        assert self.stack.parent is not None
        with _modes_kept():
            self.stack.parent.switch()
        if self._cancelled:
            raise _Cancelled
        self._inside = True

    def leave(self) -> None:
        """In the forward: the layer has returned."""
        self._inside = False

    def _main(self) -> None:
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                output = call(self.forward.model, self.forward.batch)
            self.output = output if self._keep_output else None
        except _Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the caller, who raises it
            self._error = error
        finally:
            self.finished = True

    def _named(self, error: BaseException) -> BaseException:
        if isinstance(error, SubbyteError) or not isinstance(error, Exception):
            return error
        where = f"the model failed on batch {describe(self.forward.batch)}"
        if not self.layer:
            return ModelError(f"{where} before it reached its first layer: {error}")
        return LayerError(self.layer, f"{where} {'in' if self._inside else 'after'} this layer: {error}")


@contextlib.contextmanager
def _modes_kept() -> Iterator[None]:
    """Around a switch: what torch keeps for a whole thread must not pass from one forward to another, nor to the caller."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    try:
        with torch.inference_mode(mode=inference), torch.set_grad_enabled(grad):
            yield
    finally:
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


def _pause_at(name: str, by_stack: Mapping[greenlet, _Run], read: Reader):  # type: ignore[no-untyped-def]
    def pause(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        run = by_stack.get(getcurrent())
        if run is not None:
            run.pause(name, read(name, args, kwargs))

    return pause


def _leave(by_stack: Mapping[greenlet, _Run]):  # type: ignore[no-untyped-def]
    def leave(module: nn.Module, args: object, output: object) -> None:
        run = by_stack.get(getcurrent())
        if run is not None:
            run.leave()

    return leave

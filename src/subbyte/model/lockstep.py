"""Lockstep forwards: run a model on every batch at once, pausing at every layer until all batches have arrived there.

Each forward runs in a thread of its own and stops in a pre-hook in front of every layer. Only one thread runs at a time: the caller
passes a baton, so that memory holds what is alive at one layer and the order is the same every time. When every forward has stopped, the
one that stands at the earliest layer decides where the stop is; those that stand there are handed to the caller, who may look at their
inputs and change the layer, and then go on. So one pass over the calibration set serves all layers, and later layers see what earlier
layers have become.

* A layer that is called twice in a forward makes two stops.
* A layer that some batches skip makes a stop with only the others.
* An exception in a forward surfaces once, in the caller, with the layer's name; leaving the context ends all threads, also after Ctrl-C.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from subbyte.errors import LayerError, ModelError, SubbyteError
from subbyte.model.batches import Batch, call, describe
from subbyte.model.layers import layer_input


class _Cancelled(BaseException):
    """Unwinds a paused forward; not an Exception, so that a model's own `except Exception` lets it pass."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward to be run in lockstep.

    Args:
        model: a module in evaluation mode; several forwards may share it.
        batch: what to call it with.
        layers: the modules of `model` to stop at, by layer name.
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

    def input(self, index: int) -> Tensor:
        """What one paused forward is about to feed to the layer.

        Args:
            index: of the forward, one of `runs`.

        Returns:
            float32, the shape that the layer receives.
        """
        waiting = self.runs[index].waiting
        assert waiting is not None
        return waiting


class Lockstep:
    """Context manager over paused forwards; iterate to get the stops.

    Args:
        forwards: what to run.
        order: names of the layers in running order.
        keep_outputs: whether `outputs` will be asked for; else they are dropped as they come.

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

    def __init__(self, forwards: Sequence[Forward], order: Sequence[str], *, keep_outputs: bool = False) -> None:
        self._position = {name: index for index, name in enumerate(order)}
        self._runs = [_Run(forward, keep_output=keep_outputs) for forward in forwards]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Lockstep:
        by_thread = {run.thread: run for run in self._runs}
        for name, module in {(name, module) for run in self._runs for name, module in run.forward.layers.items()}:
            self._handles.append(module.register_forward_pre_hook(_pause_at(name, by_thread), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_leave(by_thread)))
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
    """One forward in its thread, and the baton: exactly one of the thread and the caller runs at any time."""

    def __init__(self, forward: Forward, *, keep_output: bool) -> None:
        self.forward = forward
        self._keep_output = keep_output
        self.thread = threading.Thread(target=self._main, name="subbyte-forward", daemon=True)
        self.layer = ""
        self.waiting: Tensor | None = None
        self.output: object = None
        self.finished = False
        self._inside = False
        self._error: BaseException | None = None
        self._cancelled = False
        self._resumed = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)

    def go_on(self) -> None:
        """Let the forward run until its next layer or its end; raise what it raised."""
        self.waiting = None
        if self.thread.ident is None:
            self.thread.start()
        else:
            self._resumed.release()
        self._paused.acquire()
        if self._error is not None:
            named = self._named(self._error)
            raise named from (None if named is self._error else self._error)

    def cancel(self) -> None:
        """End the thread, wherever it is; returns when it has ended."""
        self._cancelled = True
        self.waiting = None
        if self.thread.ident is not None:
            self._resumed.release()
            self.thread.join()

    def pause(self, layer: str, x: Tensor) -> None:
        """In the thread: hand the baton to the caller and wait for it."""
        if self._cancelled:  # the model has swallowed what should have ended it
            raise _Cancelled
        self.layer, self.waiting = layer, x
        del x
        self._paused.release()
        self._resumed.acquire()
        if self._cancelled:
            raise _Cancelled
        self._inside = True

    def leave(self) -> None:
        """In the thread: the layer has returned."""
        self._inside = False

    def _main(self) -> None:
        try:
            with torch.no_grad():
                output = call(self.forward.model, self.forward.batch)
            self.output = output if self._keep_output else None
        except _Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the caller, who raises it
            self._error = error
        finally:
            self.finished = True
            self._paused.release()

    def _named(self, error: BaseException) -> BaseException:
        if isinstance(error, SubbyteError) or not isinstance(error, Exception):
            return error
        where = f"the model failed on batch {describe(self.forward.batch)}"
        if not self.layer:
            return ModelError(f"{where} before it reached its first layer: {error}")
        return LayerError(self.layer, f"{where} {'in' if self._inside else 'after'} this layer: {error}")


def _pause_at(name: str, by_thread: Mapping[threading.Thread, _Run]):  # type: ignore[no-untyped-def]
    def pause(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        run = by_thread.get(threading.current_thread())
        if run is not None:
            run.pause(name, layer_input(name, args, kwargs))

    return pause


def _leave(by_thread: Mapping[threading.Thread, _Run]):  # type: ignore[no-untyped-def]
    def leave(module: nn.Module, args: object, output: object) -> None:
        run = by_thread.get(threading.current_thread())
        if run is not None:
            run.leave()

    return leave

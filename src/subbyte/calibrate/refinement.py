"""What may follow when every layer has its codes: refinements of the whole model, each kept only if held-out samples agree."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.models import Models
from subbyte.calibrate.whole import Judge
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.run.events import Observer


class Refinement(ABC):
    """Improves a quantized model as a whole. Implementations are frozen dataclasses that hold their hyperparameters, one in a file.

    Example:
        >>> from subbyte.calibrate.blockwise import Blockwise
        >>> isinstance(Blockwise(), Refinement)
        True
    """

    @property
    def name(self) -> str:
        """What a receipt calls this refinement."""
        return type(self).__name__

    @abstractmethod
    def refine_(self, models: Models, data: CalibrationSet, judge: Judge, observer: Observer) -> tuple[str, ...]:
        """Change the quantized model for the better. Widths stay as they are, so that the file's size does too.

        Args:
            models: layers of `models.quantized` have their codes, and get new ones with `QuantizedLayer.assign_`; the tensors of a state
                are replaced, not changed.
            data: calibration set; fit on the samples that are not held out.
            judge: the held-out samples, by which the refinement is kept or taken back; for choices that they have to make before.
            observer: is told when it starts and ends, under the refinement's name, and of progress.

        Returns:
            What a receipt should say: what was done, what was not and why.
        """


@dataclass(frozen=True)
class RefinementReport:
    """What a refinement did to the loss of the whole model on held-out samples.

    Args:
        name: of the refinement.
        start_loss: before it.
        loss: after it; NaN where the model then returned NaN.
        seconds: it took.
        notes: its own words.
    """

    name: str
    start_loss: float
    loss: float
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the loss fell. Otherwise the model is as it was before."""
        return self.loss < self.start_loss


def refine_guarded_(
    models: Models, refinements: Sequence[Refinement], data: CalibrationSet, judge: Judge, start_loss: float, observer: Observer
) -> tuple[RefinementReport, ...]:
    """Apply refinements one after the other, and take back each that does not lower the loss on held-out samples.

    Args:
        models: `models.quantized` is changed in place.
        refinements: in this order.
        data: calibration set.
        judge: measures.
        start_loss: of `models.quantized` as it is given.
        observer: is given to them.
    """
    reports: list[RefinementReport] = []
    loss = start_loss
    for refinement in refinements:
        started = time.perf_counter()
        before = _Snapshot(models)
        notes = refinement.refine_(models, data, replace(judge, start_loss=loss), observer)
        reached = loss if before.still_there() else judge.loss_of(models.quantized)
        report = RefinementReport(refinement.name, loss, reached, time.perf_counter() - started, notes)
        if report.kept:
            loss = report.loss
        else:
            before.restore_()
        reports.append(report)
    return tuple(reports)


class _Snapshot:
    """Everything that a refinement may change."""

    def __init__(self, models: Models) -> None:
        self._layers: list[tuple[QuantizedLayer, QuantizedState]] = [(item.quantized, item.quantized.state()) for item in models.layers]
        inside = {id(tensor) for item in models.layers for tensor in item.quantized.buffers()}
        others = [*models.quantized.parameters(), *models.quantized.buffers()]
        self._others: list[tuple[Tensor, Tensor]] = [(tensor, tensor.detach().clone()) for tensor in others if id(tensor) not in inside]

    def still_there(self) -> bool:
        """Whether nothing has been changed, or all of it back."""
        same = all(_parts(layer.state()) == _parts(state) for layer, state in self._layers)
        return same and all(torch.equal(tensor, value) for tensor, value in self._others)

    @torch.no_grad()
    def restore_(self) -> None:
        for layer, state in self._layers:
            layer.assign_(state)
        for tensor, value in self._others:
            tensor.copy_(value)


def _parts(state: QuantizedState) -> list[int]:
    """Which tensors and grids a state is made of: a refinement replaces what it changes."""
    return [id(part) for part in (state.codes, state.scale, state.zero_point, state.bias, state.weight_grid, *(state.activation or ()))]

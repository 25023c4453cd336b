"""Measured: each layer at each option in the float model, one at a time, and the loss of the whole. L times K forwards, at most.

What lies before the changed layer is not computed again: the layers' outputs of the float forward are remembered for one batch, and in
the forwards that follow, calls that come before the changed layer's first one answer with them. What lies between layers still runs, so
that any eager model works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.allocate.sensitivity import BatchShare, LayerOptions, SensitivityMethod
from subbyte.calibrate.loss import OutputLoss
from subbyte.model.batches import Batch, call
from subbyte.model.padding import read_outputs
from subbyte.widths import Option


@dataclass(frozen=True)
class Measured(SensitivityMethod):
    """The loss itself, layer by layer and option by option.

    Args:
        remember: whether calls before the changed layer answer from memory; takes the memory of all layers' outputs for one batch.

    Source:
        Hubara et al., arXiv 2006.10518, section 3.3.

    Example:
        >>> Measured().name
        'Measured'
    """

    remember: bool = True

    @torch.no_grad()
    def share(
        self, model: nn.Module, layers: Sequence[LayerOptions], batch: Batch, loss: OutputLoss, generator: torch.Generator
    ) -> BatchShare:
        """See `SensitivityMethod`.

        Args:
            model: see there.
            layers: see there.
            batch: see there.
            loss: see there.
            generator: not used.
        """
        memory = _Memory(layers, keep=self.remember)
        with memory.standing_in():
            reference = read_outputs(call(model, batch), batch)
            memory.recorded = True
            below = sum(float(loss.total(tensor, tensor)[1]) for tensor in reference)
            above = {}
            for layer in layers:
                losses = []
                for option in layer.states:
                    memory.change(layer, option)
                    outputs = read_outputs(call(model, batch), batch)
                    losses.append(sum(float(loss.total(a, b)[0]) for a, b in zip(reference, outputs, strict=True)))
                above[layer.item.layer.name] = torch.tensor(losses, dtype=torch.float64)
        return BatchShare(above, below)


class _Memory:
    """Outputs of all layer calls of one forward, in order, and which layer is changed now."""

    def __init__(self, layers: Sequence[LayerOptions], *, keep: bool) -> None:
        self._layers, self._keep = layers, keep
        self._outputs: list[Tensor] = []
        self._first: dict[str, int] = {}
        self._changed: LayerOptions | None = None
        self._option: Option = (8, 8)
        self._at = 0
        self.recorded = False

    def change(self, layer: LayerOptions, option: Option) -> None:
        """From now on a forward computes this layer at this option, and all others as they are."""
        self._changed, self._option, self._at = layer, option, 0

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Layers of the float model ask the memory first."""
        for layer in self._layers:
            layer.item.original.forward = self._answerer(layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.item.original.forward

    def _answerer(self, layer: LayerOptions):  # type: ignore[no-untyped-def]
        name = layer.item.layer.name

        def answer(input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear and nn.Conv2d have
            here, self._at = self._at, self._at + 1
            if not self.recorded:
                self._first.setdefault(name, here)
                output = layer.float_output(input)
                if self._keep:
                    self._outputs.append(output.clone())  # the model may change it in place
                return output
            assert self._changed is not None
            if self._changed is layer:
                return layer.output(input, self._option)
            first = self._first.get(self._changed.item.layer.name, 0)
            if self._keep and here < first:
                return self._outputs[here].clone()
            return layer.float_output(input)

        return answer

"""Measured: each layer at each option in the float model, one at a time, and the loss of the whole. L times K forwards, at most.

What lies before the changed layer is not computed again (`model/memory.py`), so that a layer's options cost what comes behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from subbyte.allocate.sensitivity import BatchShare, LayerOptions, SensitivityMethod
from subbyte.calibrate.loss import OutputLoss
from subbyte.errors import OptionError
from subbyte.model.batches import Batch, sample_count
from subbyte.model.memory import Memory
from subbyte.model.padding import read_outputs

ALIKE = 1e-8  # squared relative difference of two forwards in which a processor has only summed in another order


@dataclass(frozen=True)
class Measured(SensitivityMethod):
    """The loss itself, layer by layer and option by option.

    Args:
        remember: whether what comes before the changed layer answers from memory, which then holds what all blocks before it have returned,
            for one batch. A model that does otherwise with it is measured without.
        samples: batches are measured until there are so many; as few as possible, spread evenly. None: all.

    Raises:
        OptionError: if `samples` is not positive.

    Source:
        Hubara et al., arXiv 2006.10518, section 3.3.

    Example:
        >>> Measured().name
        'Measured'
    """

    remember: bool = True
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise OptionError(f"at least one sample is needed to measure, not {self.samples}")

    def parts(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Whole batches: a model may accept no others.

        Args:
            batches: of the calibration set.
        """
        if self.samples is None:
            return batches
        for count in range(1, len(batches)):
            chosen = [batches[index * len(batches) // count] for index in range(count)]
            if sum(map(sample_count, chosen)) >= self.samples:
                return chosen
        return batches

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
        if self.remember:
            with contextlib.suppress(Exception):  # of a model that misses what a remembered module would have written elsewhere
                if (found := self._measured(model, layers, batch, loss, keep=True)) is not None:
                    return found
        found = self._measured(model, layers, batch, loss, keep=False)
        assert found is not None
        return found

    def _measured(
        self, model: nn.Module, layers: Sequence[LayerOptions], batch: Batch, loss: OutputLoss, *, keep: bool
    ) -> BatchShare | None:
        """See `share`; None if the float forward returns something else once all of it is remembered."""
        by_name = {layer.item.layer.name: layer for layer in layers}
        with Memory(model, {name: layer.item.original for name, layer in by_name.items()}, keep=keep) as memory:
            reference = read_outputs(memory.run(batch), batch)
            totals = [loss.total(tensor, tensor) for tensor in reference]
            nothing = sum(float(above) for above, _ in totals)
            above = {name: [nothing] * len(layer.states) for name, layer in by_name.items()}
            for name in memory.order:
                memory.advance(name, batch)
                for place, option in enumerate(by_name[name].states):
                    outputs = read_outputs(memory.changed(name, partial(by_name[name].output, option=option), batch), batch)
                    above[name][place] = sum(float(loss.total(a, b)[0]) for a, b in zip(reference, outputs, strict=True))
            if keep and not all(map(_alike, reference, read_outputs(memory.run(batch), batch))):
                return None
        losses = {name: torch.tensor(row, dtype=torch.float64) for name, row in above.items()}
        return BatchShare(losses, sum(float(below) for _, below in totals))


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).square().sum() <= ALIKE * a.square().sum())

"""OwnLoss: the user's own measure of the whole model, on labelled samples of theirs, with one layer at one option at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.allocate.sensitivity import BatchShare, LayerOptions, SensitivityMethod
from subbyte.calibrate.loss import OutputLoss
from subbyte.calibrate.whole import Judge
from subbyte.model.batches import Batch
from subbyte.widths import Option


@dataclass(frozen=True)
class OwnLoss(SensitivityMethod):
    """How much a loss of the user's rises when one layer is quantized; it may fall, and is taken as it is. Asked once for each option.

    Args:
        loss: takes a model, gives a number, lower is better; for example the cross entropy on labelled samples.

    Source:
        Hubara et al., arXiv 2006.10518, section 3.3, where the loss is that of the calibration set's labels.

    Example:
        >>> OwnLoss(lambda model: 0.0).name
        'OwnLoss'
    """

    loss: Callable[[nn.Module], float]
    on_calibration_samples = False

    def parts(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """One part: the loss has samples of its own.

        Args:
            batches: of the calibration set.
        """
        return batches[:1]

    def loss_name(self, loss: OutputLoss) -> str:
        """The name of the user's loss.

        Args:
            loss: of the recipe or budget; not used.
        """
        return getattr(self.loss, "__name__", type(self.loss).__name__)

    def of_whole(self, judge: Judge, loss: OutputLoss, original: nn.Module, quantized: nn.Module) -> float:
        """How much the loss of the quantized model is above the float model's.

        Args:
            judge: not used.
            loss: not used.
            original: float model.
            quantized: the model to measure.
        """
        return self.loss(quantized) - self.loss(original)

    def share(
        self, model: nn.Module, layers: Sequence[LayerOptions], batch: Batch, loss: OutputLoss, generator: torch.Generator
    ) -> BatchShare:
        """See `SensitivityMethod`.

        Args:
            model: see there.
            layers: see there.
            batch: not used.
            loss: not used.
            generator: not used.
        """
        start = self.loss(model)
        above = {}
        for layer in layers:
            losses = []
            for option in layer.states:
                layer.item.original.forward = _at(layer, option)
                try:
                    losses.append(self.loss(model) - start)
                finally:
                    del layer.item.original.forward
            above[layer.item.layer.name] = torch.tensor(losses, dtype=torch.float64)
        return BatchShare(above, 1.0)


def _at(layer: LayerOptions, option: Option) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear and nn.Conv2d have
        return layer.output(input, option)

    return forward

"""Sensitivity: the model's loss when one layer alone is quantized, for every layer and option. The table, and what measures it.

Layers are reconstructed first: what is measured is a layer as it would be used, not a rounded one.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.guard import Judged
from subbyte.calibrate.kept import Kept
from subbyte.calibrate.loss import OutputLoss
from subbyte.calibrate.models import CalibratedLayer, Models, at_option, state_of
from subbyte.calibrate.whole import Judge
from subbyte.errors import LayerError
from subbyte.model.batches import Batch
from subbyte.model.quantized_layer import QuantizedState
from subbyte.quantizers.affine import fake_quantize
from subbyte.run.bank import Entry, digest
from subbyte.run.events import Observer, StageFinished, StageStarted, StepDone
from subbyte.widths import Option

STAGE = "sensitivity"


@dataclass(frozen=True)
class Sensitivity:
    """The table.

    Args:
        losses: by layer name and option, the model's loss with that layer alone quantized; infinite where an option breaks the model.
        loss_name: what the loss is, for example ``"KLDivergence"``.
        method: what measured it.
        notes: entries that are infinite or negative, by layer.

    Raises:
        LayerError: if a loss is NaN or minus infinity, or all of a layer's losses are infinite.

    Example:
        >>> Sensitivity({"conv": {(4, 4): 0.1, (8, 8): math.inf}}, "KLDivergence", "Measured").notes
        ("layer 'conv' breaks the model at W8A8, which is left out",)
        >>> Sensitivity({"conv": {(4, 4): math.nan}}, "KLDivergence", "Measured")
        Traceback (most recent call last):
        subbyte.errors.LayerError: layer 'conv': has a sensitivity of nan at W4A4; check the loss and the data, or leave that option out
    """

    losses: Mapping[str, Mapping[Option, float]]
    loss_name: str
    method: str

    def __post_init__(self) -> None:
        for name, row in self.losses.items():
            for option, loss in row.items():
                if math.isnan(loss) or loss == -math.inf:
                    message = f"has a sensitivity of {loss} at {option_text(option)}; check the loss and the data, or leave that option out"
                    raise LayerError(name, message)
            if all(math.isinf(loss) for loss in row.values()):
                raise LayerError(name, "breaks the model at each of its options; give it wider ones, or exclude it")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual in the table, by layer."""
        found = []
        for name, row in self.losses.items():
            if broken := [option_text(option) for option, loss in row.items() if loss == math.inf]:
                found.append(f"layer '{name}' breaks the model at {', '.join(broken)}, which is left out")
            if negative := [option_text(option) for option, loss in row.items() if loss < 0]:
                found.append(f"layer '{name}' lowers the loss at {', '.join(negative)}; taken as it was measured")
        return tuple(found)

    def total(self, allocation: Mapping[str, Option]) -> float:
        """The predicted loss of an allocation: the sum over its layers.

        Args:
            allocation: `(weight bits, activation bits or None)` by layer name.
        """
        return sum(self.losses[name][option] for name, option in allocation.items())


def option_text(option: Option) -> str:
    """An option in a few letters.

    Args:
        option: `(weight bits, activation bits or None)`.

    Example:
        >>> option_text((4, 8)), option_text((3, None))
        ('W4A8', 'W3A32')
    """
    return f"W{option[0]}A{32 if option[1] is None else option[1]}"


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """A layer of the float model, and what it would compute with at each option.

    Args:
        item: the layer.
        states: codes and steps, by option.
    """

    item: CalibratedLayer
    states: Mapping[Option, QuantizedState]

    def output(self, x: Tensor, option: Option) -> Tensor:
        """The quantized layer's output.

        Args:
            x: the layer's float input, float32, the shape that the layer accepts.
            option: one of `states`.
        """
        state, operator = self.states[option], self.item.layer.operator
        if state.activation is not None:
            x = fake_quantize(x, *state.activation)
        return operator(x, state.weight(operator), state.bias)

    def float_output(self, x: Tensor) -> Tensor:
        """The float layer's output.

        Args:
            x: the layer's input, float32, the shape that the layer accepts.
        """
        return self.item.layer.operator(x, self.float_weight(), self.float_bias())

    def float_weight(self) -> Tensor:
        """The float layer's weight, float32, the layer's weight shape."""
        weight = self.item.original.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def float_bias(self) -> Tensor | None:
        """The float layer's bias, float32 (C_out,), or None."""
        bias = getattr(self.item.original, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


@dataclass(frozen=True, eq=False)
class BatchShare:
    """What one batch adds to the table.

    Args:
        above: by layer name, float64 (options,): numerators of the mean loss.
        below: their denominator.
    """

    above: Mapping[str, Tensor]
    below: float


class SensitivityMethod(ABC):
    """What fills the table. Implementations are frozen dataclasses, one in a file."""

    on_calibration_samples = True
    """Whether it measures on the samples that layers were fitted on, so that the table has to be corrected for what they know by heart."""

    @property
    def name(self) -> str:
        """What a receipt calls this method."""
        return type(self).__name__

    def suited_to(self, samples: int) -> SensitivityMethod:
        """The method as it is to measure on a calibration set: with more chance averaged out, say, where samples are few.

        Args:
            samples: in the set.
        """
        return self

    def parts(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """What `share` is called with, one after the other; their shares add up to the table.

        Args:
            batches: of the calibration set.
        """
        return batches

    def loss_name(self, loss: OutputLoss) -> str:
        """What the table's losses are.

        Args:
            loss: that was asked for.
        """
        return type(loss).__name__

    def of_whole(self, judge: Judge, loss: OutputLoss, original: nn.Module, quantized: nn.Module) -> float:
        """The same loss of a whole quantized model, to stand beside what the table predicts.

        Args:
            judge: the held-out samples.
            loss: that was asked for.
            original: float model.
            quantized: the model to measure.
        """
        return replace(judge, loss=loss).loss_of(quantized)

    @abstractmethod
    def share(
        self, model: nn.Module, layers: Sequence[LayerOptions], batch: Batch, loss: OutputLoss, generator: torch.Generator
    ) -> BatchShare:
        """What one batch adds to the table.

        Args:
            model: float model; is left as it was.
            layers: and their options.
            batch: see `model.batches.as_batches`.
            loss: distance from the float model's outputs.
            generator: source of every random number, on the CPU.
        """


def sensitivity_of(
    models: Models,
    solved: Mapping[str, Mapping[Option, Judged]],
    data: CalibrationSet,
    asked: tuple[SensitivityMethod, OutputLoss],
    kept: Kept,
    observer: Observer,
) -> Sensitivity:
    """Measure the table, batch by batch; batches that are in the bank are not measured again.

    Args:
        models: the float model and its layers; is not changed.
        solved: solutions of every layer, by name and option.
        data: calibration set.
        asked: what measures, and the loss.
        kept: the run's bank.
        observer: is told of every batch.

    Raises:
        LayerError: if a sensitivity is NaN.
    """
    started = time.perf_counter()
    method, loss = asked[0].suited_to(sum(map(len, data.held_out))), asked[1]
    layers = [
        LayerOptions(item, {o: state_of(at_option(item, o), judged.solution) for o, judged in solved[item.layer.name].items()})
        for item in models.layers
    ]
    options = {layer.item.layer.name: tuple(layer.states) for layer in layers}
    parts = method.parts(data.batches)
    observer(StageStarted(STAGE, len(parts), "batches"))
    above = {name: torch.zeros(len(row), dtype=torch.float64) for name, row in options.items()}
    below = 0.0
    for index, batch in enumerate(parts):
        key = digest("sensitivity", kept.run, options, method, loss, index)
        entry = kept.bank.get(key)
        if entry is None:
            generator = torch.Generator().manual_seed(int(digest(data.seed, "sensitivity", index)[:15], 16))
            share = method.share(models.original, layers, batch, loss, generator)
            entry = Entry({name: values.cpu() for name, values in share.above.items()}, {"below": share.below})
            kept.bank.put(key, entry)
        for name, values in entry.tensors.items():
            above[name] += values
        below += entry.facts["below"]
        observer(StepDone(STAGE))
    observer(StageFinished(STAGE, time.perf_counter() - started))
    losses = {name: dict(zip(options[name], (above[name] / max(below, 1e-300)).tolist(), strict=True)) for name in options}
    if method.on_calibration_samples:
        held_out = float(torch.cat(list(data.held_out)).double().mean())
        losses = {name: {o: _on_others(value, solved[name][o].gap, held_out) for o, value in row.items()} for name, row in losses.items()}
    return Sensitivity(losses, method.loss_name(loss), method.name)


def _on_others(loss: float, gap: float, held_out: float) -> float:
    """The loss on samples that the layer was not fitted on, from that on all of them: with fewer equations than weights it knows the others
    by heart, and would seem to bear any width.

        loss = (1 - h) l + h gap l      the result is gap l; h: share of the samples that are held out

    Args:
        loss: on all samples.
        gap: see `Judged`.
        held_out: share of the samples that are held out.
    """
    return loss * gap / (1.0 - held_out + held_out * gap) if loss > 0 else loss

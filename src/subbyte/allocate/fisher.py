"""Fisher: the whole table from one backward pass for each draw, whatever the number of layers and options.

Write `dy` for the change of a layer's output when the layer is quantized, `g` for the gradient of a random scalar of the model's output at
the layer's output. To second order in `dy`

    KL(float || quantized)        =  E[(g . dy)^2] / 2      g of log p(label), the label drawn from the model itself
    || z_float - z_quantized ||^2  =  E[(g . dy)^2]          g of r . z, the signs r drawn at random

The loss provides the scalar, `OutputLoss.probe`. `dy` comes from the layer alone, on its float input: one layer forward for each option.
With K options and D draws the table costs a forward, D backward passes (towards inputs only, each about a forward) and K + 1 layer
forwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from subbyte.allocate.sensitivity import BatchShare, LayerOptions, SensitivityMethod
from subbyte.calibrate.loss import OutputLoss
from subbyte.errors import LayerError, ModelError, OptionError
from subbyte.model.batches import Batch, call, sample_count
from subbyte.model.padding import read_outputs

NO_GRADIENT = "gets no gradient from the model's output; use the sensitivity method Measured(), or exclude the layer"


@dataclass(frozen=True)
class Fisher(SensitivityMethod):
    """Second-order sensitivities by random probes of the output.

    Args:
        draws: probes of every sample; more make the table less random.

    Raises:
        OptionError: if there is no draw.

    Source:
        The Fisher information as curvature of the KL divergence (Amari); empirical use for quantization: FIT (Zandonati et al. 2022,
        arXiv 2210.08502), BRECQ (Li et al. 2021, arXiv 2102.05426). Here per sample, and on reconstructed layers.

    Example:
        >>> Fisher(draws=1).name
        'Fisher'
    """

    draws: int = 2

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise OptionError(f"Fisher needs at least one draw, not {self.draws}")

    def share(
        self, model: nn.Module, layers: Sequence[LayerOptions], batch: Batch, loss: OutputLoss, generator: torch.Generator
    ) -> BatchShare:
        """See `SensitivityMethod`.

        Args:
            model: see there.
            layers: see there.
            batch: see there.
            loss: one that has a probe.
            generator: draws the probes.

        Raises:
            LayerError: if a layer changes the output, and no gradient comes back to it.
            ModelError: if the model cannot be differentiated.
            OptionError: if the loss has no probe.
        """
        samples = sample_count(batch)
        calls: list[_Call] = []
        with torch.enable_grad(), _recording(model, layers, calls):
            output = read_outputs(call(model, batch), batch)
            scalars = [loss.probe(output, generator) for _ in range(self.draws)]
            for draw, scalar in enumerate(scalars):
                if scalar.requires_grad:
                    _backward(scalar, again=draw + 1 < self.draws)
        changes = {layer.item.layer.name: torch.zeros(self.draws, len(layer.states), samples, dtype=torch.float64) for layer in layers}
        with torch.no_grad():
            unread = _unread(model, batch, calls, output)
            while calls:
                one = calls.pop()
                if one.layer.item.layer.name in unread:
                    continue
                changes[one.layer.item.layer.name] += one.changes(samples)
            below = sum(float(loss.total(tensor, tensor)[1]) for tensor in output)
        return BatchShare({name: change.square().sum(dim=2).mean(dim=0) for name, change in changes.items()}, below)


def _unread(model: nn.Module, batch: Batch, calls: Sequence[_Call], output: Sequence[Tensor]) -> set[str]:
    """Names of the layers that get no gradient because the model's output does not depend on them: a pooler that nobody reads."""
    layers = {one.layer.item.layer.name: one.layer for one in calls}
    layers = {name: layer for name, layer in layers.items() if not any(one.gradients for one in calls if one.layer is layer)}
    for name, layer in layers.items():
        handle = layer.item.original.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        try:
            changed = read_outputs(call(model, batch), batch)
        finally:
            handle.remove()
        if not all(torch.equal(a, b) for a, b in zip(output, changed, strict=True)):
            raise LayerError(name, NO_GRADIENT)
    return set(layers)


def _backward(scalar: Tensor, *, again: bool) -> None:
    try:
        scalar.backward(retain_graph=again)
    except RuntimeError as error:
        raise ModelError(f"the model cannot be differentiated: {error}; use the sensitivity method Measured()") from error


@dataclass(eq=False)
class _Call:
    """One call of a layer: its input, and the gradients of all draws at its output."""

    layer: LayerOptions
    x: Tensor
    gradients: list[Tensor] = field(default_factory=list)

    def changes(self, samples: int) -> Tensor:
        """`g . dy` for every draw, option and sample, float64 (draws, options, samples).

        Where the layer's first dimension counts something else than samples, all of it is put to the first sample: draws for different
        samples are independent and have mean zero, so that the square of the sum is still right on average.
        """
        if not self.gradients:
            raise LayerError(self.layer.item.layer.name, NO_GRADIENT)
        gradients = torch.stack(self.gradients).flatten(2)  # (draws, N, numbers)
        plain = self.layer.float_output(self.x)
        found = []
        for option in self.layer.states:
            change = (self.layer.output(self.x, option) - plain).flatten(1)
            found.append((gradients * change).sum(dim=2, dtype=torch.float64))
        dots = torch.stack(found, dim=1).cpu()  # (draws, options, N)
        if dots.shape[2] == samples:
            return dots
        return torch.cat([dots.sum(dim=2, keepdim=True), dots.new_zeros(*dots.shape[:2], samples - 1)], dim=2)


@contextlib.contextmanager
def _recording(model: nn.Module, layers: Sequence[LayerOptions], calls: list[_Call]) -> Iterator[None]:
    """Layers note what they are called with; their outputs join the graph, even where nothing before them wants a gradient."""

    def recorder(layer: LayerOptions):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            (x,) = (*args, *kwargs.values())
            if not output.requires_grad:
                output = output + torch.zeros((), device=output.device, requires_grad=True)  # no leaf, so that it may be changed in place
            one = _Call(layer, x.detach().clone())  # a copy: the model may change its tensors in place
            output.register_hook(one.gradients.append)  # of what the layer returned, also where it is changed in place afterwards
            calls.append(one)
            return output

        return record

    handles = [layer.item.original.register_forward_hook(recorder(layer), with_kwargs=True) for layer in layers]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()

"""Fisher: the whole table from one backward pass for each draw, whatever the number of layers and options.

Write `dy` for the change of a layer's output when the layer is quantized, `g` for the gradient of a random scalar of the model's output at
the layer's output. To second order in `dy`

    KL(float || quantized)        =  E[(g . dy)^2] / 2      g of log p(label), the label drawn from the model itself
    || z_float - z_quantized ||^2  =  E[(g . dy)^2]          g of r . z, the signs r drawn at random

The loss provides the scalar, `OutputLoss.probe`. With `y = W x + b` and a quantized weight `W + dW`, input `x + dx` and bias `b + db`

    g . dy  =  <G, dW> + h . dx + g . db          G = g x^T, the sample's gradient for the weight;  h = W^T g, that at the layer's input

but for `dW dx`, which is of second order in what quantization changes. `G` does not depend on the option and comes at the cost of one
layer forward for each draw, `h` comes with the backward pass; what is left for each option is the rounding of the input and three products
of what is there. With D draws the table costs a forward, D backward passes towards inputs and D towards weights, each about a forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from subbyte.allocate.sensitivity import BatchShare, LayerOptions, SensitivityMethod
from subbyte.calibrate.loss import OutputLoss
from subbyte.errors import LayerError, ModelError, OptionError
from subbyte.model.batches import Batch, call, sample_count
from subbyte.model.padding import read_outputs
from subbyte.quantizers.affine import fake_quantize
from subbyte.quantizers.pieces import pieces

GRADIENT_POSITIONS = 50  # writing and reading a sample's gradient for the weight takes as long as a forward of so many positions
LEAST_PROBES = 256  # more hardly change what the integer programme chooses (studies/draws.py)
MOST_GRADIENTS = 2**24  # numbers of the samples' gradients for a weight that are held at once
NO_GRADIENT = "gets no gradient from the model's output; use the sensitivity method Measured(), or exclude the layer"


@dataclass(frozen=True)
class Fisher(SensitivityMethod):
    """Second-order sensitivities by random probes of the output.

    Args:
        draws: probes of every sample, at least; more make the table less random. A calibration set of less than 256 samples gets so
            many that there are 256 in all.

    Raises:
        OptionError: if there is no draw.

    Source:
        The Fisher information as curvature of the KL divergence (Amari); empirical use for quantization: FIT (Zandonati et al. 2022,
        arXiv 2210.08502), BRECQ (Li et al. 2021, arXiv 2102.05426). Here per sample, and on reconstructed layers.

    Example:
        >>> Fisher().suited_to(samples=100)
        Fisher(draws=3)
    """

    draws: int = 1

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise OptionError(f"Fisher needs at least one draw, not {self.draws}")

    def suited_to(self, samples: int) -> Fisher:
        """See `SensitivityMethod`.

        Args:
            samples: in the calibration set.
        """
        return replace(self, draws=max(self.draws, -(-LEAST_PROBES // samples)))

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
        changes, below = self.changes(model, layers, batch, loss, generator)
        return BatchShare({name: change.square().sum(dim=2).mean(dim=0) for name, change in changes.items()}, below)

    def changes(
        self, model: nn.Module, layers: Sequence[LayerOptions], batch: Batch, loss: OutputLoss, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], float]:
        """`g . dy` of every layer, draw, option and sample; to second order, layers do together the square of their sum.

        Args:
            model: see `share`.
            layers: see there.
            batch: see there.
            loss: see there.
            generator: see there.

        Returns:
            By layer name, float64 (draws, options, samples); and the denominator of the mean loss.

        Raises:
            LayerError: see `share`.
            ModelError: see there.
            OptionError: see there.
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
                if one.layer.item.layer.name not in unread:
                    changes[one.layer.item.layer.name] += one.changes(samples)
            below = sum(float(loss.total(tensor, tensor)[1]) for tensor in output)
        return changes, below


def _unread(model: nn.Module, batch: Batch, calls: Sequence[_Call], output: Sequence[Tensor]) -> set[str]:
    """Names of the layers that get no gradient because the model's output does not depend on them: a pooler that nobody reads."""
    layers = {one.layer.item.layer.name: one.layer for one in calls}
    layers = {name: layer for name, layer in layers.items() if not any(one.by_weight for one in calls if one.layer is layer)}
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
    """One call of a layer: its input, and what has come back to it, for each draw.

    `by_weight` holds `<G, dW> + g . db`, float64 (options, N); `at_input` holds `h`, float32, the shape of `x`.
    """

    layer: LayerOptions
    x: Tensor
    by_weight: list[Tensor] = field(default_factory=list)
    at_input: list[Tensor] = field(default_factory=list)

    def at_output(self, g: Tensor) -> None:
        """Takes the gradient at the layer's output, float32, the shape of the output."""
        item, states = self.layer.item, self.layer.states.values()
        operator, x = item.layer.operator, self.x
        weight, bias = self.layer.float_weight(), self.layer.float_bias()
        positions = operator.count(x)[1]
        if operator.multiplies and len(states) * positions > positions + GRADIENT_POSITIONS:
            changes = torch.stack([state.weight(operator) - weight for state in states]).flatten(1)
            most = max(1, MOST_GRADIENTS // weight.numel())
            parts = (operator.weight_gradients(xs, gs, weight) for xs, gs in zip(x.split(most), g.split(most), strict=True))
            found = torch.cat([changes @ part.flatten(1).mT for part in parts], dim=1)
        else:
            moves = (operator(x, state.weight(operator) - weight, None) for state in states)
            found = torch.stack([move.mul_(g).flatten(1).sum(dim=1) for move in moves])
        if operator.multiplies:
            channels = g.movedim(operator.channel_dimension, -1)
            sums = channels.reshape(len(g), -1, channels.shape[-1]).sum(dim=1)  # (N, C_out)
            moved = torch.stack([torch.zeros_like(sums[0]) if state.bias is None else state.bias for state in states])
            found += (moved if bias is None else moved - bias) @ sums.mT
        self.by_weight.append(found.double().cpu())

    def changes(self, samples: int) -> Tensor:
        """`g . dy` for every draw, option and sample, float64 (draws, options, samples).

        Where the layer's first dimension counts something else than samples, all of it is put to the first sample: draws for different
        samples are independent and have mean zero, so that the square of the sum is still right on average.
        """
        if not self.by_weight:
            raise LayerError(self.layer.item.layer.name, NO_GRADIENT)
        dots = torch.stack(self.by_weight)  # (draws, options, N)
        if self.at_input:
            dots += self._by_input()
        if dots.shape[2] == samples:
            return dots
        return torch.cat([dots.sum(dim=2, keepdim=True), dots.new_zeros(*dots.shape[:2], samples - 1)], dim=2)

    def _by_input(self) -> Tensor:
        """`h . dx`, float64 (draws, options, N)."""
        keyed = [
            (state.activation and (float(state.activation[0]), int(state.activation[1]), state.activation[2]), state.activation)
            for state in self.layer.states.values()
        ]
        grids = {key: activation for key, activation in keyed if activation is not None}
        found: dict[object, list[Tensor]] = {key: [] for key in grids}
        for x, *some in zip(pieces(self.x), *map(pieces, self.at_input), strict=True):
            for key, activation in grids.items():
                dx = fake_quantize(x, *activation).sub_(x)
                found[key].append(torch.stack([(h * dx).flatten(1).sum(dim=1) for h in some]))
        known = {key: torch.cat(parts, dim=1) for key, parts in found.items()}
        nothing = self.x.new_zeros(len(self.at_input), len(self.x))
        return torch.stack([known.get(key, nothing) for key, _ in keyed], dim=1).double().cpu()


@contextlib.contextmanager
def _recording(model: nn.Module, layers: Sequence[LayerOptions], calls: list[_Call]) -> Iterator[None]:
    """Layers run on a copy of their input, which the model cannot change in place, and note it and the gradients that come back."""

    def copied(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]):  # type: ignore[no-untyped-def]
        return tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}

    def recorder(layer: LayerOptions):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            (x,) = (*args, *kwargs.values())
            if not output.requires_grad:  # a table's input has no gradient
                output = output + torch.zeros((), device=output.device, requires_grad=True)  # no leaf, so that it may be changed in place
            if output._is_view():  # as of a linear layer of more than two dimensions: its gradient is lost when it is changed in place
                output = output.clone()
            one = _Call(layer, x.detach())
            output.register_hook(one.at_output)  # of what the layer returned, also where it is changed in place afterwards
            if x.requires_grad:
                x.register_hook(one.at_input.append)
            calls.append(one)
            return output

        return record

    handles = [layer.item.original.register_forward_pre_hook(copied, with_kwargs=True) for layer in layers]
    handles += [layer.item.original.register_forward_hook(recorder(layer), with_kwargs=True) for layer in layers]
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


def _copy(x: Tensor) -> Tensor:
    """A copy of a layer's input that gets a gradient, of which autograd keeps nothing."""
    return x.clone().requires_grad_() if x.is_floating_point() else x.clone()

"""Ranges and second moments of channels, and the noise of rounding that they predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from subbyte.model.batches import Batch, call
from subbyte.model.channel_flow import Flow, removed
from subbyte.model.layers import Layer
from subbyte.model.operator import beside_channels
from subbyte.model.operators import Linear
from subbyte.model.padding import real_positions, without_padding
from subbyte.quantizers.granularity import column_groups
from subbyte.quantizers.grid import Grid
from subbyte.quantizers.pieces import pieces

POWER = 8  # of the mean that stands for a channel's range: near the largest value, and no single one decides


class ChannelRanges:
    """Per channel over all batches: mean powers and the largest of readers' inputs, and the largest of sources' outputs.

    Args:
        model: float model in evaluation mode.
        reading: names of layers whose inputs are looked at.
        giving: names of layers whose outputs are looked at.
        layers: by name, all of these.

    Attributes:
        outputs: by the name of a source that is a layer, its largest outputs, float32 (C,).
    """

    def __init__(self, model: nn.Module, reading: Sequence[str], giving: Sequence[str], layers: Mapping[str, Layer]) -> None:
        self.model, self.reading, self.giving, self.layers = model, reading, giving, layers
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.outputs: dict[str, Tensor] = {}

    def add(self, batch: Batch) -> None:
        """One batch; padding is left out.

        Args:
            batch: see `batches.as_batches`.
        """
        real = real_positions(batch)

        def enter(name: str):  # type: ignore[no-untyped-def]
            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                (x,) = (*args, *kwargs.values())
                self._add_inputs(name, self._read(x, name, real))

            return hook

        def leave(name: str):  # type: ignore[no-untyped-def]
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                output = self._read(output, name, real)
                self.outputs[name] = _larger(self.outputs.get(name), output.amax(self._others(name, output)))

            return hook

        modules = self.model.get_submodule
        handles = [modules(name).register_forward_pre_hook(enter(name), with_kwargs=True) for name in self.reading]
        handles += [modules(name).register_forward_hook(leave(name)) for name in self.giving]
        try:
            call(self.model, batch)
        finally:
            removed(handles)

    def _read(self, x: Tensor, name: str, real: Tensor | None) -> Tensor:
        x = without_padding(x, real) if isinstance(self.layers[name].operator, Linear) else x
        return x if x.dim() > 1 else x[None]

    def _others(self, name: str, x: Tensor) -> list[int]:
        return beside_channels(x, self.layers[name].operator.channel_dimension)

    def _add_inputs(self, name: str, x: Tensor) -> None:
        """What a layer is fed by one batch: float32, at least two dimensions."""
        others = self._others(name, x)
        high = torch.stack(torch.aminmax(x)).abs().amax().clamp(min=1e-30)
        for piece in pieces(x):
            part = (piece / high).square_()
            sums = part.sum(others).double() * high.double() ** 2
            powers = part.square_().square_().sum(others).double() * high.double() ** POWER
            self.squares[name] = self.squares.get(name, 0.0) + sums
            self.sums[name] = self.sums.get(name, 0.0) + powers
            self.largest[name] = _larger(self.largest.get(name), piece.amax(others))
            self.counts[name] = self.counts.get(name, 0) + piece.numel() // len(sums)

    def power(self, name: str) -> Tensor:
        """Root of the mean power of a reader's inputs, float64 (C_in,).

        Args:
            name: of the reader.
        """
        return (self.sums[name] / self.counts[name]).pow(1 / POWER)

    def noises(self, name: str, factors: Tensor, grid: Grid) -> tuple[float, float]:
        """Squares that rounding a reader's weights and its inputs with a single step over the range adds to its outputs.

        Args:
            name: of the reader.
            factors: of its inputs, undone by its weights, float64 (C_in,).
            grid: of its weights; with column groups, where it is linear.
        """
        module, operator = self.model.get_submodule(name), self.layers[name].operator
        assert isinstance(module.weight, Tensor)
        weight = module.weight.double()
        scaled = operator.to_matrix(weight / operator.per_input(factors, weight))  # (G, O, n)
        energy = factors.square() * self.squares[name] / self.counts[name]
        energies = operator.to_matrix(operator.per_input(energy, weight).expand_as(weight))
        groups = column_groups(scaled.shape[2], grid.group if isinstance(operator, Linear) else None)
        weights = sum(float((_spans(scaled[..., columns], grid).square() * energies[..., columns].sum(2)).sum()) for columns in groups)
        return weights, float((self.power(name) * factors).amax().square() * scaled.square().sum())

    def reading_the_same(self, names: Sequence[str]) -> list[list[str]]:
        """Readers grouped by what they read: that of one group has the same moments to the last bit.

        Args:
            names: of readers.
        """
        groups: list[list[str]] = []
        for name in names:
            for group in groups:
                if all(torch.equal(moments[name], moments[group[0]]) for moments in (self.sums, self.squares)):
                    group.append(name)
                    break
            else:
                groups.append([name])
        return groups

    def inputs(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """Of a source's channels where they are read: root of the mean power, float64 (C,), and the largest value, float32 (C,).

        Args:
            flow: the source.
        """
        device = next(iter(flow.readers.values())).device
        power = torch.zeros(flow.channels, dtype=torch.float64, device=device)
        largest = torch.full((flow.channels,), -math.inf, device=device)
        for name, channel in flow.readers.items():
            read = channel >= 0
            power.scatter_reduce_(0, channel[read], self.power(name)[read], "amax")
            largest.scatter_reduce_(0, channel[read], self.largest[name][read], "amax")
        return power, largest


def _spans(weight: Tensor, grid: Grid) -> Tensor:
    """What the codes of each output channel have to span: (G, O, n) -> (G, O)."""
    if grid.symmetric:
        return 2 * weight.abs().amax(2)
    return weight.amax(2).clamp(min=0) - weight.amin(2).clamp(max=0)


def _larger(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else torch.maximum(one, other)

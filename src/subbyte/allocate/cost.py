"""What an allocation costs: bytes as the packed file has them, bits, bit operations, and seconds where a table of them is given.

bytes of the file = constant + sum over layers (codes + steps + zero-points + biases)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from subbyte.calibrate.models import CalibratedLayer, Models, at_option, state_of
from subbyte.calibrate.problem import LayerSolution
from subbyte.errors import OptionError
from subbyte.export.bits import packed_size
from subbyte.export.packed import pack_model, to_bytes
from subbyte.model.fold import Fold
from subbyte.model.layers import Layer
from subbyte.model.state import state_bytes
from subbyte.quantizers.granularity import group_count
from subbyte.quantizers.grid import WeightGrids
from subbyte.widths import Option

FLOAT_BITS = 32
Seconds = Mapping[str, Mapping[Option, float]]
"""By layer name and option."""


@dataclass(frozen=True)
class LayerSize:
    """What a layer's costs follow from.

    Args:
        weights: number of weights, biases not counted.
        outputs: number of output channels.
        macs: multiply-accumulate operations for one sample.
        symmetric: whether weights have no zero-points at any width; those of 7 and 8 bits never have.
        table: whether rows are looked up in it: its input has no width, and it has no bias.
        steps: weight steps of each output channel, one for each column group.
        shared: whether its codes and steps are those of another layer, where they are counted.
    """

    weights: int
    outputs: int
    macs: int
    symmetric: bool
    table: bool = False
    steps: int = 1
    shared: bool = False

    @classmethod
    def of(cls, layer: Layer, weights: WeightGrids) -> LayerSize:
        """The sizes of a layer.

        Args:
            layer: of the model.
            weights: what grids of its weights have beside their bits.
        """
        steps = group_count(layer.unknowns, weights.group)
        table, shared = not layer.operator.multiplies, layer.shares is not None
        return cls(layer.weight_count, layer.outputs, layer.macs, weights.symmetric, table, steps, shared)

    def bytes(self, option: Option) -> int:
        """Codes, steps, zero-points and biases in the packed file, header not counted.

        Args:
            option: `(weight bits, activation bits or None)`.

        Example:
            >>> LayerSize(weights=10, outputs=2, macs=10, symmetric=True).bytes((3, 8))
            25
        """
        weight_bits, activation_bits = option
        steps = self.outputs * self.steps
        zero_points = 0 if WeightGrids(self.symmetric).at(weight_bits).symmetric else packed_size(steps, weight_bits)
        own = 0 if self.shared else packed_size(self.weights, weight_bits) + 4 * steps + zero_points
        return own + (0 if self.table else 4 * self.outputs) + (0 if activation_bits is None or self.table else 5)

    @property
    def stored(self) -> int:
        """Weights that are stored for this layer: none where they are another layer's."""
        return 0 if self.shared else self.weights

    def bit_operations(self, option: Option) -> int:
        """Multiply-accumulates of one sample times the bits of both factors; an input in float32 counts 32.

        Args:
            option: `(weight bits, activation bits or None)`.
        """
        return self.macs * option[0] * (FLOAT_BITS if option[1] is None else option[1])


@dataclass(frozen=True)
class Costs:
    """Costs of every layer at every option, and what does not depend on options.

    Args:
        layers: sizes by layer name, in running order.
        constant_bytes: of the packed file: its header, and the state of everything that stays in float32.
        float_bytes: the float model's parameters and buffers.
        seconds: time of a layer's forward at an option, where it is known; empty otherwise.

    Example:
        >>> costs = Costs({"fc": LayerSize(8, 1, 8, True)}, constant_bytes=100, float_bytes=36)
        >>> costs.size_bytes({"fc": (4, None)}), costs.average_bits({"fc": (4, None)})
        (112, 4.0)
    """

    layers: Mapping[str, LayerSize]
    constant_bytes: int
    float_bytes: int
    seconds: Seconds | None = None

    def size_bytes(self, allocation: Mapping[str, Option]) -> int:
        """Bytes of the packed file.

        Args:
            allocation: `(weight bits, activation bits or None)` by layer name.
        """
        return self.constant_bytes + sum(self.layers[name].bytes(option) for name, option in allocation.items())

    def average_bits(self, allocation: Mapping[str, Option]) -> float:
        """Mean width of all weights of all layers that are quantized.

        Args:
            allocation: `(weight bits, activation bits or None)` by layer name.
        """
        return sum(self.layers[name].stored * option[0] for name, option in allocation.items()) / self.weights

    def bit_operations(self, allocation: Mapping[str, Option]) -> int:
        """Bit operations of one sample.

        Args:
            allocation: `(weight bits, activation bits or None)` by layer name.
        """
        return sum(self.layers[name].bit_operations(option) for name, option in allocation.items())

    def latency(self, name: str, option: Option) -> float:
        """Seconds of a layer at an option.

        Args:
            name: of the layer.
            option: `(weight bits, activation bits or None)`.

        Raises:
            OptionError: if the table has no such entry.
        """
        found = (self.seconds or {}).get(name, {}).get(option)
        if found is None:
            raise OptionError(f"the table of latencies has no entry for layer '{name}' at {option}; add it, or leave that option out")
        return found

    def total_latency(self, allocation: Mapping[str, Option]) -> float | None:
        """Seconds of all layers together; None where the table does not have them all.

        Args:
            allocation: `(weight bits, activation bits or None)` by layer name.
        """
        found = [(self.seconds or {}).get(name, {}).get(option) for name, option in allocation.items()]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if len(known) == len(found) else None

    @property
    def weights(self) -> int:
        """Weights of all layers that are quantized."""
        return sum(size.stored for size in self.layers.values())


def costs_of(models: Models, option: Mapping[str, Option], folds: Sequence[Fold], model: nn.Module, seconds: Seconds | None) -> Costs:
    """Costs of a model's layers. The constant is what is left of a file that is packed for the purpose.

    Args:
        models: `models.quantized` gets codes of zero.
        option: any option of each layer, by name; all of a layer's options quantize its input, or none does.
        folds: batch norms that were folded.
        model: the float model as it came.
        seconds: time of a layer's forward at an option, or None.
    """
    sizes = {item.layer.name: LayerSize.of(item.layer, item.weights) for item in models.layers}
    for item in models.layers:
        here = at_option(item, option[item.layer.name])
        item.quantized.assign_(state_of(here, _zeros(here)))
    content = to_bytes(pack_model(models.quantized, "0" * 32, folds))
    constant = len(content) - sum(sizes[name].bytes(option[name]) for name in sizes)
    return Costs(sizes, constant, state_bytes(model), seconds)


def _zeros(item: CalibratedLayer) -> LayerSolution:
    """A solution of codes that stand for zero."""
    codes = torch.zeros_like(item.float_weight(), dtype=torch.int16)
    bias, group = item.float_bias(), item.weights.group
    scale = bias.new_ones(bias.shape if group is None else (*bias.shape, group_count(codes.shape[2], group)))
    zero = torch.zeros_like(scale, dtype=torch.int32)
    activation = None if item.activation_grid is None else (bias.new_ones(()), zero.new_zeros(()))
    return LayerSolution(codes, scale, zero, bias, activation, "none", group)

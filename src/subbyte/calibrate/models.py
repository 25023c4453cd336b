"""The float model and its quantized copy, layer beside layer, and how solutions get into the copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from subbyte.calibrate.problem import LayerSolution
from subbyte.model.clipping import Clip
from subbyte.model.fold import NormOutput
from subbyte.model.layers import Layer
from subbyte.model.operators import Convolution
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.model.replace import copy_of, replace_module_
from subbyte.quantizers.grid import Grid, WeightGrids


@dataclass(frozen=True, eq=False)
class CalibratedLayer:
    """A layer, the modules that stand for it, and its grids.

    Args:
        layer: what it is.
        original: the float module, batch norm folded.
        quantized: the module that takes the codes, in the quantized model.
        weights: what grids of its weights have beside their bits.
        weight_bits: of its weights.
        activation_grid: grid of its input, or None.
        clip: what is read of its output.
        norm: the batch norm that was folded into it, or None.
    """

    layer: Layer
    original: nn.Module
    quantized: QuantizedLayer
    weights: WeightGrids
    weight_bits: int
    activation_grid: Grid | None
    clip: Clip
    norm: NormOutput | None = None

    @property
    def weight_grid(self) -> Grid:
        """Grid of its weights."""
        return self.weights.at(self.weight_bits)

    def float_weight(self) -> Tensor:
        """`W` of the float module, float32 (G, O, n)."""
        weight = self.original.weight
        assert isinstance(weight, Tensor)
        return self.layer.operator.to_matrix(weight.detach())

    def float_bias(self) -> Tensor:
        """`b` of the float module, float32 (G, O); zeros where it has none."""
        weight, bias = self.float_weight(), getattr(self.original, "bias", None)
        return bias.detach().view(weight.shape[:2]) if isinstance(bias, Tensor) else weight.new_zeros(weight.shape[:2])


@dataclass(frozen=True, eq=False)
class Models:
    """The float model, and its copy in which every layer is a `QuantizedLayer`.

    Args:
        original: with batch norms folded.
        quantized: the copy, whose layers get their codes.
        layers: in running order.
    """

    original: nn.Module
    quantized: nn.Module
    layers: tuple[CalibratedLayer, ...]

    @property
    def multiplying(self) -> tuple[CalibratedLayer, ...]:
        """The layers that multiply their input: all but the tables that rows are looked up in."""
        return tuple(item for item in self.layers if item.layer.operator.multiplies)

    @property
    def free(self) -> tuple[CalibratedLayer, ...]:
        """The layers whose codes and steps may change after calibration: they multiply, and share them with no other layer."""
        owners = {item.layer.shares for item in self.layers}
        return tuple(item for item in self.multiplying if item.layer.shares is None and item.layer.name not in owners)


def prepare(
    original: nn.Module,
    layers: Sequence[Layer],
    options: Mapping[str, tuple[int, int | None]],
    clips: Mapping[str, Clip],
    norms: Mapping[str, NormOutput],
    weights: WeightGrids,
) -> Models:
    """A float model beside a copy of it in which every layer is a `QuantizedLayer`, still without codes.

    Args:
        original: float model, batch norms folded; is not changed.
        layers: what will be quantized, in running order.
        options: `(weight bits, activation bits or None)` by layer name.
        clips: what is read of the layers' outputs, by layer name; of layers that are not named, everything.
        norms: batch norms that were folded, by layer name.
        weights: what weight grids have beside their bits; convolutions have no column groups, and layers with no more inputs than that need
            none.
    """
    quantized = copy_of(original)
    items = []
    for layer in layers:
        old = quantized.get_submodule(layer.name)
        new = QuantizedLayer(old, layer.operator)
        new.shares = layer.shares
        for same in {id(one): one for one in (old, *map(quantized.get_submodule, layer.other_names))}.values():
            replace_module_(quantized, same, new)
        weight_bits, activation_bits = options[layer.name]
        activation_grid = None if activation_bits is None or not layer.operator.multiplies else Grid(activation_bits)
        own, clip, norm = replace(weights, group=group_of(layer, weights.group)), clips.get(layer.name, Clip()), norms.get(layer.name)
        items.append(CalibratedLayer(layer, original.get_submodule(layer.name), new, own, weight_bits, activation_grid, clip, norm))
    return Models(original, quantized, tuple(items))


def group_of(layer: Layer, group: int | None) -> int | None:
    """The column groups that a layer has of those asked for.

    Args:
        layer: of the model.
        group: weights that share a step; None: all of an output channel.
    """
    if group is None or isinstance(layer.operator, Convolution):
        return None
    return group if group < layer.unknowns else None


def at_option(item: CalibratedLayer, option: tuple[int, int | None]) -> CalibratedLayer:
    """The same layer at another option.

    Args:
        item: the layer.
        option: `(weight bits, activation bits or None)`.
    """
    weight_bits, activation_bits = option
    activation_grid = None if activation_bits is None or not item.layer.operator.multiplies else Grid(activation_bits)
    return replace(item, weight_bits=weight_bits, activation_grid=activation_grid)


def assign_(models: Models, solutions: Mapping[str, LayerSolution]) -> None:
    """Give layers of the quantized model their codes.

    Args:
        models: `models.quantized` is changed in place.
        solutions: by layer name; layers that are not named keep what they have.
    """
    for item in models.layers:
        if item.layer.name in solutions:
            item.quantized.assign_(state_of(item, solutions[item.layer.name]))


def state_of(item: CalibratedLayer, solution: LayerSolution) -> QuantizedState:
    """A solution in the shapes of the layer.

    Args:
        item: the layer.
        solution: of its problem; tensors as its docstring says.
    """
    activation = None
    if item.activation_grid is not None and solution.activation is not None:
        activation = (*solution.activation, item.activation_grid)
    return QuantizedState(
        codes=item.layer.operator.from_matrix(solution.codes),
        scale=solution.scale.flatten(0, 1),
        zero_point=solution.zero_point.flatten(0, 1),
        bias=solution.bias.flatten() if item.layer.operator.multiplies else None,
        weight_grid=item.weight_grid,
        activation=activation,
    )


def solution_of(item: CalibratedLayer) -> LayerSolution:
    """What a quantized layer computes with, in the shapes of its problem: the inverse of `state_of`.

    Args:
        item: the layer; it has codes.
    """
    state = item.quantized.state()
    codes = item.layer.operator.to_matrix(state.codes)
    scale, zero_point = (values.unflatten(0, codes.shape[:2]) for values in (state.scale, state.zero_point))
    bias = scale.new_zeros(codes.shape[:2]) if state.bias is None else state.bias.view(codes.shape[:2])
    activation = None if state.activation is None else (state.activation[0], state.activation[1])
    return LayerSolution(codes, scale, zero_point, bias, activation, "given", state.weight_grid.group)

"""The one stateful module: float until it has codes, then exactly its equation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from subbyte.errors import ModelError
from subbyte.model.operators import operator_of
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.quantizers.affine import dequantize, quantize
from subbyte.quantizers.grid import Grid

MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 4), (3, 5)),
    (nn.Linear(5, 4, bias=False), (3, 2, 5)),
    (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (3, 4, 6)),
    (nn.Conv2d(4, 4, 3, groups=2, stride=2), (3, 4, 6, 6)),
    (nn.Conv3d(2, 4, 2), (3, 2, 3, 3, 3)),
    (nn.ConvTranspose2d(4, 4, 3, groups=2, stride=2), (3, 4, 3, 3)),
]
GRIDS = [(Grid(4, symmetric=True), Grid(8)), (Grid(3), Grid(2)), (Grid(8, symmetric=True), None)]


def random_state(module: nn.Module, weight_grid: Grid, activation_grid: Grid | None) -> QuantizedState:
    activation = (
        None
        if activation_grid is None
        else (torch.tensor(0.125), torch.tensor(activation_grid.highest // 2, dtype=torch.int32), activation_grid)
    )
    zero_point = (
        torch.zeros(4, dtype=torch.int32) if weight_grid.symmetric else torch.randint(0, weight_grid.highest + 1, (4,), dtype=torch.int32)
    )
    codes = torch.randint(weight_grid.lowest, weight_grid.highest + 1, module.weight.shape, dtype=torch.int16)
    return QuantizedState(codes, torch.rand(4) + 0.1, zero_point, torch.randn(4), weight_grid, activation)


def layer_of(module: nn.Module) -> QuantizedLayer:
    operator = operator_of(module)
    assert operator is not None
    return QuantizedLayer(module, operator)


def equation(module: nn.Module, state: QuantizedState, x: Tensor) -> Tensor:
    """`operator(q(x), s_w (Q - z_w), b)`, by a float module that holds the numbers on the grid."""
    operator = operator_of(module)
    assert operator is not None
    scale, zero_point = operator.per_channel(state.scale, module.weight), operator.per_channel(state.zero_point, module.weight)
    twin = copy.deepcopy(module)
    twin.weight = nn.Parameter(dequantize(state.codes, scale, zero_point))
    twin.bias = nn.Parameter(state.bias)
    if state.activation is not None:
        step, zero, grid = state.activation
        x = dequantize(quantize(x, step, zero, grid), step, zero)
    return twin(x)


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=[str(module) for module, _ in MODULES])
def test_without_codes_it_is_the_float_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(module), torch.randn(shape)
    assert not layer.is_quantized
    torch.testing.assert_close(layer(x), module(x))
    with pytest.raises(ModelError, match="no codes yet"):
        layer.state()


@pytest.mark.parametrize(("weight_grid", "activation_grid"), GRIDS)
@pytest.mark.parametrize(("module", "shape"), MODULES, ids=[str(module) for module, _ in MODULES])
def test_with_codes_it_is_its_equation(module: nn.Module, shape: tuple[int, ...], weight_grid: Grid, activation_grid: Grid | None) -> None:
    layer, x, state = layer_of(module), torch.randn(shape), random_state(module, weight_grid, activation_grid)
    layer.assign_(state)
    torch.testing.assert_close(layer(x), equation(module, state, x))
    kept = layer.state()
    assert all(kept.__dict__[name] is value for name, value in state.__dict__.items() if name != "activation")
    assert kept.activation == state.activation


def test_codes_can_be_exchanged() -> None:
    module = nn.Linear(5, 4)
    layer, x = layer_of(module), torch.randn(3, 5)
    for weight_grid, activation_grid in [*GRIDS, *reversed(GRIDS)]:
        state = random_state(module, weight_grid, activation_grid)
        layer.assign_(state)
        torch.testing.assert_close(layer(x), equation(module, state, x))
        assert f"W{weight_grid.bits}A{32 if activation_grid is None else activation_grid.bits}" in repr(layer)


def test_the_float_module_is_not_changed() -> None:
    module = nn.Linear(5, 4)
    before = copy.deepcopy(module.state_dict())
    layer = layer_of(module)
    layer.assign_(random_state(module, *GRIDS[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_settings_of_the_float_layer_can_still_be_read() -> None:
    layer = layer_of(nn.Conv2d(4, 6, 3, stride=2, groups=2))
    assert (layer.stride, layer.kernel_size, layer.out_channels, layer.groups) == ((2, 2), (3, 3), 6, 2)
    assert layer_of(nn.Linear(5, 4)).in_features == 5


def test_a_quantized_layer_can_be_copied() -> None:
    module = nn.Linear(5, 4)
    layer, x = layer_of(module), torch.randn(3, 5)
    layer.assign_(random_state(module, *GRIDS[0]))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))

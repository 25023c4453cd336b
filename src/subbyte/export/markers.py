"""Operators that mark, in a traced graph, what quantization adds to a model: they are computed in PyTorch and translated for a file.

    quantize(x; s, z, low, high) = s (clip(round(x / s) + z, low, high) - z)      a quantiser, with its grid as plain numbers
    weight(w; key), bias(b; key) = w, b                                           a layer's weight and bias, by a key

`torch.export` keeps them as they are, so that every quantiser and every weight of the graph is known, whatever the model's Python does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from subbyte.model.input_factors import factors_from
from subbyte.model.operators import Convolution, Linear, Operator
from subbyte.model.quantized_layer import QuantizedLayer, QuantizedState
from subbyte.model.replace import copy_of, replace_module_
from subbyte.quantizers.affine import fake_quantize
from subbyte.quantizers.grid import Grid


@dataclass(frozen=True)
class TensorGrid:
    """The grid of one tensor as plain numbers: codes `low .. high` stand for `s (q - z)`.

    Args:
        scale: `s`, a float32 number.
        zero_point: `z`.
        low: smallest code.
        high: largest code.

    Example:
        >>> TensorGrid(0.5, 1, 0, 255).clipped(0.0, 6.0)
        TensorGrid(scale=0.5, zero_point=1, low=1, high=13)
    """

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor, grid: Grid) -> TensorGrid:
        """The grid of a layer's input.

        Args:
            scale: float32 ().
            zero_point: int32 ().
            grid: the codes that exist.
        """
        return cls(float(scale), int(zero_point), grid.lowest, grid.highest)

    @property
    def is_8_bit(self) -> bool:
        """Whether it needs no clip but that of an 8-bit number."""
        return (self.low, self.high) == (0, 255)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of real numbers.

        Args:
            x: float32, any shape.
        """
        return (x / torch.tensor(self.scale)).round().add(self.zero_point).clamp(self.low, self.high)

    def clipped(self, low: float, high: float) -> TensorGrid:
        """The grid that gives for `x` what this one gives for `x` clipped to `[low, high]`: rounding is monotone, so codes are clipped.

        Args:
            low: lower end, perhaps minus infinity.
            high: upper end, perhaps infinity.
        """
        ends = self.codes(torch.tensor([low, high]))
        return replace(self, low=int(ends[0]), high=int(ends[1]))


@torch.library.custom_op("subbyte::quantize", mutates_args=())
def quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """The numbers of a grid that are nearest to `x`.

    A simulation computes in float64. A number of float32 is divided in float32 there too, as runtimes divide a graph's input: just beside
    the middle between two codes, the quotient may be rounded onto it.

    Args:
        x: float32 or float64, any shape.
        scale: `s`.
        zero_point: `z`.
        low: smallest code.
        high: largest code.
    """
    if x.dtype == torch.float64:
        narrow, step = x.float(), torch.tensor(scale)
        steps = torch.where(narrow.double() == x, (narrow / step).double(), x / step)
        return step * ((steps.round() + zero_point).clamp(low, high) - zero_point)
    return fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point), _Codes(low, high))  # type: ignore[arg-type]


@torch.library.custom_op("subbyte::weight", mutates_args=())
def weight(w: Tensor, key: str) -> Tensor:
    """A layer's weight.

    Args:
        w: float32, the layer's weight shape.
        key: the layer.
    """
    return w.clone()


@torch.library.custom_op("subbyte::bias", mutates_args=())
def bias(b: Tensor, key: str) -> Tensor:
    """A layer's bias.

    Args:
        b: float32 (C_out,).
        key: the layer.
    """
    return b.clone()


quantize.register_fake(lambda x, *_: torch.empty_like(x))
weight.register_fake(lambda w, _: torch.empty_like(w))
bias.register_fake(lambda b, _: torch.empty_like(b))


@dataclass(frozen=True)
class _Codes:
    lowest: int
    highest: int


class MarkedLayer(nn.Module):
    """A quantized layer whose parts are marked.

    Args:
        layer: with codes.
        key: by which its weight is found again, its qualified name.
    """

    weight: Tensor
    bias: Tensor
    factors: Tensor | None

    def __init__(self, layer: QuantizedLayer, key: str) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # what the model's own code may read
            if not name.startswith("_") and name not in ("training", "operator"):
                setattr(self, name, value)
        state, self.operator = outputs_first(layer)
        self.key = key
        self.input_grid = TensorGrid.of(*state.activation) if state.activation else None
        self.register_buffer("factors", None if layer.input_exponents is None else factors_from(layer.input_exponents))
        self.register_buffer("weight", state.weight(self.operator))
        self.register_buffer("bias", torch.zeros(len(state.scale)) if state.bias is None else state.bias)
        # torch.nn.TransformerEncoderLayer has a fast path that never calls a layer, unless a hook hangs on it
        self.register_forward_pre_hook(lambda module, args: None)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear and nn.Conv2d have
        """The layer's output.

        Args:
            input: float32, the shape that the layer accepts.
        """
        if self.factors is not None:
            input = input * self.factors  # noqa: A001
        if self.input_grid is not None:
            grid = self.input_grid
            input = quantize(input, grid.scale, grid.zero_point, grid.low, grid.high)  # noqa: A001
        return self.operator(input, weight(self.weight, self.key), bias(self.bias, self.key) if self.operator.multiplies else None)


def outputs_first(layer: QuantizedLayer) -> tuple[QuantizedState, Operator]:
    """What a layer computes with, the weight of GPT-2's Conv1D turned round, as the graph's own operator has it.

    Args:
        layer: with codes.
    """
    state = layer.state()
    if layer.operator == Linear(transposed=True):
        return replace(state, codes=state.codes.mT.contiguous()), Linear()
    return state, layer.operator


@dataclass(frozen=True, eq=False)
class MarkedModel:
    """A model ready to be traced.

    Args:
        model: every quantized layer is a `MarkedLayer`.
        states: what the layers compute with, by key.
        operators: their arithmetic, by key.
    """

    model: nn.Module
    states: dict[str, QuantizedState]
    operators: dict[str, Operator]

    def is_convolution(self, key: str) -> bool:
        """Whether a layer is a convolution.

        Args:
            key: of the layer.
        """
        return isinstance(self.operators[key], Convolution)


def marked(model: nn.Module) -> MarkedModel:
    """A copy of a model in which every quantized layer is marked.

    Args:
        model: quantized or float; is not changed.

    Example:
        >>> marked(nn.Sequential(nn.Linear(2, 1))).states
        {}
    """
    copy = copy_of(model).cpu().eval()
    layers = {name: module for name, module in copy.named_modules() if isinstance(module, QuantizedLayer) and module.is_quantized}
    for name, layer in layers.items():
        replace_module_(copy, layer, MarkedLayer(layer, name))
    parts = {name: outputs_first(layer) for name, layer in layers.items()}
    return MarkedModel(copy, {name: state for name, (state, _) in parts.items()}, {name: operator for name, (_, operator) in parts.items()})

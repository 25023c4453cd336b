"""The one stateful module: a layer that computes with quantized weights and inputs.

y = operator(q(k x; s_x, z_x), s_w (Q - z_w), b)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from subbyte.errors import ModelError
from subbyte.model.input_factors import EXPONENTS, exponents_of, multiply_input
from subbyte.model.operators import Operator
from subbyte.quantizers.affine import dequantize, fake_quantize
from subbyte.quantizers.granularity import per_weight
from subbyte.quantizers.grid import Grid


@dataclass(frozen=True, eq=False)
class QuantizedState:
    """Everything that a quantized layer computes with.

    Args:
        codes: weight codes `Q`, int16, the shape of the layer's weight.
        scale: weight steps `s_w`, float32 (C_out,), or where the weight grid has a group (C_out, K) for the K column groups.
        zero_point: weight zero-points `z_w`, int32, the shape of `scale`; zeros for a symmetric grid.
        bias: `b`, float32 (C_out,), or None.
        weight_grid: grid of the codes.
        activation: `(s_x, z_x, grid)` of the input, float32 () and int32 (), or None where the input stays in float32.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    weight_grid: Grid
    activation: tuple[Tensor, Tensor, Grid] | None

    def weight(self, operator: Operator) -> Tensor:
        """The quantized weight `s_w (Q - z_w)`, float32, the layer's weight shape.

        Args:
            operator: the layer's arithmetic.
        """
        return dequantize(self.codes, self.per_weight(self.scale, operator), self.per_weight(self.zero_point, operator))

    def per_weight(self, steps: Tensor, operator: Operator) -> Tensor:
        """Steps or zero-points laid out so that they broadcast against the weight.

        Args:
            steps: any dtype, the shape of `scale`.
            operator: the layer's arithmetic.
        """
        group = self.weight_grid.group
        if group is None:
            return operator.per_channel(steps, self.codes)
        groups, outputs, columns = operator.to_matrix(self.codes).shape
        return operator.from_matrix(per_weight(steps.view(groups, outputs, -1), group, columns))


class QuantizedLayer(nn.Module):
    """Stands in for a Linear or convolution: float until `assign_` gives it codes, quantized from then on.

    The weight on the grid is kept beside the codes, so that a forward costs what the float layer's costs plus the input's rounding.

    A model's own code may read a layer's settings (`self.conv.stride`): the float module's public attributes are taken over.

    Args:
        module: the float layer, with a weight, perhaps a bias, and perhaps factors of its input, which this one then has too.
        operator: its arithmetic.

    Example:
        >>> from subbyte.model.operators import operator_of
        >>> linear = nn.Linear(2, 1)
        >>> layer = QuantizedLayer(linear, operator_of(linear))
        >>> layer.is_quantized, layer.in_features
        (False, 2)
    """

    codes: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    activation_scale: Tensor | None
    activation_zero_point: Tensor | None
    input_exponents: Tensor | None
    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: nn.Module, operator: Operator) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.operator = operator
        self.kind = f"{type(module).__name__}({module.extra_repr()})"
        self.shares: str | None = None  # the layer of the model that gives this one its codes
        self.weight_grid: Grid | None = None
        self.activation_grid: Grid | None = None
        bias = getattr(module, "bias", None)
        assert isinstance(module.weight, Tensor)
        self.register_buffer("weight", module.weight.detach(), persistent=False)
        self.register_buffer("bias", bias.detach() if isinstance(bias, Tensor) else None)
        for name in ("codes", "scale", "zero_point", "activation_scale", "activation_zero_point"):
            self.register_buffer(name, None)
        self.register_buffer(EXPONENTS, exponents_of(module))
        self.train(module.training)
        # torch.nn.TransformerEncoderLayer has a fast path that reads `weight` and never calls the layer, unless a hook hangs on it
        self.register_forward_pre_hook(multiply_input, with_kwargs=True)

    @property
    def is_quantized(self) -> bool:
        """Whether `assign_` has been called."""
        return self.codes is not None

    def assign_(self, state: QuantizedState) -> None:
        """Take over codes, steps, bias and grids; from now on the layer computes with them.

        Args:
            state: what to compute with.
        """
        self.codes = state.codes
        self.scale = state.scale
        self.zero_point = state.zero_point
        self.bias = state.bias
        self.weight_grid = state.weight_grid
        self.weight = state.weight(self.operator)
        self.activation_scale, self.activation_zero_point, self.activation_grid = state.activation or (None, None, None)

    def state(self) -> QuantizedState:
        """What the layer computes with: the inverse of `assign_`.

        Raises:
            ModelError: if it is still float.
        """
        if self.codes is None or self.scale is None or self.zero_point is None or self.weight_grid is None:
            raise ModelError(f"{self.kind} has no codes yet")
        activation = None
        if self.activation_grid is not None:
            assert self.activation_scale is not None and self.activation_zero_point is not None
            activation = (self.activation_scale, self.activation_zero_point, self.activation_grid)
        return QuantizedState(self.codes, self.scale, self.zero_point, self.bias, self.weight_grid, activation)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear and nn.Conv2d have
        """The layer's output.

        Args:
            input: float32, the shape that the float layer accepted; times the layer's factors, if it has any.
        """
        if self.activation_grid is not None:
            assert self.activation_scale is not None and self.activation_zero_point is not None
            input = fake_quantize(input, self.activation_scale, self.activation_zero_point, self.activation_grid)  # noqa: A001
        return self.operator(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The widths, for `print(model)`."""
        if self.weight_grid is None:
            return f"{self.kind}, float32"
        inputs = f"A{self.activation_grid.bits}" if self.activation_grid else "A32"
        group = "" if self.weight_grid.group is None else f"/{self.weight_grid.group}"
        scaled = "" if self.input_exponents is None else ", scales its input"
        return f"{self.kind}, W{self.weight_grid.bits}{group}{inputs}{scaled}"

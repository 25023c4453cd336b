"""The problem of one layer, its solution, and the interface of everything that solves it.

    minimise over codes Q, steps s_w, bias b', step s_x and zero-point z_x
        sum over rows  || y - s_w (Q - z_w) q(x'; s_x, z_x) - b' ||^2            y = W x + b

`x` is what the float model feeds to the layer, `x'` what the solver is given: the same in the parallel flavour, the output of the quantized
prefix in the sequential one. Where what follows clips the layer's output (a ReLU), both sides are compared as it clips them. A solver sees
this problem and nothing else: no model, no file, no other layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from subbyte.model.clipping import Clip
from subbyte.quantizers.affine import dequantize, fake_quantize
from subbyte.quantizers.granularity import per_weight
from subbyte.quantizers.grid import Grid

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rows:
    """Sampled rows of a layer.

    Args:
        inputs: `x'`, float32 (G, R, n).
        targets: `y`, float32 (G, R, O).
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Everything that a solver may know of a layer.

    Args:
        name: qualified name of the layer; for messages only.
        weight: `W`, float32 (G, O, n).
        bias: `b`, float32 (G, O); zeros where the layer has none.
        fit: rows to solve on.
        held_out: rows of other samples, to judge a solution by.
        weight_grid: grid of the weight codes.
        activation_grid: grid of the input, or None where the input stays in float32.
        equations: independent rows that the calibration set offers for each output channel (samples times positions).
        clip: what follows the layer reads of its output.
        known: what `once` has computed.

    Example:
        >>> rows = Rows(torch.randn(1, 8, 3), torch.randn(1, 8, 2))
        >>> problem = LayerProblem("fc", torch.randn(1, 2, 3), torch.zeros(1, 2), rows, rows, Grid(4, symmetric=True), None, 8)
        >>> problem.unknowns
        3
    """

    name: str
    weight: Tensor
    bias: Tensor
    fit: Rows
    held_out: Rows
    weight_grid: Grid
    activation_grid: Grid | None
    equations: int
    clip: Clip = Clip()
    known: dict[str, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, key: Hashable, compute: Callable[[], T]) -> T:
        """A result that does not depend on the weight grid: computed once for all grids that this layer is solved with.

        Problems that `dataclasses.replace` makes of this one share what is known. Of each name the last result is kept.

        Args:
            name: of what is computed.
            key: settings that it depends on, beside the problem's tensors.
            compute: computes it.

        Example:
            >>> rows = Rows(torch.randn(1, 8, 3), torch.randn(1, 8, 2))
            >>> problem = LayerProblem("fc", torch.randn(1, 2, 3), torch.zeros(1, 2), rows, rows, Grid(4), None, 8)
            >>> import dataclasses
            >>> coarser = dataclasses.replace(problem, weight_grid=Grid(2))
            >>> problem.once("answer", 1, lambda: 42), coarser.once("answer", 1, lambda: 43)
            (42, 42)
        """
        tensors = (self.weight, self.bias, self.fit, self.held_out)
        kept_key, kept_tensors, result = self.known.get(name, (None, (), None))
        if kept_key != (key,) or any(kept is not mine for kept, mine in zip(kept_tensors, tensors, strict=True)):
            result = compute()
            self.known[name] = ((key,), tensors, result)
        return cast(T, result)

    @property
    def unknowns(self) -> int:
        """Weights of one output channel, n."""
        return self.weight.shape[2]


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """Codes, steps and bias of a layer.

    Args:
        codes: `Q`, int16 (G, O, n).
        scale: `s_w`, float32 (G, O), or with a group (G, O, K) for the K column groups, see `quantizers.granularity`.
        zero_point: `z_w`, int32, the shape of `scale`.
        bias: `b'`, float32 (G, O).
        activation: `(s_x, z_x)`, float32 () and int32 (), or None where the input stays in float32.
        solver: name of the solver that found it.
        group: weights that share a step, the weight grid's; None: all of an output channel.

    Example:
        >>> zero = torch.zeros(1, 1, dtype=torch.int32)
        >>> codes = torch.tensor([[[-2, 1]]], dtype=torch.int16)
        >>> LayerSolution(codes, torch.tensor([[0.5]]), zero, torch.zeros(1, 1), None, "mine").weight()
        tensor([[[-1.0000,  0.5000]]])
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor
    activation: tuple[Tensor, Tensor] | None
    solver: str
    group: int | None = None

    def weight(self) -> Tensor:
        """The quantized weight `s_w (Q - z_w)`, float32 (G, O, n)."""
        return dequantize(self.codes, self.per_weight(self.scale), self.per_weight(self.zero_point))

    def per_weight(self, steps: Tensor) -> Tensor:
        """Steps or zero-points laid out so that they broadcast against the codes.

        Args:
            steps: any dtype, the shape of `scale`.

        Returns:
            (G, O, 1) or (G, O, n).
        """
        return per_weight(steps, self.group, self.codes.shape[-1])


class Solver(ABC):
    """What finds a solution. Implementations are frozen dataclasses that hold their hyperparameters, one in a file.

    Example:
        >>> from subbyte.calibrate.round_to_nearest import RoundToNearest
        >>> isinstance(RoundToNearest(), Solver)
        True
    """

    @property
    def name(self) -> str:
        """What a receipt calls this solver."""
        return type(self).__name__

    @property
    def draft(self) -> Solver:
        """What finds nearly as low errors sooner, for tables of which the errors count and the codes do not; if there is none, itself."""
        return self

    @abstractmethod
    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        """Solve one layer.

        Args:
            problem: the layer.
            generator: source of every random number that the solver draws, on the CPU; seeded by the run's seed and the layer's name.

        Returns:
            A solution with codes inside the weight grid.
        """


def quantized_inputs(inputs: Tensor, activation: tuple[Tensor, Tensor] | None, grid: Grid | None) -> Tensor:
    """`q(x; s_x, z_x)`, or `x` itself where the input stays in float32.

    Args:
        inputs: `x`, float32, any shape.
        activation: `(s_x, z_x)`, float32 () and int32 (), or None.
        grid: grid of the input, or None.
    """
    if activation is None or grid is None:
        return inputs
    return fake_quantize(inputs, *activation, grid)


def relative_error(problem: LayerProblem, solution: LayerSolution, rows: Rows) -> float:
    """The objective on some rows, as a share of the targets' spread: `sum ||y - y^||^2 / sum ||y - mean y||^2`, both clipped.

    Args:
        problem: the layer; tensors as its docstring says.
        solution: what to judge.
        rows: inputs float32 (G, R, n) and targets float32 (G, R, O), usually `problem.held_out`.

    Returns:
        A number without unit, 0 for a perfect layer; where the targets do not vary, the plain sum of squares.
    """
    inputs = quantized_inputs(rows.inputs, solution.activation, problem.activation_grid)
    targets = problem.clip(rows.targets)
    error = problem.clip(torch.baddbmm(solution.bias[:, None, :], inputs, solution.weight().mT)) - targets
    spread = (targets - targets.mean(dim=1, keepdim=True)).square().sum(dtype=torch.float64)
    total = error.square().sum(dtype=torch.float64)
    return float(torch.where(spread > 0, total / spread, total))

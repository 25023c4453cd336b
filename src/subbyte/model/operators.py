"""Which operator a module has: the one place that knows module types."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import Tensor, nn

from subbyte.model.convolution import Convolution
from subbyte.model.linear import Linear, Lookup
from subbyte.model.operator import Operator

__all__ = ["Convolution", "Linear", "Lookup", "Operator", "computes", "operator_of", "twins_of"]

SAME = 1e-5  # of the largest output: as far as sums in another order may be apart


def operator_of(module: nn.Module, *, own_forward: bool = False) -> Operator | None:
    """The operator of a module that computes as torch's own Linear, convolution or Embedding does, or as the Conv1D of transformers; None
    for everything else.

    A subclass counts only while it inherits torch's `forward`: one that computes something else (standardised weights, adapters) would be
    quantized wrongly. See `computes` for those that compute the same in a way of their own.

    Args:
        module: any module.
        own_forward: whether subclasses with a `forward` of their own count too.

    Example:
        >>> operator_of(nn.Linear(2, 3)), operator_of(nn.ReLU())
        (Linear(transposed=False), None)
    """
    forward = type(module).forward
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.Linear) and (own_forward or forward is nn.Linear.forward):
        return Linear()
    if isinstance(module, nn.Embedding) and (own_forward or forward is nn.Embedding.forward) and module.max_norm is None:
        return Lookup()
    if _is_conv1d(module):
        return Linear(transposed=True)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for kind in convolutions:
        inherited = forward is kind.forward and getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
        if isinstance(module, kind) and (own_forward or inherited):
            return Convolution.of(module)
    return None


def computes(operator: Operator, module: nn.Module, x: Tensor, output: object) -> bool:
    """Whether an operator, with a module's weight and bias, gives what the module gave.

    Args:
        operator: see `operator_of`.
        module: has a weight, and perhaps a bias.
        x: what it was called with, any shape that the operator takes.
        output: what it returned.

    Example:
        >>> import torch
        >>> layer, x = nn.Linear(2, 3), torch.randn(4, 2)
        >>> computes(Linear(), layer, x, layer(x)), computes(Linear(), layer, x, layer(x).relu() - 1)
        (True, False)
    """
    if not isinstance(output, Tensor) or not isinstance(module.weight, Tensor):
        return False
    try:
        expected = operator(x, module.weight, getattr(module, "bias", None))
    except (RuntimeError, IndexError):  # no input for the operator: of another shape, or rows that a table has not
        return False
    if expected.shape != output.shape or expected.dtype != output.dtype:
        return False
    return bool((expected - output).abs().amax() <= SAME * expected.abs().amax()) if expected.numel() else True


def twins_of(module: nn.Module, others: Mapping[str, nn.Module]) -> list[str]:
    """Names of the modules that are as good as another one: they do the same with the same tensors.

    Args:
        module: a layer that can be quantized.
        others: modules by name.

    Example:
        >>> one, other = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
        >>> other.weight = one.weight
        >>> twins_of(one, {"other": other, "third": nn.Linear(2, 3)})
        ['other']
    """

    def same(other: nn.Module) -> bool:
        weights = getattr(other, "weight", None) is module.weight and getattr(other, "bias", None) is getattr(module, "bias", None)
        return other is not module and weights and operator_of(other) == operator_of(module) is not None

    return [name for name, other in others.items() if same(other)]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, which is a Linear with its weight transposed."""
    library = sys.modules.get("transformers.pytorch_utils")  # a module of a library that is not loaded cannot be here
    return library is not None and type(module) is library.Conv1D

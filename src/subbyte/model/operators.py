"""Which operator a module has: the one place that knows module types."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn

from subbyte.model.convolution import Convolution
from subbyte.model.linear import Linear, Lookup
from subbyte.model.operator import Operator

__all__ = ["Convolution", "Linear", "Lookup", "Operator", "operator_of", "twins_of"]


def operator_of(module: nn.Module) -> Operator | None:
    """The operator of a module that computes as torch's own Linear, convolution or Embedding does, or as the Conv1D of transformers; None
    for everything else.

    A subclass counts only while it inherits torch's `forward`: one that computes something else (standardised weights, adapters) would be
    quantized wrongly.

    Args:
        module: any module.

    Example:
        >>> operator_of(nn.Linear(2, 3)), operator_of(nn.ReLU())
        (Linear(transposed=False), None)
    """
    forward = type(module).forward
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return Linear()
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward and module.max_norm is None:
        return Lookup()
    if _is_conv1d(module):
        return Linear(transposed=True)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for kind in convolutions:
        inherited = forward is kind.forward and getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
        if isinstance(module, kind) and inherited:
            return Convolution.of(module)
    return None


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
        return other is not module and weights and operator_of(other) == operator_of(module)

    return [name for name, other in others.items() if same(other)]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, which is a Linear with its weight transposed."""
    library = sys.modules.get("transformers.pytorch_utils")  # a module of a library that is not loaded cannot be here
    return library is not None and type(module) is library.Conv1D

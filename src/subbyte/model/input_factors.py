"""Factors by which a layer multiplies its own input before it is rounded.

    y = operator(q(k x), W / k, b)        k = 2^e, one for each input channel

For inputs whose channels differ too much to share a step, where no module before the layer can scale them because others read them too:
in a transformer that norms behind its residual sums, most inputs are read by the next sum as well. Powers of two change neither `x` nor
`W` but for their exponents, so that the float layer computes the very same numbers.

The multiplication is a hook in front of the layer, so that whatever watches the layer's input sees what the layer multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subbyte.model.operators import Operator

EXPONENTS = "input_exponents"  # the buffer's name
MOST = 60  # exponents go from minus this to this, far from where float32 ends


def put_exponents_(module: nn.Module, exponents: Tensor, operator: Operator) -> None:
    """Let a float layer multiply its input, and undo it in its weights.

    Args:
        module: with a weight and no such factors yet; gets a new weight.
        exponents: `e`, int8 (C_in,), from -60 to 60.
        operator: the layer's arithmetic.

    Example:
        >>> from subbyte.model.operators import Linear
        >>> linear, x = nn.Linear(2, 1), torch.randn(5, 2)
        >>> before = linear(x)
        >>> put_exponents_(linear, torch.tensor([3, -2], dtype=torch.int8), Linear())
        >>> torch.equal(linear(x), before), linear.input_exponents
        (True, tensor([ 3, -2], dtype=torch.int8))
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    undone = torch.ldexp(weight.detach(), -operator.per_input(exponents.to(torch.int32), weight))
    module.weight = nn.Parameter(undone, requires_grad=False)
    module.register_buffer(EXPONENTS, exponents)
    module.register_forward_pre_hook(multiply_input, with_kwargs=True)


def exponents_of(module: nn.Module) -> Tensor | None:
    """`e` of a layer, int8 (C_in,), or None.

    Args:
        module: any layer.

    Example:
        >>> exponents_of(nn.Linear(2, 1)) is None
        True
    """
    found = getattr(module, EXPONENTS, None)
    return found if isinstance(found, Tensor) else None


def factors_from(exponents: Tensor) -> Tensor:
    """`k = 2^e`, float32 (C_in,).

    Args:
        exponents: int8 (C_in,).

    Example:
        >>> factors_from(torch.tensor([3, -2], dtype=torch.int8))
        tensor([8.0000, 0.2500])
    """
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.to(torch.int32))


def multiply_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook in front of a layer: its input times its factors, if it has any.

    Args:
        module: the layer.
        args: its input, float (..., C_in), or none.
        kwargs: its input by name, or none.
    """
    exponents = exponents_of(module)
    if exponents is None:
        return None
    factors = factors_from(exponents)
    return tuple(x * factors for x in args), {name: x * factors for name, x in kwargs.items()}

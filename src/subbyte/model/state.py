"""What a model's state amounts to: its tensors, their bytes, and a fingerprint of its structure."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from subbyte.model.operators import operator_of


def structure_of(model: nn.Module) -> str:
    """Fingerprint of a model's structure: names, shapes and dtypes of its state and settings of its layers, not its numbers.

    Args:
        model: a float model as it came, batch norms not folded.

    Returns:
        32 hexadecimal digits.
    """
    state = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state_tensors(model).items()]
    operators = [(name, repr(operator)) for name, module in model.named_modules() if (operator := operator_of(module))]
    return hashlib.blake2b(repr((sorted(state), sorted(operators))).encode(), digest_size=16).hexdigest()


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model's state by name, any shape; what else a module puts there (`get_extra_state`) is left out.

    Args:
        model: any module.
    """
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what stands under several names counts once.

    Args:
        model: any module.
    """
    distinct = {id(tensor): tensor for tensor in state_tensors(model).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())

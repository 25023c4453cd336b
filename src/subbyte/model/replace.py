"""Copy a model, and exchange modules in it, wherever they hang."""

from __future__ import annotations

import copy

from torch import nn

from subbyte.errors import ModelError


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` into every place of `model` that holds `old`, under each of its names.

    Args:
        model: is changed in place.
        old: a submodule of `model`, not `model` itself.
        new: what takes its place.

    Raises:
        KeyError: if `model` does not hold `old`.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))
        >>> replace_module_(model, model[1], nn.Identity())
        >>> model[1]
        Identity()
    """
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    if not places:
        raise KeyError(f"{type(model).__name__} holds no such {type(old).__name__}")
    for parent, name in places:
        setattr(parent, name, new)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy.

    Args:
        model: any module.

    Raises:
        ModelError: if something in it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"the model cannot be copied: {error}; take what cannot be copied (locks, files, sessions) out of it") from error

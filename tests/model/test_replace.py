"""Modules are exchanged wherever they hang."""

from __future__ import annotations

import pytest
from torch import nn

from subbyte.model.replace import replace_module_


def test_every_name_of_a_module_is_replaced() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": nn.Linear(2, 2)})
    new = nn.Identity()
    replace_module_(model, shared, new)
    assert model["a"] is new and model["b"][1] is new
    assert isinstance(model["c"], nn.Linear)
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == ["", "a", "b", "b.0", "b.1", "c"]


def test_a_stranger_is_refused() -> None:
    with pytest.raises(KeyError, match="Sequential holds no such Linear"):
        replace_module_(nn.Sequential(nn.ReLU()), nn.Linear(2, 2), nn.Identity())

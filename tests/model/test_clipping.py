"""What is read of a layer's output is found by running the model, however it writes its activation functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.model.clipping import Clip, find_clips
from subbyte.model.layers import survey


class Functional(nn.Module):
    """One layer, a function behind it, another layer."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 12), nn.Linear(12, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def clips_of(model: nn.Module, x: Tensor) -> dict[str, Clip]:
    return find_clips(model, survey(model, [x])[0].layers, [x])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("function", [F.relu, torch.relu, nn.ReLU(), lambda y: y.clamp(min=0), lambda y: y.relu_(), lambda y: y * (y > 0)])
def test_a_rectifier_is_found(function, x: Tensor) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    clips = clips_of(Functional(function).eval(), x)
    assert set(clips) == {"first"}
    assert clips["first"].high == math.inf and -0.05 < clips["first"].low <= 0


def test_both_ends_of_a_relu6_are_found(x: Tensor) -> None:
    torch.manual_seed(0)
    clip = clips_of(Functional(F.relu6).eval(), x * 5)["first"]
    assert -0.1 < clip.low <= 0 and 6 <= clip.high < 6.5


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.leaky_relu, torch.tanh, torch.sigmoid, lambda y: y, torch.abs])
def test_what_reads_everything_clips_nothing(function, x: Tensor) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    assert clips_of(Functional(function).eval(), x / 8) == {}


def test_an_output_that_is_also_read_as_it_is_is_not_clipped(x: Tensor) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(torch.relu(self.second(torch.relu(y))) + y)

    torch.manual_seed(0)
    assert set(clips_of(Residual().eval(), x)) == {"second"}


def test_clips_change_no_bit_and_leave_no_hook(x: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 2)).eval()
    before = model(x)
    clips = clips_of(model, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    for name, clip in clips.items():
        model.get_submodule(name).register_forward_hook(lambda module, args, output, clip=clip: clip(output))
    assert torch.equal(model(x), before)


def test_a_model_that_cannot_be_differentiated_clips_nothing(x: Tensor) -> None:
    class Detached(Functional):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    assert clips_of(Detached(F.relu).eval(), x) == {}


def test_the_empty_clip_is_none_at_all() -> None:
    assert not Clip() and Clip(0.0) and Clip(high=6.0)
    y = torch.randn(5)
    assert Clip()(y) is y

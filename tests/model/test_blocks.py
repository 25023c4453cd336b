"""Blocks are found from the module tree and from what runs, and prove themselves by running again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subbyte.model.blocks import Arguments, Block, ModuleBlock, Span, find_blocks
from subbyte.model.layers import survey


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + x)


class Net(nn.Module):
    """A stem, residual blocks in a stage, and a head; nothing has a telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Conv2d(3, 4, 3)
        self.w = nn.Sequential(Residual(4), Residual(4), Residual(4))
        self.e = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(self.w(F.relu(self.q(x))).mean(dim=(2, 3)))


class Plain(nn.Module):
    """Layers and functions, no modules around them."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def found(model: nn.Module, x: object, most: int = 6, span: int = 4) -> tuple[Block, ...]:
    torch.manual_seed(0)
    return find_blocks(model, survey(model, [x])[0].layers, x, most, span)


def test_residual_blocks_are_modules_and_what_is_left_forms_spans_only_where_it_is_next_to_each_other() -> None:
    blocks = found(Net().eval(), torch.randn(2, 3, 9, 9))
    assert [(type(block), block.layers) for block in blocks] == [(ModuleBlock, (f"w.{k}.a", f"w.{k}.b")) for k in range(3)]


def test_a_module_that_is_too_large_is_taken_apart() -> None:
    whole = found(nn.Sequential(nn.Sequential(Residual(3), nn.ReLU())).eval(), torch.randn(2, 3, 5, 5), most=6)
    assert [block.layers for block in whole] == [("0.0.a", "0.0.b")]
    assert [block.layers for block in found(Net().eval(), torch.randn(2, 3, 9, 9), most=1, span=1)] == []


def test_spans_cover_layers_without_modules() -> None:
    blocks = found(Plain().eval(), torch.randn(2, 6), most=1, span=3)
    assert [block.layers for block in blocks] == [("layers.0", "layers.1", "layers.2"), ("layers.3", "layers.4")]
    assert all(isinstance(block, Span) for block in blocks)


@pytest.mark.parametrize(("model", "x"), [(Net(), torch.randn(2, 3, 9, 9)), (Plain(), torch.randn(2, 6))], ids=["modules", "spans"])
def test_a_block_runs_again_on_other_samples(model: nn.Module, x: Tensor) -> None:
    """What goes in and comes out in a run on other samples is what the block computes from it alone."""
    blocks = found(model.eval(), x)
    other = torch.randn(5, *x.shape[1:])
    for block in blocks:
        given: list[Arguments] = []
        wanted: list[Tensor] = []
        entry = model.get_submodule(block.entry)
        handles = [entry.register_forward_pre_hook(lambda module, args, given=given: given.append(Arguments(args, {}).copied()))]
        after = block.after if isinstance(block, Span) else None
        if isinstance(block, ModuleBlock):
            handles.append(entry.register_forward_hook(lambda module, args, output, wanted=wanted: wanted.append(output.clone())))
        elif after is not None:
            leave = model.get_submodule(after)
            handles.append(leave.register_forward_pre_hook(lambda module, args, wanted=wanted: wanted.append(args[0].clone())))
        with torch.no_grad():
            output = model(other)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            again = block.run(model, given[0])
        torch.testing.assert_close(again, wanted[0] if wanted else output, rtol=1e-4, atol=1e-5)


def test_running_a_block_leaves_its_arguments_and_the_model_as_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.mul_(2.0)))

    model = nn.Sequential(nn.Linear(4, 4), InPlace()).eval()
    block = next(block for block in found(model, torch.randn(2, 4), most=2, span=1) if block.layers == ("1.a", "1.b"))
    arguments = Arguments((torch.ones(3, 4),), {})
    with torch.no_grad():
        block.run(model, arguments)
    assert torch.equal(arguments.positional[0], torch.ones(3, 4))
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_what_depends_on_more_than_its_input_is_no_block() -> None:
    class Remembering(nn.Module):
        """Its second module reads what the first one left behind, and forgets it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.pair = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.kept: Tensor | None = None
            self.pair.register_forward_pre_hook(lambda module, args: (args[0] + self.take(),))

        def take(self) -> Tensor:
            kept, self.kept = self.kept, None
            assert kept is not None
            return kept

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.a(x)
            return self.pair(x)

    blocks = found(Remembering().eval(), torch.randn(2, 4), most=2, span=1)
    assert blocks == ()


def test_layers_called_several_times_are_in_no_block() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.pair(x))

    assert found(Twice().eval(), torch.randn(2, 4)) == ()

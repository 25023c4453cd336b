"""Forwards with a memory return what forwards without one return, and compute less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from subbyte.model.batches import call
from subbyte.model.memory import Memory

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))


class InPlace(nn.Module):
    """Writes into outputs of layers and of blocks, by modules and by functions, and reads them afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu, self.same, self.block = nn.ReLU(inplace=True), nn.Identity(), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.relu(y)  # y is changed as well
        w = self.same(self.b(z + y))
        w += y
        v = self.block(w)  # w is changed, and not returned
        return self.c(functional.relu_(v - w) + z)


class Nested(nn.Module):
    """Blocks of blocks, one of them called twice with one layer, others with tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))
        self.pair, self.twice, self.head = Pair(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, (two, _) = self.pair((self.stem(x), x))
        return self.head(self.twice(one) + self.twice(two))


class Pair(nn.Module):
    """Takes a tuple and returns a nested one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, None]]:
        return self.left(given[0]), (self.right(given[1]), None)


class Appending(nn.Module):
    """A block that writes its output into a list, as caches of keys and values are written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, found: list[Tensor]) -> None:
        found.append(self.first(x).tanh())
        found.append(self.second(found[-1]))


class Lists(nn.Module):
    """Reads what blocks have written into a list."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Appending(), Appending()

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        self.one(x, found)
        self.two(found[-1], found=found)
        return torch.stack(found).sum(dim=0)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def doubled(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return lambda x: functional.linear(x, 2.0 * weight, bias)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("network", [InPlace, Nested, Lists])
@torch.no_grad()
def test_every_forward_is_that_without_a_memory(network: type[nn.Module], keep: bool) -> None:
    model = network().eval()
    layers = layers_of(model)
    plain = call(model, X).clone()
    with Memory(model, layers, keep=keep) as memory:
        assert torch.equal(memory.run(X), plain)
        order = memory.order
        assert sorted(order) == sorted(layers)
        found = {}
        for name in order:
            memory.advance(name, X)
            assert torch.equal(memory.run(X), plain), name
            found[name] = memory.changed(name, doubled(layers[name]), X)
            assert torch.equal(memory.run(X), plain), name
    assert torch.equal(call(model, X), plain)
    assert not any("forward" in vars(module) for module in model.modules())
    for name, layer in layers.items():
        handle = layer.register_forward_hook(lambda module, args, output, layer=layer: doubled(layer)(*args))
        expected = call(model, X)
        handle.remove()
        assert torch.equal(found[name], expected) and not torch.equal(expected, plain), name


@torch.no_grad()
def test_nothing_before_the_layer_is_computed_again() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5))).eval()
    calls: list[int] = []
    for index, block in enumerate(model):
        block[1].register_forward_hook(lambda module, args, output: None)
        block[1].forward = lambda x, index=index: (calls.append(index), x.tanh())[1]
    with Memory(model, layers_of(model)) as memory:
        memory.run(X)
        assert calls == [0, 1, 2, 3, 4]
        calls.clear()
        for name in memory.order:
            memory.advance(name, X)
        assert calls == [0, 1, 2, 3]  # each block once, all in all
        assert len(memory._known) == 4
        calls.clear()
        memory.run(X)
        assert calls == [4]
    model[0](X)
    assert calls == [4, 0]  # a forward of the module's own is there again

"""Channels are scaled alike wherever outputs prove that nothing else changes, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import subbyte
from subbyte.errors import OptionError
from subbyte.model.equalize import Equalization, Equalized, equalize_
from subbyte.model.layers import survey


class Net(nn.Module):
    """Modules and a function that runs them."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def uneven(model: nn.Module) -> nn.Module:
    """Output channels of very different sizes, as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.LayerNorm | nn.GroupNorm):
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            sizes = torch.logspace(-1, 0, module.weight.shape[axis])[torch.randperm(module.weight.shape[axis])]
            shape = [1] * module.weight.dim()
            shape[axis] = -1
            module.weight.data *= sizes.view(shape)
            if module.bias is not None:
                module.bias.data = torch.randn_like(module.bias) * 0.3 * sizes.repeat(module.bias.numel() // sizes.numel())
    return model.eval()


def equalized(model: nn.Module, x: Tensor, bits: tuple[int, int | None] = (4, 4)) -> tuple[Equalized, ...]:
    """Equalize, and check that the outputs stay what they were."""
    with torch.no_grad():
        before = model(x)
    found, _ = survey(model, [x])
    done = equalize_(model, found.multiplying, [x], {layer.name: [bits] for layer in found.layers}, Equalization())
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    return done


def pairs(done: tuple[Equalized, ...]) -> dict[str, tuple[str, ...]]:
    return {one.source: one.readers for one in done}


def conv(*sizes: int, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(*sizes, 3, padding=1, **settings)


IMAGES = (16, 6, 8, 8)
CHAINS: list[tuple[str, nn.Module, tuple[int, ...], dict[str, tuple[str, ...]]]] = [
    ("relu", nn.Sequential(conv(6, 8), nn.ReLU(), conv(8, 4)), IMAGES, {"0": ("2",)}),
    ("leaky", nn.Sequential(conv(6, 8), nn.LeakyReLU(), conv(8, 4)), IMAGES, {"0": ("2",)}),
    ("pool", nn.Sequential(conv(6, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 4)), IMAGES, {"0": ("3",)}),
    ("grouped", nn.Sequential(conv(6, 8, groups=2), nn.ReLU(), conv(8, 4, groups=4)), IMAGES, {"0": ("2",)}),
    ("depthwise", nn.Sequential(conv(6, 8), nn.ReLU(), conv(8, 16, groups=8)), IMAGES, {"0": ("2",)}),
    ("transposed", nn.Sequential(nn.ConvTranspose2d(6, 8, 2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)), IMAGES, {"0": ("2",)}),
    ("to linear", nn.Sequential(conv(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3)), IMAGES, {"0": ("3",)}),
    ("tokens", nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 8)), (64, 5, 12), {"0": ("1",)}),
    ("group norm", nn.Sequential(nn.GroupNorm(2, 6), conv(6, 4)), IMAGES, {"0": ("1",)}),
    ("smooth", nn.Sequential(conv(6, 8), nn.GELU(), conv(8, 4)), IMAGES, {}),
    ("bounded", nn.Sequential(conv(6, 8), nn.Tanh(), conv(8, 4)), IMAGES, {}),
    ("sigmoid", nn.Sequential(conv(6, 8), nn.Sigmoid(), conv(8, 4)), IMAGES, {}),
    ("last", nn.Sequential(conv(6, 8), nn.ReLU()), IMAGES, {}),
]


@pytest.mark.parametrize(("model", "shape", "expected"), [row[1:] for row in CHAINS], ids=[row[0] for row in CHAINS])
def test_what_passes_factors_on_is_equalized(model: nn.Module, shape: tuple[int, ...], expected: dict[str, tuple[str, ...]]) -> None:
    assert pairs(equalized(uneven(model), torch.randn(shape))) == expected


def test_a_residual_sum_reads_too_and_keeps_its_source_as_it_is() -> None:
    net = Net(lambda m, x: m.c(m.b(F.relu(y := m.a(x))) + y), a=conv(6, 6), b=conv(6, 6), c=conv(6, 3))
    assert pairs(equalized(uneven(net), torch.randn(IMAGES))) == {}


def test_inside_a_residual_block_channels_are_equalized() -> None:
    net = Net(lambda m, x: m.c(x + m.b(F.relu(m.a(x)))), a=conv(6, 9), b=conv(9, 6), c=conv(6, 3))
    assert pairs(equalized(uneven(net), torch.randn(IMAGES))) == {"a": ("b",)}


def test_several_readers_all_undo_it() -> None:
    net = Net(lambda m, x: m.b(y := F.relu(m.a(x))) * m.c(y), a=conv(6, 9), b=conv(9, 3), c=conv(9, 3))
    assert pairs(equalized(uneven(net), torch.randn(IMAGES))) == {"a": ("b", "c")}


def test_a_reader_of_a_concatenation_undoes_each_in_its_place() -> None:
    net = Net(lambda m, x: m.c(torch.cat([F.relu(m.b(x)), F.relu(m.a(x))], 1)), a=conv(6, 5), b=conv(6, 7), c=conv(12, 3))
    assert pairs(equalized(uneven(net), torch.randn(IMAGES))) == {"a": ("c",), "b": ("c",)}


def test_values_of_attention_are_equalized_with_the_projection_behind_it() -> None:
    def attend(m: Net, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    net = Net(attend, **{name: nn.Linear(12, 12) for name in "qkvo"})
    assert pairs(equalized(uneven(net), torch.randn(32, 5, 12))) == {"v": ("o",)}


def test_below_the_bound_of_a_relu6_channels_are_scaled_up_to_it_and_those_that_reach_it_stay() -> None:
    model = nn.Sequential(conv(2, 4), nn.ReLU6(), conv(4, 4, groups=4)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, 0, 1, 1] = torch.tensor([8.0, 1.0, 0.25, 0.01])
        model[0].bias.zero_()
    x = torch.rand(64, 2, 8, 8)
    x[0, 0, 0, 0] = 1.0
    (done,) = equalized(model, x)
    torch.testing.assert_close(done.factors[:1], torch.ones(1))
    assert bool((done.factors[1:] > 4).all()) and float((done.factors[1:] * torch.tensor([1.0, 0.25, 0.01])).max()) <= 6.001


def test_where_inputs_have_as_many_bits_as_they_like_weights_that_would_lose_are_left_alone() -> None:
    model = nn.Sequential(conv(6, 8), nn.ReLU(), conv(8, 4))
    coarse, fine = (equalized(uneven(model), torch.randn(IMAGES), bits) for bits in ((8, 2), (2, 8)))
    assert pairs(coarse) == {"0": ("2",)}
    assert not fine or float(fine[0].factors.max()) < float(coarse[0].factors.max())


def test_what_the_outputs_contradict_is_undone_to_the_bit() -> None:
    """Channels that only some samples use: those that look for readers do not show that one of them is read elsewhere too."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(y) + (F.relu(x.sum() - 5e3) * y).sum()

    net = uneven(Net(run, a=conv(6, 9), b=conv(9, 3)))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.randn(128, 6, 8, 8)
    x[32:] += 10.0  # not in the first batch
    found, _ = survey(net, [x[:32]])
    batches = list(x.split(32))
    options = {layer.name: [(4, 4)] for layer in found.layers}
    assert equalize_(net, found.multiplying, batches, options, Equalization()) == ()
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_a_model_that_refuses_other_numbers_is_left_alone() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        if abs(float(y.mean()) - m.mean) > 1e-6:
            raise ValueError("strange numbers")
        return m.b(F.relu(y))

    net, x = uneven(Net(run, a=conv(6, 9), b=conv(9, 3))), torch.randn(IMAGES)
    with torch.no_grad():
        net.mean = float(net.a(x[:2]).mean())
    found, _ = survey(Net(lambda m, x: m.b(F.relu(m.a(x))), a=net.a, b=net.b).eval(), [x])
    assert equalize_(net, found.multiplying, [x[:2]], {"a": [(4, 4)], "b": [(4, 4)]}, Equalization()) == ()


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), a=conv(6, 6), b=conv(6, 3))
    assert pairs(equalized(uneven(net), torch.randn(IMAGES))) == {}


def test_rounding_at_few_bits_loses_less_and_the_receipt_says_what_was_done() -> None:
    torch.manual_seed(1)
    model, x = (
        uneven(nn.Sequential(conv(6, 16), nn.ReLU(), conv(16, 16, groups=16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5))),
        torch.randn(96, 6, 8, 8),
    )
    with_it, without = (
        subbyte.quantize(
            model, x, widths=subbyte.Widths(4, 4), recipe=subbyte.Recipe(solver=subbyte.RoundToNearest(), equalization=setting)
        )
        for setting in (Equalization(), None)
    )
    assert with_it.loss < without.loss
    assert "channels equalized: 2 (0, 2)" in str(with_it) and not without.equalized


def test_where_no_input_is_quantized_nothing_is_scaled() -> None:
    model = uneven(nn.Sequential(conv(6, 8), nn.ReLU(), conv(8, 4)))
    assert subbyte.quantize(model, torch.randn(IMAGES), widths=subbyte.Widths(4, None)).equalized == ()


@pytest.mark.parametrize("settings", [{"strengths": ()}, {"strengths": (1.5,)}, {"most": 0.5}, {"own_below": 1.5}])
def test_settings_outside_their_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="strengths from 0 to 1"):
        Equalization(**settings)  # type: ignore[arg-type]

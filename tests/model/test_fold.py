"""Batch norms are folded where running the model proves it right, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from subbyte.errors import ModelError
from subbyte.model.fold import Fold, fold_batch_norms_
from subbyte.model.layers import survey


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with numbers as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def folded(model: nn.Module, x: Tensor) -> tuple[Fold, ...]:
    """Fold, and check that the outputs stay what they were, on this batch and on another."""
    other = torch.randn_like(x)
    with torch.no_grad():
        before = model(x), model(other)
    found, _ = survey(model, [x])
    folds = fold_batch_norms_(model, found.layers, [x])
    with torch.no_grad():
        after = model(x), model(other)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    return folds


PAIRS: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (5, 3, 9)),
    (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (5, 3, 9, 8)),
    (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (5, 4, 9, 8)),
    (nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6, eps=0.1), (5, 6, 9, 8)),
    (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (5, 2, 4, 4, 3)),
    (nn.Linear(6, 4), nn.BatchNorm1d(4), (5, 6)),
    (nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), (5, 6)),
    (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (5, 3, 6)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (5, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3), (5, 2, 3, 3, 2)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), PAIRS, ids=[f"{layer}-{norm}" for layer, norm, _ in PAIRS])
def test_a_batch_norm_behind_its_layer_is_folded(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = trained(nn.Sequential(layer, norm, nn.ReLU()))
    assert folded(model, torch.randn(shape)) == (Fold("0", "1"),)
    assert isinstance(model[1], nn.Identity)
    assert layer.bias is not None


def test_linear_over_positions_is_not_folded_into_a_norm_over_them() -> None:
    model = trained(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(7)))  # (samples, 7 positions, 4): the norm's channels are positions
    assert folded(model, torch.randn(5, 7, 6)) == ()
    assert isinstance(model[1], nn.BatchNorm1d)


def test_linear_over_as_many_positions_as_channels_is_not_folded() -> None:
    model = trained(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))  # (samples, 4 positions, 4): only the numbers tell
    assert folded(model, torch.randn(5, 4, 6)) == ()


class Wired(nn.Module):
    """Two convolutions and two batch norms, connected by a function."""

    def __init__(self, wiring: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def residual_from_before_the_norm(m: Wired, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + y


def norm_shared_by_two(m: Wired, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + m.bn(m.other(x))


def two_norms_on_one(m: Wired, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + m.bn2(y)


def functional_between(m: Wired, x: Tensor) -> Tensor:
    return m.bn(F.relu(m.conv(x)))


def relu_in_place_between(m: Wired, x: Tensor) -> Tensor:
    return m.bn(F.relu_(m.conv(x)))  # the same object, but other numbers


def layer_called_twice(m: Wired, x: Tensor) -> Tensor:
    return m.bn(m.conv(m.conv(x)))


def read_later_by_a_model_output(m: Wired, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.cat([m.bn(y), y * 2])


def norm_before_the_layer(m: Wired, x: Tensor) -> Tensor:
    return m.conv(m.bn(x))


@pytest.mark.parametrize(
    "wiring",
    [
        residual_from_before_the_norm,
        norm_shared_by_two,
        two_norms_on_one,
        functional_between,
        relu_in_place_between,
        layer_called_twice,
        read_later_by_a_model_output,
        norm_before_the_layer,
    ],
)
def test_what_must_not_be_folded_is_not(wiring: Callable[..., Tensor]) -> None:
    model = trained(Wired(wiring))
    assert folded(model, torch.randn(4, 3, 5, 5)) == ()
    assert isinstance(model.bn, nn.BatchNorm2d) and isinstance(model.bn2, nn.BatchNorm2d)


def test_a_wrong_fold_does_not_cost_the_right_ones() -> None:
    model = trained(Wired(lambda m, x: m.bn2(m.other(residual_from_before_the_norm(m, x)))))
    assert folded(model, torch.randn(4, 3, 5, 5)) == (Fold("other", "bn2"),)
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_a_weight_shared_by_two_layers_keeps_the_other_as_it_was() -> None:
    def wiring(m: Wired, x: Tensor) -> Tensor:
        return m.other(m.bn(m.conv(x)))

    model = trained(Wired(wiring))
    model.other.weight = model.conv.weight
    folded(model, torch.randn(4, 3, 5, 5))


def test_a_weight_that_the_model_reads_elsewhere_is_not_folded() -> None:
    model = trained(Wired(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum()))
    assert folded(model, torch.randn(4, 3, 5, 5)) == ()


def test_a_norm_without_running_statistics_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert folded(model, torch.randn(4, 3, 5, 5)) == ()


def test_a_norm_with_its_own_forward_stays() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), Own(4)))
    assert folded(model, torch.randn(4, 3, 5, 5)) == ()


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True), nn.LayerNorm([4, 3, 3])], ids=str)
def test_other_norms_stay(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    assert folded(model, torch.randn(4, 3, 5, 5)) == ()


def test_a_norm_under_two_names_becomes_an_identity_under_both() -> None:
    model = trained(Wired(lambda m, x: m.bn(m.conv(x))))
    model.alias = model.bn
    assert folded(model, torch.randn(4, 3, 5, 5)) == (Fold("conv", "bn"),)
    assert isinstance(model.alias, nn.Identity) and model.alias is model.bn


def test_a_channel_with_zero_gain_is_folded() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight[1] = 0
    assert folded(model, torch.randn(4, 3, 5, 5)) == (Fold("0", "1"),)


def test_one_small_output_among_large_ones_still_counts() -> None:
    """A wrong fold must show even where the output that it spoils is small beside another output."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.conv(x)
            return {"large": 1e6 * self.bn(y), "small": 1e-3 * y}

    model = trained(Two())
    x = torch.randn(4, 3, 5, 5)
    found, _ = survey(model, [x])
    assert fold_batch_norms_(model, found.layers, [x]) == ()


def test_only_surveyed_layers_are_folded() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(4, 3, 5, 5)
    found, _ = survey(model, [x], exclude=["0"])
    assert fold_batch_norms_(model, found.layers, [x]) == (Fold("2", "3"),)


def test_random_outputs_are_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, training=True)

    model, x = Noisy().eval(), torch.randn(8, 4)
    found, _ = survey(model, [x])
    with pytest.raises(ModelError, match="dropout"):
        fold_batch_norms_(model, found.layers, [x])


def test_random_outputs_are_refused_beside_a_batch_norm_too() -> None:
    model = trained(Wired(lambda m, x: F.dropout(m.bn(m.conv(x)), 0.5, training=True)))
    x = torch.randn(4, 3, 5, 5)
    found, _ = survey(model, [x])
    with pytest.raises(ModelError, match="dropout"):
        fold_batch_norms_(model, found.layers, [x])


def test_hooks_are_gone_afterwards() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded(model, torch.randn(4, 3, 5, 5))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())

"""The networks have the shapes, names and padding of the weights they are to hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from subbyte.errors import OptionError
from subbyte.tasks import CifarResNet, DigitsNet, MobileNetV1, SqueezeNet11
from subbyte.tasks.mobilenet_v1 import _padded, _same_padding


@pytest.mark.parametrize(
    ("network", "input_shape", "classes"),
    [
        (CifarResNet(8), (2, 3, 32, 32), 10),
        (CifarResNet(20), (2, 3, 32, 32), 10),
        (MobileNetV1(width=0.25), (2, 3, 64, 64), 1000),
        (MobileNetV1(width=0.25, classes=7), (2, 3, 75, 61), 7),
        (SqueezeNet11(), (2, 3, 64, 64), 1000),
        (SqueezeNet11(classes=7), (2, 3, 75, 61), 7),
        (DigitsNet(), (2, 1, 8, 8), 10),
    ],
)
def test_forward_gives_one_logit_a_class(network: nn.Module, input_shape: tuple[int, ...], classes: int) -> None:
    with torch.inference_mode():
        logits = network.eval()(torch.zeros(input_shape))
    assert logits.shape == (input_shape[0], classes)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("network", "parameters"),
    [(CifarResNet(20), 269_722), (CifarResNet(56), 853_018), (MobileNetV1(), 2_585_560), (SqueezeNet11(), 1_235_496)],
)
def test_parameter_count_is_the_published_one(network: nn.Module, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_weights_are_in_conv_and_linear_layers_only() -> None:
    modules = [module for network in (CifarResNet(8), MobileNetV1(0.25), SqueezeNet11(10), DigitsNet()) for module in network.modules()]
    assert {type(module) for module in modules if any(True for _ in module.parameters(recurse=False))} == {
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Linear,
    }


def test_cifar_shortcut_takes_every_second_pixel_and_pads_half_the_channels_before() -> None:
    block = CifarResNet(8).layer2[0]
    x = torch.rand(1, 16, 8, 8)
    shortcut = block._shortcut(x)
    assert shortcut.shape == (1, 32, 4, 4)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


@pytest.mark.parametrize(("length", "padding"), [(224, (0, 1)), (7, (1, 1)), (112, (0, 1)), (1, (1, 1))])
def test_same_padding_with_stride_two_goes_below_and_right(length: int, padding: tuple[int, int]) -> None:
    assert _same_padding(length, kernel=3, stride=2) == padding


def test_mobilenet_pads_the_end_of_an_even_side_and_only_before_a_stride() -> None:
    network = MobileNetV1(width=0.25)
    x = torch.rand(1, 3, 4, 6)
    assert torch.equal(_padded(x, network.stem.conv), nn.functional.pad(x, (0, 1, 0, 1)))
    without_stride = next(conv for conv in network.modules() if isinstance(conv, nn.Conv2d) and conv.stride == (1, 1))
    assert _padded(x, without_stride) is x


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_a_depth_that_does_not_exist_is_refused(depth: int) -> None:
    with pytest.raises(OptionError, match="6 n \\+ 2"):
        CifarResNet(depth)


def test_sizes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(OptionError, match="width"):
        MobileNetV1(width=0)
    with pytest.raises(OptionError, match="classes"):
        SqueezeNet11(classes=0)

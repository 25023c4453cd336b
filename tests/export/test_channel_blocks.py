"""Channels filled up to the blocks of ONNX Runtime's kernels: same numbers, other operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.model.quantized_layer import QuantizedLayer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::subbyte.export.onnx.ExportWarning", "ignore::ResourceWarning")


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


class Chain(nn.Module):
    """A first layer of three channels, a depthwise one of 24 that it alone feeds and a dense one alone reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.pointwise, self.head = conv(3, 24), conv(24, 24, groups=24), conv(24, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depthwise(F.relu6(self.stem(x))))
        return self.head(F.relu(self.pointwise(x)).mean((2, 3)))


class Shared(nn.Module):
    """The depthwise layer's input is read by a sum too, and so is its output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.after, self.head = conv(5, 20), conv(20, 20, groups=20), conv(20, 18, 3), nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.relu(self.depthwise(x))
        return self.head(F.relu(self.after(x)).mean((2, 3)))


class Twice(nn.Module):
    """A layer that is called twice is nobody's to widen; two layers of different needs read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.depthwise, self.dense = conv(3, 18), conv(18, 18, 1), conv(18, 18, groups=18), conv(18, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.again(F.relu(self.stem(x))))))
        return torch.cat([F.relu(self.depthwise(x)), F.relu(self.dense(x))], 1).mean((2, 3))


class Ends(nn.Module):
    """Depthwise layers behind each other; the last one's output is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(6, 6, groups=6), conv(6, 6, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


NETS = {  # net -> channels of its input; operators of the file that are there for the blocks; group counts of its convolutions
    Chain: (3, {"Pad": 1, "Slice": 0}, [1, 32, 1]),
    Shared: (5, {"Pad": 2, "Slice": 1}, [1, 32, 1]),
    Twice: (3, {"Pad": 2, "Slice": 1}, [1, 1, 1, 32, 1]),
    Ends: (6, {"Pad": 2, "Slice": 2}, [16, 16]),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("bits", [(4, 8), (3, 4)])
def test_the_file_computes_what_the_simulation_computes(net: type[nn.Module], bits: tuple[int, int], tmp_path: Path) -> None:
    channels, operators, groups = NETS[net]
    torch.manual_seed(0)
    data = torch.randn(32, channels, 10, 10)
    result = subbyte.quantize(net().eval(), data, widths=subbyte.Widths(*bits), recipe=subbyte.rounding())
    done = result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert done.verification.float_layers == ()
    expected = done.simulation(data).detach().numpy()
    for optimized in (False, True):
        found = subbyte.OnnxRuntimeCPU().open((tmp_path / "m.onnx").read_bytes(), optimized=optimized, threads=1)([data.numpy()])[0]
        assert np.abs(found - expected).max() <= 1.01 * np.ptp(expected) / 255
    graph = onnx.load(tmp_path / "m.onnx").graph
    found_operators = Counter(node.op_type for node in graph.node)
    assert {name: found_operators[name] for name in operators} == operators
    given = [{attribute.name: attribute.i for attribute in node.attribute} for node in graph.node if node.op_type == "Conv"]
    assert sorted(node.get("group", 1) for node in given) == sorted(groups)


def test_affine_weights_of_8_bits_have_no_such_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.randn(32, 3, 10, 10)
    result = subbyte.quantize(Chain().eval(), data, widths=subbyte.Widths(8, 8), recipe=subbyte.rounding())
    for layer in result.model.modules():
        if isinstance(layer, QuantizedLayer):
            state, middle = layer.state(), 128
            zeros = torch.full_like(state.zero_point, middle)
            layer.assign_(replace(state, codes=state.codes + middle, zero_point=zeros, weight_grid=subbyte.Grid(8)))
    result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert not {"Pad", "Slice"} & {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}


def test_other_targets_keep_their_channels(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    data = torch.randn(32, 3, 10, 10)
    result = subbyte.quantize(Chain().eval(), data, widths=subbyte.Widths(4, 8), recipe=subbyte.rounding())
    result.export_onnx(tmp_path / "m.onnx", subbyte.OpenVINOCPU(), threads=1)
    assert "Pad" not in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}

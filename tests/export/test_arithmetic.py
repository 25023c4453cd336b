"""The simulation rounds as the kernels of ONNX Runtime do, to the last bit: on many random sums of codes."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.export.arithmetic import OnnxRuntimeArithmetic, OpenVINOArithmetic
from subbyte.export.markers import TensorGrid

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::subbyte.ExportWarning")


class Wide(nn.Module):
    """Three convolutions of many channels, one depthwise, and a sum; the classes are means over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.second, self.last = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 32, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(x))
        x = torch.relu(x + self.second(torch.relu(self.depthwise(x))))
        return torch.relu(self.last(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_network_is_simulated_to_the_last_bit(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest())
    result = subbyte.quantize(Wide(), torch.randn(32, 3, 16, 16), widths=subbyte.Widths(bits, 8), recipe=recipe)
    done = result.export_onnx(tmp_path / "m.onnx", threads=1)
    x = torch.randn(512, 3, 16, 16)
    run = subbyte.OnnxRuntimeCPU().open((tmp_path / "m.onnx").read_bytes(), optimized=True, threads=1)
    np.testing.assert_allclose(run([x.numpy()])[0], done.simulation(x).detach().numpy(), rtol=0, atol=1e-5)  # 29 million codes


def test_rounding_is_in_float32_with_ties_to_even() -> None:
    grid, unit = TensorGrid(0.1, 0, 0, 255), torch.tensor([0.05])
    codes = OnnxRuntimeArithmetic().of_convolution(torch.tensor([[1.0, 3.0, 5.0, 600.0]]).double(), torch.zeros(1).double(), unit, grid)
    assert codes.tolist() == [[0.0, 2.0, 2.0, 255.0]]


def test_a_fused_sum_takes_what_is_not_rounded() -> None:
    inner, grid, unit = TensorGrid(0.5, 128, 0, 255), TensorGrid(0.25, 0, 0, 255), torch.tensor([0.1])
    arithmetic, sums, none = OpenVINOArithmetic(), torch.tensor([[13.0]]).double(), torch.zeros(1).double()
    codes = [arithmetic.of_convolution(sums, none, unit, inner, rounded=rounded).double() for rounded in (False, True)]
    zero = (none, TensorGrid(0.25, 0, 0, 255))
    assert [float(arithmetic.of_sum((code, inner), zero, grid)) for code in codes] == [5.0, 6.0]


def test_openvino_multiplies_by_a_quotient_that_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "studies")
    multiplier = importlib.import_module("openvino_multiplier")
    generator = np.random.default_rng(1)
    assert [multiplier.distance(generator) for _ in range(12)] == [0] * 12

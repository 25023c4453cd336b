"""Kernels that cut off large sums: found by asking, gone round by UINT8 weights, named where they cannot be."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte.export.targets import Run

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
from subbyte.export.saturation import saturates  # noqa: E402 - needs onnx

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CUT_OFF = "cut off large sums of weights of 8 bits"


class Sums(nn.Module):
    """Sums of large products of one sign, of convolutions of every kind, a transposed one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(18, 18, 3, groups=18)
        self.pointwise, self.upwards, self.head = nn.Conv2d(18, 16, 1), nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2), nn.Linear(8, 4)
        with torch.no_grad():
            for weight in (parameter for parameter in self.parameters() if parameter.dim() > 1):
                weight.copy_(weight.abs().clamp(min=0.8 * float(weight.abs().max())))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(torch.relu(self.depthwise(torch.relu(self.first(x)))))
        return self.head(torch.relu(self.upwards(torch.relu(x))).mean((2, 3)))


def files(folder: Path, targets: list[subbyte.Target], **widths: int) -> list[subbyte.Exported]:
    """One quantized model, exported for several targets; its warnings are in what is returned."""
    torch.manual_seed(0)
    result = subbyte.quantize(Sums(), torch.rand(32, 3, 8, 8), widths=subbyte.Widths(**widths), recipe=subbyte.rounding())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", subbyte.ExportWarning)
        return [result.export_onnx(folder / f"{at}.onnx", target, threads=1, allow_float=True) for at, target in enumerate(targets)]


def largest(exported: subbyte.Exported) -> float:
    return max(check.largest_steps for check in exported.verification.checks)


@dataclass(frozen=True)
class Answering(subbyte.OnnxRuntimeCPU):
    """A runtime in which every sum comes out as the same number."""

    value: int = 0
    asked = []

    def open(self, content: bytes, *, optimized: bool, threads: int) -> Run:
        onnx.checker.check_model(onnx.load_from_string(content))
        self.asked.append(optimized)
        return lambda inputs: [np.full_like(inputs[0], self.value)]


@pytest.mark.parametrize(("value", "lost"), [(255, False), (254, False), (129, True)])
def test_a_processor_is_asked_once(value: int, lost: bool) -> None:
    Answering.asked.clear()
    assert [saturates(Answering(value=value)) for _ in range(2)] == [lost] * 2 and Answering.asked == [True]
    assert Answering(value=value).layout.unsigned_weights is lost and Answering.asked == [True]


def test_layouts_are_for_the_processor_here_or_the_one_that_is_named() -> None:
    assert subbyte.OnnxRuntimeCPU().layout.unsigned_weights is saturates(subbyte.OnnxRuntimeCPU())
    assert [subbyte.OnnxRuntimeCPU(saturates=lost).layout.unsigned_weights for lost in (True, False)] == [True, False]


def test_unsigned_weights_are_the_same_numbers_on_every_processor(tmp_path: Path) -> None:
    unsigned, signed = files(tmp_path, [subbyte.OnnxRuntimeCPU(saturates=True), subbyte.OnnxRuntimeCPU(saturates=False)], weight_bits=8)
    lost = saturates(subbyte.OnnxRuntimeCPU())
    assert largest(unsigned) < 0.1 and not any(CUT_OFF in text for text in unsigned.warnings)
    assert unsigned.verification.float_layers == signed.verification.float_layers == ("upwards",)  # has no int8 kernel
    assert (largest(signed) > 1.0) is lost and any(CUT_OFF in text for text in signed.warnings) is lost
    x = torch.rand(8, 3, 8, 8)
    assert torch.equal(unsigned.simulation(x), signed.simulation(x))
    kinds, sizes = onnx.TensorProto.DataType, {}
    for at in (0, 1):
        weights = [tensor for tensor in onnx.load(tmp_path / f"{at}.onnx").graph.initializer if len(tensor.dims) == 4]
        sizes[at] = {kind: sum(tensor.data_type == kind for tensor in weights) for kind in (kinds.UINT8, kinds.INT8)}
    assert sizes == {0: {kinds.UINT8: 3, kinds.INT8: 1}, 1: {kinds.UINT8: 0, kinds.INT8: 4}}


def test_narrower_weights_are_never_cut_off(tmp_path: Path) -> None:
    targets = [subbyte.OnnxRuntimeCPU(saturates=True), subbyte.OnnxRuntimeCPU(saturates=False)]
    one, other = files(tmp_path, targets, weight_bits=7)
    assert max(largest(one), largest(other)) < 0.1 and (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def test_openvino_says_what_it_cuts_off(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (done,) = files(tmp_path, [subbyte.OpenVINOCPU()], weight_bits=8)
    (told,) = [text for text in done.warnings if CUT_OFF in text] or [""]
    assert bool(told) is saturates(subbyte.OpenVINOCPU()) and ("first" in told) is bool(told)


def test_openvino_computes_unsigned_weights_in_floating_point(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from subbyte.export.runtimes import _compiled

    if not saturates(subbyte.OpenVINOCPU()):
        pytest.skip("this processor loses no sums")
    files(tmp_path, [subbyte.OnnxRuntimeCPU()], weight_bits=8)
    told = [
        node.get_rt_info()
        for node in _compiled((tmp_path / "0.onnx").read_bytes(), optimized=True, threads=1).get_runtime_model().get_ops()
    ]
    assert {info["runtimePrecision"].value for info in told if info["layerType"].value == "Convolution"} == {"f32"}


def test_affine_weights_of_transposed_convolutions_keep_their_zero_points(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.ReLU()).eval()
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), symmetric_weights=False)
    result = subbyte.quantize(model, torch.randn(32, 4, 6, 6), widths=subbyte.Widths(8), recipe=recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", subbyte.ExportWarning)
        assert largest(result.export_onnx(tmp_path / "a.onnx", threads=1, allow_float=True)) < 0.1

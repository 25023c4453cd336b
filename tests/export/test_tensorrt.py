"""Files for TensorRT, as far as they can be checked without it: their form by its documentation, their numbers in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte import LayerError, OptionError, TensorRT, Widths

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SYMMETRIC = replace(subbyte.rounding(), symmetric_weights=True)  # as INT4 has to be
pytestmark = pytest.mark.filterwarnings("ignore::subbyte.export.onnx.ExportWarning", "ignore::ResourceWarning")
KINDS = onnx.TensorProto


class Net(nn.Module):
    """Two residual sums, one of them with a convolution on both sides, padding, pooling, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.down, self.short = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(8, 12, 1, stride=2)
        self.last = nn.Linear(12, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(F.pad(x, (0, 2, 2, 0))))
        x = F.relu(self.two(F.relu(self.one(x))) + x)
        x = F.relu(self.down(x) + self.short(x))
        return self.last(F.max_pool2d(x, 2).mean((2, 3)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[subbyte.Result, subbyte.Exported, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tensorrt") / "m.onnx"
    result = subbyte.quantize(Net(), torch.randn(64, 3, 8, 8), widths=Widths(8, 8, pinned={"one": (3, 8)}), recipe=subbyte.rounding())
    return result, result.export_onnx(path, TensorRT(), threads=1), path


def test_every_code_is_signed_and_every_zero_point_zero(exported: tuple[subbyte.Result, subbyte.Exported, Path]) -> None:
    file = onnx.load(exported[2])
    onnx.checker.check_model(file, full_check=True)
    constants = {tensor.name: tensor for tensor in file.graph.initializer}
    assert not {KINDS.UINT8, KINDS.INT32} & {tensor.data_type for tensor in constants.values()}
    pairs = [node for node in file.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {node.op_type for node in file.graph.node} <= {
        *("QuantizeLinear", "DequantizeLinear", "Conv", "Gemm", "Relu", "Clip", "Add", "Pad", "MaxPool", "ReduceMean")
    }
    for node in pairs:
        for name in node.input[2:]:
            assert not onnx.numpy_helper.to_array(constants[name]).any() and constants[name].data_type == KINDS.INT8
    weights = [node for node in pairs if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    assert len(weights) == 6 and all(constants[node.input[1]].dims for node in weights)  # one scale for each channel


def test_residual_sums_have_one_quantised_side_and_outputs_of_convolutions_none(
    exported: tuple[subbyte.Result, subbyte.Exported, Path],
) -> None:
    graph = onnx.load(exported[2]).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    sums = [sorted(makers[name] for name in node.input) for node in graph.node if node.op_type == "Add"]
    assert sums == [["Conv", "DequantizeLinear"]] * 2
    quantised = [makers.get(node.input[0], "input") for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantised.count("Conv") == 1  # the shortcut, on the other side of a sum
    assert exported[1].quantizers == 2


def test_the_file_computes_what_its_simulation_computes(exported: tuple[subbyte.Result, subbyte.Exported, Path]) -> None:
    result, done, path = exported
    x = torch.randn(64, 3, 8, 8)
    expected = done.simulation(x).detach().numpy()
    span = expected.max() - expected.min()
    for target in (TensorRT(), subbyte.OnnxRuntimeCPU()):  # also where ONNX Runtime takes its int8 kernels
        (found,) = target.open(path.read_bytes(), optimized=True, threads=1)([x.numpy()])
        assert np.abs(found - expected).max() / span * 255 <= 1.0
    assert done.loss <= 2.0 * done.model_loss + 1e-3  # symmetric inputs have a step twice as large behind a ReLU
    assert set(done.verification.kernels.values()) == {"Conv, INT8", "Gemm, INT8"}
    assert "there is no TensorRT here" in str(done) and "faster" not in str(done)


def test_linear_weights_of_4_bits_are_int4_in_blocks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    result = subbyte.quantize(model, torch.randn(64, 6, 128), widths=Widths(4, None, pinned={"2": (8, 8)}), recipe=SYMMETRIC)
    done = result.export_onnx(tmp_path / "m.onnx", TensorRT(), threads=1)
    assert done.verification.kernels == {"0": "MatMul, INT4 weights", "2": "MatMul, INT8"}
    (codes,) = [tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer if tensor.data_type == KINDS.INT4]
    assert list(codes.dims) == [128, 24] and len(codes.raw_data) == 128 * 24 // 2
    assert max(check.largest_steps for check in done.verification.checks) <= 1.0
    assert done.loss == pytest.approx(done.model_loss, rel=0.3)


@pytest.mark.parametrize(
    ("widths", "symmetric", "layer"),
    [
        (Widths(8, 8, pinned={"0": (8, 4)}), True, "0"),  # codes of 4 bits need a clip
        (Widths(8, 8, pinned={"2": (4, None)}), True, "2"),  # no INT4 in convolutions
        (Widths(4, None), False, "0"),  # no zero-points in INT4
    ],
    ids=["narrow input", "INT4 convolution", "affine weights"],
)
def test_what_it_has_no_kernel_for_is_an_error(widths: Widths, symmetric: bool, layer: str, tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    model = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)) if symmetric else linear).eval()
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), symmetric_weights=symmetric)
    result = subbyte.quantize(model, torch.randn(16, 3, 8, 8) if symmetric else torch.randn(16, 64), widths=widths, recipe=recipe)
    with pytest.raises(LayerError, match=f"layer '{layer}': does not run in int8 in TensorRT"):
        result.export_onnx(tmp_path / "m.onnx", TensorRT(), threads=1)


def test_nothing_is_timed_or_required_to_be_faster(tmp_path: Path) -> None:
    result = subbyte.quantize(nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(16, 4), recipe=subbyte.rounding())
    with pytest.raises(OptionError, match="TensorRT cannot be run here"):
        result.export_onnx(tmp_path / "m.onnx", TensorRT(), require_faster=True)
    with pytest.raises(OptionError, match="TensorRT cannot be run here"):
        subbyte.Budget(latency=1.0, target=TensorRT())
    assert subbyte.Choices((4, 8)).within(TensorRT().options(), "TensorRT").of(["fc"]) == {"fc": ((4, 8), (8, 8))}
    weights = subbyte.Choices(activation_bits=(None,)).within(TensorRT().options(), "TensorRT")
    assert weights.of(["fc"]) == {"fc": ((4, None),)}

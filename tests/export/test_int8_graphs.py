"""What is rearranged so that ONNX Runtime's int8 kernels have less to do: same numbers, other operators."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.export.layout import Layout

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::subbyte.export.onnx.ExportWarning", "ignore::ResourceWarning")


class Mean(nn.Module):
    """A large mean over all positions, with or without the dimensions that it drops, and perhaps another reader of what it reads."""

    def __init__(self, outputs: int = 256, *, keeps: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.keeps, self.shared = keeps, shared
        self.stem, self.head = nn.Conv2d(3, outputs, 1), nn.Conv2d(outputs, 8, 1) if shared else None
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        x = F.relu(self.stem(x))
        mean = F.adaptive_avg_pool2d(x, 1) if self.keeps else x.mean((2, 3))
        return mean if self.head is None else (mean, self.head(x).amax((2, 3)))


class Signed(Mean):
    """A mean of numbers of either sign."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).mean((2, 3))


class Rows(Mean):
    """A mean over some positions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.stem(x)).mean(3)


@dataclasses.dataclass(frozen=True)
class AsTraced(subbyte.OnnxRuntimeCPU):
    """ONNX Runtime with means as they were traced."""

    @property
    def layout(self) -> Layout:
        return dataclasses.replace(super().layout, channels_last=False)


class Pooled(nn.Module):
    """Max-pooling of a concatenation along some dimension, which something else may read too."""

    def __init__(self, dim: int = 1, *, shared: bool = False) -> None:
        super().__init__()
        self.dim, self.shared = dim, shared
        self.left, self.right, self.after = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(16 if dim == 1 else 8, 8, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], self.dim)
        pooled = self.after(F.max_pool2d(both, 3, 2, ceil_mode=True))
        return pooled.mean((2, 3)) + both.sum((1, 2, 3))[:, None] if self.shared else pooled.mean((2, 3))


def exported(net: nn.Module, data: Tensor, folder: Path, target: subbyte.Target | None = None) -> list[str]:
    """Operators of the net's file, which was seen to compute what its simulation computes."""
    result = subbyte.quantize(net, data, widths=subbyte.Widths(4, 8), recipe=subbyte.rounding())
    done = result.export_onnx(folder / "m.onnx", target or subbyte.OnnxRuntimeCPU(), threads=1)
    assert done.verification.float_layers == ()
    content = (folder / "m.onnx").read_bytes()
    with torch.no_grad():
        expected = done.simulation(data)
    for optimized in (False, True):
        found = subbyte.OnnxRuntimeCPU().open(content, optimized=optimized, threads=1)([data.numpy()])
        for a, b in zip(found, (expected,) if isinstance(expected, Tensor) else expected, strict=True):
            assert a.shape == tuple(b.shape)
            assert np.abs(a - b.numpy()).max() <= 1.01 * np.ptp(b.numpy()) / 255
    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def optimized_operators(content: bytes, folder: Path) -> list[str]:
    """Operators that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_large_mean_sums_codes_with_channels_last(tmp_path: Path, *, keeps: bool, shared: bool) -> None:
    torch.manual_seed(0)
    operators = exported(Mean(keeps=keeps, shared=shared), torch.randn(16, 3, 16, 16), tmp_path)
    assert [operators.count(name) for name in ("Transpose", "MatMulInteger", "ReduceMean")] == [1, 1, 0]


def test_a_mean_of_codes_with_a_zero_point_is_the_same_in_every_runtime(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    data = torch.randn(16, 3, 16, 16)
    operators = exported(Signed(), data, tmp_path)
    assert (operators.count("MatMulInteger"), operators.count("Sub")) == (1, 2)  # the other one is the weights' zero-points
    content = (tmp_path / "m.onnx").read_bytes()
    targets = (subbyte.OnnxRuntimeCPU(), subbyte.OpenVINOCPU())
    first, second = (target.open(content, optimized=True, threads=1)([data.numpy()])[0] for target in targets)
    assert np.abs(first - second).max() < 0.02 * np.abs(first).max() and first.min() < 0 < first.max()


def test_onnxruntime_turns_nothing_round_in_front_of_a_large_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, left = torch.randn(16, 3, 16, 16), {}
    for target in (subbyte.OnnxRuntimeCPU(), AsTraced()):
        exported(Mean(), data, tmp_path, target)
        left[target.name] = optimized_operators((tmp_path / "m.onnx").read_bytes(), tmp_path).count("Transpose")
    assert left == {"OnnxRuntimeCPU": 1, "AsTraced": 2}  # the other one turns the input


def test_a_small_mean_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert "Transpose" not in exported(Mean(16), torch.randn(16, 3, 16, 16), tmp_path)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_small_mean_that_is_quantised_is_pooled_in_int8(tmp_path: Path, *, keeps: bool) -> None:
    class Classifier(Mean):
        """A mean, and a linear layer that reads it."""

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x).flatten(1))

    net = Classifier(16, keeps=keeps)
    net.last = nn.Linear(16, 4)
    torch.manual_seed(0)
    operators = exported(net.eval(), torch.randn(16, 3, 16, 16), tmp_path)
    assert (operators.count("GlobalAveragePool"), operators.count("ReduceMean")) == (1, 0)
    optimized = optimized_operators((tmp_path / "m.onnx").read_bytes(), tmp_path)
    assert "QLinearGlobalAveragePool" in optimized and "DequantizeLinear" not in optimized[:-1]


def test_a_mean_over_some_positions_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert "Transpose" not in exported(Rows(), torch.randn(16, 3, 16, 16), tmp_path)


def test_openvino_reads_the_file_too(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    data = torch.randn(16, 3, 16, 16)
    exported(Mean(keeps=True), data, tmp_path)
    content = (tmp_path / "m.onnx").read_bytes()
    found = subbyte.OpenVINOCPU().open(content, optimized=True, threads=1)([data.numpy()])[0]
    expected = subbyte.OnnxRuntimeCPU().open(content, optimized=True, threads=1)([data.numpy()])[0]
    assert np.abs(found - expected).max() <= 1.01 * np.ptp(expected) / 255


@pytest.mark.parametrize(("dim", "shared", "pools"), [(1, False, 2), (1, True, 1), (2, False, 1), (3, False, 1)])
def test_max_pooling_goes_in_front_of_a_concatenation_of_channels(tmp_path: Path, dim: int, pools: int, *, shared: bool) -> None:
    torch.manual_seed(0)
    operators = exported(Pooled(dim, shared=shared), torch.randn(16, 4, 9, 9), tmp_path)
    assert operators.count("MaxPool") == pools
    assert (operators.index("Concat") > operators.index("MaxPool")) is (pools == 2)


class Siblings(nn.Module):
    """Linear layers that read the same tensor, through steps of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


def test_what_several_layers_read_is_quantised_once(tmp_path: Path) -> None:
    samples = torch.randn(16, 6, 16, generator=torch.Generator().manual_seed(0))
    result = subbyte.quantize(Siblings(), samples, widths=subbyte.Widths(4, 8), recipe=subbyte.rounding())
    for name, shrunk in (("query", 0.97), ("key", 0.99), ("value", 1.0)):
        layer = result.model.get_submodule(name)
        assert isinstance(layer.activation_scale, Tensor)
        layer.activation_scale = layer.activation_scale * shrunk
    exported = result.export_onnx(tmp_path / "model.onnx", threads=1)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert [node.op_type for node in nodes].count("QuantizeLinear") == 1
    assert all(check.largest_steps <= 1.0 for check in exported.verification.checks)


def test_what_lies_between_layers_is_quantised_whatever_the_inputs_are_called(tmp_path: Path) -> None:
    class Named(Siblings):
        """Two inputs, given by name, in either order."""

        def forward(self, x: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * gain)

    batches = [{"gain": torch.ones(8, 6, 1), "x": torch.randn(8, 6, 16)}, {"x": torch.randn(8, 6, 16), "gain": torch.ones(8, 6, 1)}]
    result = subbyte.quantize(Named(), batches, widths=subbyte.Widths(4, 8), recipe=subbyte.rounding())
    result.model.query.activation_scale = result.model.query.activation_scale * 0.98
    exported = result.export_onnx(tmp_path / "model.onnx", threads=1)
    assert all(check.largest_steps <= 1.0 for check in exported.verification.checks)


class DistanceBias(nn.Module):
    """Attention whose bias is made of the distances between positions by layers of their own, as in Swin V2: these see no input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.queries, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bias = nn.Sequential(nn.Linear(2, 16), nn.ReLU(inplace=True), nn.Linear(16, 1))
        self.register_buffer("distances", torch.linspace(-1, 1, 72).view(6, 6, 2))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights = (self.queries(x) @ x.mT + 4 * self.bias(self.distances)[..., 0]).softmax(dim=-1)
        return self.head((weights @ x).mean(1))


@pytest.mark.parametrize("target", [subbyte.OnnxRuntimeCPU(), subbyte.OpenVINOCPU()], ids=lambda target: target.name)
def test_layers_that_see_no_input_are_constants_of_the_file(target: subbyte.Target, tmp_path: Path) -> None:
    if isinstance(target, subbyte.OpenVINOCPU):
        pytest.importorskip("openvino")
    torch.manual_seed(1)
    result = subbyte.quantize(DistanceBias(), torch.randn(64, 6, 4), widths=subbyte.Widths(4, 8))
    exported = result.export_onnx(tmp_path / "m.onnx", target)
    kernels = exported.verification.kernels
    assert {name for name, kernel in kernels.items() if kernel == "constant"} == {"bias.0", "bias.2"}
    assert not exported.verification.float_layers
    assert all(check.agreement == 100.0 for check in exported.verification.checks)


class Backwards(nn.Module):
    """Rows are turned round, which takes a copy in memory, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8 * 4, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(1, 2)
        return self.second(x.reshape(x.shape[0], 32))


def test_a_copy_in_memory_that_goes_takes_no_view_with_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    result = subbyte.quantize(Backwards(), torch.randn(64, 4, 6), widths=subbyte.Widths(4, 8))
    assert all(check.agreement == 100.0 for check in result.export_onnx(tmp_path / "m.onnx").verification.checks)

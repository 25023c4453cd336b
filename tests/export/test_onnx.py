"""The ONNX file computes what its simulation computes, in int8 kernels, with codes at their true width."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.calibrate.whole import Judge
from subbyte.export.kernels import KernelQuantizer
from subbyte.export.onnx import ExportWarning
from subbyte.model.quantized_layer import QuantizedLayer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
spec = importlib.util.spec_from_file_location("random_graphs", Path(__file__).with_name("random_graphs.py"))
assert spec is not None and spec.loader is not None
random_graphs = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = random_graphs
spec.loader.exec_module(random_graphs)

pytestmark = pytest.mark.filterwarnings("ignore::subbyte.export.onnx.ExportWarning", "ignore::ResourceWarning")
EIGHT = subbyte.Widths(8, 8)
MIXED = subbyte.Widths(4, 8, pinned={"first": 8, "second": (3, 8), "fourth": (2, 8)})
RUNTIME = subbyte.OnnxRuntimeCPU()


class Residual(nn.Module):
    """Sums, concatenation, max-pooling, a shortcut padded by channels, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fourth = nn.Conv2d(16, 8, 1)
        self.fifth = nn.Conv2d(24, 12, 1)
        self.last = nn.Linear(12, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x) + x)
        x = F.relu6(self.third(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        x = torch.cat([x, F.relu(self.fourth(x))], dim=1)
        return self.last(F.relu(self.fifth(F.max_pool2d(x, 2))).mean((2, 3)))


def exported(model: nn.Module, data: Tensor, path: Path, **options: object) -> tuple[subbyte.Result, subbyte.Exported]:
    widths = options.pop("widths", EIGHT)
    result = subbyte.quantize(model, data, widths=widths, recipe=subbyte.rounding())  # type: ignore[arg-type]
    return result, result.export_onnx(path, threads=1, **options)  # type: ignore[arg-type]


def run(path: Path, *inputs: Tensor, target: subbyte.Target = RUNTIME, optimized: bool = True) -> list[np.ndarray]:
    opened = target.open(path.read_bytes(), optimized=optimized, threads=1)
    return list(opened([x.numpy() for x in inputs]))


def steps_between(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference in 255ths of what is expected's span."""
    return float(np.abs(found - expected).max() / (expected.max() - expected.min()) * 255)


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


def test_random_networks_compute_what_their_simulation_computes(tmp_path: Path) -> None:
    result, samples = random_graphs.quantized_nets(0, 20)
    done = result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert done.verification.float_layers == ()
    expected = [output.detach().numpy() for output in done.simulation(*samples)]
    for optimized in (False, True):
        found = run(tmp_path / "m.onnx", *samples, optimized=optimized)
        assert max(steps_between(a, b) for a, b in zip(found, expected, strict=True)) <= 1.0 + 1e-3


@pytest.mark.parametrize(("symmetric", "activation_bits"), [(False, 8), (True, 4)])
def test_affine_weights_and_narrow_inputs_stay_in_int8(symmetric: bool, activation_bits: int, tmp_path: Path) -> None:
    result, samples = random_graphs.quantized_nets(900, 4, symmetric=symmetric, activation_bits=activation_bits)
    done = result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert done.verification.float_layers == ()
    expected = [output.detach().numpy() for output in done.simulation(*samples)]
    found = run(tmp_path / "m.onnx", *samples)
    assert max(steps_between(a, b) for a, b in zip(found, expected, strict=True)) <= 1.0 + 1e-3


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[subbyte.Result, subbyte.Exported, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (*exported(Residual(), torch.randn(64, 3, 8, 8), path, widths=MIXED), path)


def test_every_layer_runs_in_int8(residual: tuple[subbyte.Result, subbyte.Exported, Path]) -> None:
    result, done, _ = residual
    kernels = done.verification.kernels
    assert list(kernels) == layers_of(result.model)
    assert kernels == dict.fromkeys(["first", "second", "third", "fourth", "fifth"], "QLinearConv") | {"last": "QGemm"}


def test_sums_and_concatenations_run_in_int8(residual: tuple[subbyte.Result, subbyte.Exported, Path], tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "o.onnx"), 3
    onnxruntime.InferenceSession(str(residual[2]), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    assert kinds.count("QLinearAdd") == 2 and kinds.count("QLinearConcat") == 1
    assert not {"Conv", "Add", "Concat", "Gemm"} & set(kinds)


def test_the_file_has_standard_operators_only(residual: tuple[subbyte.Result, subbyte.Exported, Path]) -> None:
    model = onnx.load(residual[2])
    onnx.checker.check_model(model, full_check=True)
    assert [entry.domain for entry in model.opset_import] == [""] and not model.functions


def test_codes_take_their_true_width(residual: tuple[subbyte.Result, subbyte.Exported, Path]) -> None:
    result, done, path = residual
    kinds = onnx.TensorProto.DataType
    stored = dict.fromkeys([kinds.INT8, kinds.INT4, kinds.UINT8], 0) | {tensor.data_type: 0 for tensor in onnx.load(path).graph.initializer}
    for tensor in onnx.load(path).graph.initializer:
        stored[tensor.data_type] += len(tensor.raw_data)
    first = 8 * 3 * 9  # 8 bits
    unsigned = subbyte.OnnxRuntimeCPU().layout.unsigned_weights
    assert stored[kinds.INT8] == (0 if unsigned else first) + 5  # and the zero-points that QGemm asks for
    codes = {4: 16 * 8 * 9 + 12 * 24 + 5 * 12, 3: 8 * 4 * 9, 2: 8 * 16}
    zero_points = {4: 16 + 12 + 5, 3: 8, 2: 8}
    narrow = sum(bits * (codes[bits] + zero_points[bits]) for bits in codes) / 8
    assert stored[kinds.INT4] == 0
    assert narrow <= stored[kinds.UINT8] - (first + 8 if unsigned else 0) <= narrow + 8 + 3 * 8  # of the input, and to whole bytes
    assert done.verification.size_bytes == path.stat().st_size


def test_codes_of_4_bits_without_zero_points_are_int4(tmp_path: Path) -> None:
    recipe = replace(subbyte.rounding(), symmetric_weights=True)
    result = subbyte.quantize(Residual(), torch.randn(16, 3, 8, 8), widths=MIXED, recipe=recipe)
    result.export_onnx(tmp_path / "m.onnx", threads=1)
    kind = onnx.TensorProto.INT4
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer if tensor.data_type == kind)
    assert stored == (16 * 8 * 9 + 12 * 24 + 5 * 12) // 2


def test_the_number_of_samples_is_open(residual: tuple[subbyte.Result, subbyte.Exported, Path]) -> None:
    x = torch.randn(5, 3, 8, 8)
    whole = run(residual[2], x)[0]
    parts = [run(residual[2], x[index : index + 1])[0] for index in range(5)]
    assert np.allclose(whole, np.concatenate(parts), atol=1e-5)


def test_the_simulation_is_near_the_model_and_the_float_model(residual: tuple[subbyte.Result, subbyte.Exported, Path]) -> None:
    result, done, _ = residual
    assert done.quantizers >= 2
    assert done.loss <= 1.5 * done.model_loss + 1e-3
    held_out = Judge.of(result.original, result.calibration, result.recipe.loss).loss_of(result.model)
    assert done.model_loss == pytest.approx(held_out)


def test_openvino_reads_the_same_file(tmp_path: Path) -> None:
    """Exports for both runtimes, compares the files, and what OpenVINO computes with the simulation."""
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    result, made = exported(Residual(), torch.randn(64, 3, 8, 8), tmp_path / "a.onnx", widths=MIXED)
    x = torch.randn(64, 3, 8, 8)
    found = run(tmp_path / "a.onnx", x, target=subbyte.OpenVINOCPU(), optimized=False)[0]
    assert steps_between(found, made.simulation(x).detach().numpy()) <= 6.0  # it rounds its sums otherwise
    done = result.export_onnx(tmp_path / "v.onnx", subbyte.OpenVINOCPU(), threads=1)
    assert steps_between(found, done.simulation(x).detach().numpy()) <= 6.0  # averages and sums of joined tensors have their own ways
    assert done.verification.float_layers == ()
    result.export_onnx(tmp_path / "s.onnx", subbyte.OnnxRuntimeCPU(saturates=False), threads=1)
    assert (tmp_path / "s.onnx").read_bytes() == (tmp_path / "v.onnx").read_bytes()
    chain = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU6(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU(), nn.Conv2d(32, 16, 1))
    result, _ = exported(chain.eval(), x, tmp_path / "c.onnx", widths=subbyte.Widths(4, 8))
    done = result.export_onnx(tmp_path / "c.onnx", subbyte.OpenVINOCPU(), threads=1)
    found = run(tmp_path / "c.onnx", x.repeat(64, 1, 1, 1), target=subbyte.OpenVINOCPU(), optimized=False)[0]
    np.testing.assert_allclose(found, done.simulation(x.repeat(64, 1, 1, 1)).detach().numpy(), rtol=0, atol=1e-5)


def test_a_channel_that_is_all_but_dead_keeps_its_bias(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight[1] *= 1e-12
        conv.bias[1] = 3.0
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    _, done = exported(model, torch.randn(32, 3, 8, 8), tmp_path / "m.onnx")
    assert max(check.largest_steps for check in done.verification.checks) < 0.1
    assert done.loss < 1.1 * done.model_loss


def test_linear_layers_on_sequences(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    _, done = exported(model, torch.randn(32, 6, 8), tmp_path / "m.onnx", widths=subbyte.Widths(4, 8))
    assert set(done.verification.kernels.values()) == {"QGemm"} and done.quantizers == 0
    assert max(check.largest_steps for check in done.verification.checks) < 0.1


def test_a_layer_that_is_called_twice_is_stored_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 2)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.conv(F.relu(self.conv(x)))).mean((2, 3)))

    _, done = exported(Twice(), torch.randn(32, 16, 6, 6), tmp_path / "m.onnx")
    assert 16 * 16 * 9 < done.verification.size_bytes < 2 * 16 * 16 * 9
    assert done.verification.float_layers == ()


def test_what_cannot_run_in_int8_is_an_error_or_listed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)).eval()
    result = subbyte.quantize(model, torch.randn(16, 3, 6, 6), recipe=subbyte.rounding())
    with pytest.raises(subbyte.LayerError, match="layer '2': does not run in int8 in OnnxRuntimeCPU"):
        result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert not (tmp_path / "m.onnx").exists()
    done = result.export_onnx(tmp_path / "m.onnx", allow_float=True, threads=1)
    assert done.verification.float_layers == ("2",) and "in floating point: 2" in str(done)
    assert max(check.largest_steps for check in done.verification.checks) <= 1.0


def test_simulation_takes_float_inputs_and_affine_8_bit_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), symmetric_weights=False)
    result = subbyte.quantize(model, torch.randn(16, 3, 6, 6), widths=subbyte.Widths(8, 3, pinned={"0": (4, None)}), recipe=recipe)
    result.export_onnx(tmp_path / "m.onnx", subbyte.Simulation(), threads=1)
    x = torch.randn(8, 3, 6, 6)
    assert np.allclose(run(tmp_path / "m.onnx", x)[0], result.model(x).detach().numpy(), atol=1e-4)


def test_a_slow_file_is_a_warning_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subbyte.export.verify.in_turns", lambda runs, inputs, repeats: [[0.002], [0.001]])
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    result = subbyte.quantize(model, torch.randn(32, 4), recipe=subbyte.rounding())
    with pytest.warns(ExportWarning, match="not faster in OnnxRuntimeCPU: 2.000 ms a sample, float 1.000 ms"):
        done = result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert "WARNING: the file is not faster" in str(done)
    with pytest.raises(subbyte.ModelError, match="not faster.*nothing was written"):
        result.export_onnx(tmp_path / "n.onnx", require_faster=True, threads=1)
    assert not (tmp_path / "n.onnx").exists()


def test_a_model_that_cannot_be_traced_is_an_error(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x if float(x.sum()) > 0 else -x)

    result = subbyte.quantize(Branching(), torch.randn(32, 4), recipe=subbyte.rounding())
    with pytest.raises(subbyte.ModelError, match="torch.export cannot follow this Branching"):
        result.export_onnx(tmp_path / "m.onnx", threads=1)


def test_an_input_beside_the_middle_of_two_codes_is_rounded_as_the_runtime_rounds_it(tmp_path: Path) -> None:
    """In float32 its quotient by the step may be the very middle, where in float64 it is not."""
    model = nn.Sequential(nn.Linear(1, 2)).eval()
    _, done = exported(model, torch.linspace(-3.0, 3.9, 64)[:, None], tmp_path / "m.onnx")
    (quantizer,) = [module for module in done.simulation.modules() if isinstance(module, KernelQuantizer)]
    step = torch.tensor(quantizer.grid.scale)
    middles = (torch.arange(-100, 100) + 0.5).double().mul(step.double()).float()
    near = torch.cat([middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))])
    assert bool(((near / step).round() != (near.double() / step.double()).round()).any())
    expected = done.simulation(near[:, None]).detach().numpy()
    assert steps_between(run(tmp_path / "m.onnx", near[:, None], optimized=False)[0], expected) < 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_tables_and_linear_layers_with_their_weight_transposed(symmetric: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(nn.Embedding(50, 16), library.Conv1D(24, 16), nn.GELU(), library.Conv1D(8, 24)).eval()
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), symmetric_weights=symmetric)
    result = subbyte.quantize(model, torch.randint(0, 50, (32, 5)), widths=subbyte.Widths(3, 8), recipe=recipe)
    done = result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert done.verification.kernels == {"0": "Gather", "1": "QGemm", "3": "QGemm"}
    x = torch.randint(0, 50, (7, 5))
    found = run(tmp_path / "m.onnx", x)[0]
    assert steps_between(found, done.simulation(x).detach().numpy()) <= 1.0
    assert steps_between(found, result.model(x).detach().numpy()) <= 1.0


def test_a_table_is_stored_in_codes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(500, 16), nn.Linear(16, 4)).eval()
    _, done = exported(model, torch.randint(0, 500, (64, 3)), tmp_path / "m.onnx", widths=subbyte.Widths(4, 8))
    assert 500 * 12.5 < done.verification.size_bytes < 500 * 12.5 + 1500  # codes, one step and half a byte of zero-point a row


class Encoder(nn.Module):
    """Linear layers on vectors and on sequences of them; no width is a multiple of the group's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(36, 50), nn.Linear(50, 37, bias=False), nn.Linear(37, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.down(F.relu(self.up(x)))).mean(1))


def grouped_result(bits: int, *, symmetric: bool) -> tuple[subbyte.Result, Tensor]:
    torch.manual_seed(bits)
    x = torch.randn(64, 5, 36)
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), symmetric_weights=symmetric, weight_group=16)
    return subbyte.quantize(Encoder(), x, widths=subbyte.Widths(bits, None), recipe=recipe), x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_scales_of_column_groups_are_blocks(bits: int, symmetric: bool, tmp_path: Path) -> None:
    result, x = grouped_result(bits, symmetric=symmetric)
    done = result.export_onnx(tmp_path / "m.onnx", subbyte.Simulation(), threads=1)
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    blocks = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(blocks) == 3
    assert all({a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": 16} for node in blocks)
    expected = done.simulation(x).detach()
    torch.testing.assert_close(expected, result.model(x), rtol=1e-4, atol=1e-5)
    (plain,), (fast,) = (run(tmp_path / "m.onnx", x, optimized=optimized) for optimized in (False, True))
    np.testing.assert_allclose(plain, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(fast - expected.numpy()).max() < 0.05 * expected.abs().max()  # MatMulNBits rounds inputs to 8 bits


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_of_column_groups_become_matmulnbits(symmetric: bool, tmp_path: Path) -> None:
    import onnxruntime

    result, _ = grouped_result(4, symmetric=symmetric)
    result.export_onnx(tmp_path / "m.onnx", subbyte.Simulation(), threads=1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "o.onnx"), 3
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node].count("MatMulNBits") == 3
    kind = onnx.TensorProto.DataType.INT4 if symmetric else onnx.TensorProto.DataType.UINT4
    stored = [tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer if tensor.data_type == kind]
    scales = 0 if symmetric else sum(-(-o * k // 2) for o, k in ((50, 3), (37, 4), (3, 3)))
    assert sum(len(tensor.raw_data) for tensor in stored) == (36 * 50 + 50 * 37) // 2 + -(-37 * 3 // 2) + scales


@pytest.mark.parametrize("target", [subbyte.Simulation(), subbyte.OnnxRuntimeCPU()], ids=lambda target: target.name)
def test_column_groups_that_the_runtime_fails_on_are_refused(target: subbyte.Target, tmp_path: Path) -> None:
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), weight_group=16)
    result = subbyte.quantize(Encoder(), torch.randn(64, 5, 36), widths=subbyte.Widths(8, 8), recipe=recipe)
    with pytest.raises(subbyte.OptionError, match=r"fails on weights of 8 bits .* every 16 inputs .* as in 'up'; give it 4 bits"):
        result.export_onnx(tmp_path / "m.onnx", target, threads=1, allow_float=True)


def test_column_groups_have_no_int8_kernel_and_say_what_to_do(tmp_path: Path) -> None:
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), weight_group=16)
    result = subbyte.quantize(Encoder(), torch.randn(64, 5, 36), widths=subbyte.Widths(4, 8), recipe=recipe)
    with pytest.raises(subbyte.OptionError, match=r"no int8 kernel .* every 16 inputs, as in 'up'; quantize with weight_group=None"):
        result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert not (tmp_path / "m.onnx").exists()
    done = result.export_onnx(tmp_path / "m.onnx", threads=1, allow_float=True)
    assert set(done.verification.float_layers) == {"up", "down", "head"}
    x = torch.randn(4, 5, 36)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x, optimized=False)[0], done.simulation(x).detach().numpy(), rtol=1e-3, atol=1e-3)

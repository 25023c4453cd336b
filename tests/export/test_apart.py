"""Linear layers run in int8 whatever reads their outputs, and nothing changes in the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte

pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::subbyte.export.onnx.ExportWarning", "ignore::ResourceWarning")


class Layers(nn.Module):
    """Three linear layers and a norm, put together by a function."""

    def __init__(self, together: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4), nn.LayerNorm(12)
        self.together = together
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.together(self, x)


def residual(m: Layers, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(x + m.b(x).relu())


def two_readers(m: Layers, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(x.relu()) + m.c(m.b(x))


CASES: dict[str, Callable[[Layers, Tensor], Tensor]] = {
    "a residual sum": residual,
    "ReLU, then a norm": lambda m, x: m.c(m.norm(m.a(x).relu())),
    "ReLU6, then a number": lambda m, x: F.relu6(m.a(x)) * 0.3,
    "a clip that the next layer's input does not make": lambda m, x: m.c(F.hardtanh(m.a(x), -0.1, 0.2)),
    "a lower end alone": lambda m, x: m.a(x).clamp(max=0.1) * 2,
    "ReLU, then two readers": lambda m, x: (lambda y: m.c(y) + m.c(y.exp()))(m.a(x).relu()),
    "two layers, one behind a ReLU": two_readers,
}


@pytest.mark.parametrize("shape", [(64, 12), (64, 5, 12)], ids=["rows", "tokens"])
@pytest.mark.parametrize("together", CASES.values(), ids=CASES)
def test_every_layer_is_in_int8(together: Callable[[Layers, Tensor], Tensor], shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(2)
    result = subbyte.quantize(Layers(together), torch.randn(shape), widths=subbyte.Widths(4, 8))
    exported = result.export_onnx(tmp_path / "m.onnx")  # a layer in floating point would be an error
    assert set(exported.verification.kernels.values()) == {"QGemm"}
    assert all(check.largest_steps < 1.0 for check in exported.verification.checks)
    with torch.no_grad():
        x = torch.randn(shape)
        torch.testing.assert_close(exported.simulation(x), result.model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("shape", [(64, 12), (64, 5, 12)], ids=["rows", "tokens"])
def test_a_relu_that_the_next_layer_takes_in_needs_nothing(shape: tuple[int, ...], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(2)
    result = subbyte.quantize(Layers(lambda m, x: m.c(m.b(m.a(x).relu()))), torch.randn(shape), widths=subbyte.Widths(4, 8))
    result.export_onnx(tmp_path / "m.onnx")
    assert "Max" not in [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]

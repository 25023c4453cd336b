"""Times of layers: each geometry once, in the exporter's form, kept in the bank; what a budget makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import subbyte
from subbyte import Bank, Budget, Choices, LayerError, OnnxRuntimeCPU, OptionError, Profile, Timing
from subbyte.export.latency import LayerTime, layers_at
from subbyte.export.targets import Run, Simulation, Target
from subbyte.model.operators import Linear, operator_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::subbyte.export.onnx.ExportWarning", "ignore::ResourceWarning")
TIMING = Timing(threads=1)


def net() -> nn.Module:
    """Two layers that are alike, and another one."""
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


DATA = torch.randn(48, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def operators(content: bytes) -> list[str]:
    """What ONNX Runtime makes of a file."""
    import tempfile

    from subbyte.export.runtimes import _session

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "o.onnx"
        _session(content, optimized=True, threads=1, save_to=path)
        return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("module", "shape", "kinds"),
    [
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), (1, 4, 9, 9), ["QLinearConv"]),
        (nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 6, 6), ["QLinearConv"]),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 6), ["Pad", "QLinearConv", "Slice"]),
        (nn.Conv1d(4, 8, 3), (1, 4, 9), ["QLinearConv"]),
        (nn.Linear(16, 8), (1, 16), ["QuantizeLinear", "QGemm"]),
        (nn.Linear(16, 8), (1, 7, 16), ["QuantizeLinear", "Reshape", "QGemm", "Reshape"]),
    ],
    ids=["strided", "depthwise", "depthwise, filled up", "1d", "linear", "tokens"],
)
def test_a_layers_file_is_what_the_layer_is_in_a_whole_file(module: nn.Module, shape: tuple[int, ...], kinds: list[str]) -> None:
    from subbyte.export.layer_files import Geometry, float_file, quantized_files

    operator = operator_of(module)
    assert operator is not None and isinstance(module.weight, torch.Tensor)
    geometry = Geometry(operator, tuple(module.weight.shape), shape, module.weight.shape[0])
    files = quantized_files(geometry, ((2, 8), (4, 8), (8, 8)), OnnxRuntimeCPU(saturates=False))
    for file in files.values():
        assert operators(file.content) == kinds
        (found,) = OnnxRuntimeCPU().open(file.content, optimized=True, threads=1)([file.example])
        assert found.dtype == (np.float32 if isinstance(operator, Linear) else np.uint8)
    assert len({len(file.content) for file in files.values()}) == 3
    plain = float_file(geometry)
    (found,) = OnnxRuntimeCPU().open(plain.content, optimized=True, threads=1)([plain.example])
    assert found.dtype == np.float32 and plain.example.shape == shape


def test_affine_weights_run_in_int8_at_any_width() -> None:
    from subbyte.export.layer_files import Geometry, quantized_files

    module = nn.Conv2d(4, 8, 3)
    operator = operator_of(module)
    assert operator is not None
    files = quantized_files(Geometry(operator, (8, 4, 3, 3), (1, 4, 9, 9), 8), ((6, 8), (8, 8)), OnnxRuntimeCPU())
    assert [operators(file.content) for file in files.values()] == [["QLinearConv"]] * 2


@pytest.mark.parametrize("target", [OnnxRuntimeCPU(), subbyte.Simulation()], ids=lambda target: target.name)
def test_column_groups_are_timed_where_the_runtime_does_not_fail(target: Target) -> None:
    model, x = nn.Sequential(nn.Linear(32, 8)).eval(), torch.randn(8, 5, 32)
    timing = Timing(target, threads=1, weights=subbyte.WeightGrids(symmetric=True, group=16))
    assert list(subbyte.profile(model, x, timing, choices=Choices((4,), activation_bits=(8,))).seconds["0"]) == [(4, 8)]
    with pytest.raises(OptionError, match=r"layer '0' cannot be timed at \(8, 8\): .* every 16 inputs"):
        subbyte.profile(model, x, timing, choices=Choices((4, 8), activation_bits=(8,)))


def test_a_profile_of_other_weights_is_refused() -> None:
    given = Profile(TIMING, 1, "none", {}, {name: {(8, 8): LayerTime(1.0, 1.0)} for name in ("0", "2", "5")})
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), symmetric_weights=True)
    with pytest.raises(OptionError, match="profile is of weights on WeightGrids.symmetric=False"):
        subbyte.quantize(net(), DATA, budget=Budget(latency=9.0, seconds=given, choices=Choices((8,))), recipe=recipe)


@dataclass(frozen=True)
class Counting(OnnxRuntimeCPU):
    """ONNX Runtime, which tells what it opens."""

    opened = []

    def open(self, content: bytes, *, optimized: bool, threads: int) -> Run:
        self.opened.append(content)
        return super().open(content, optimized=optimized, threads=threads)


def test_layers_that_are_alike_are_measured_once_and_nothing_twice(tmp_path: Path) -> None:
    timing, choices = Timing(Counting(saturates=False), threads=1), Choices((2, 8))
    Counting.opened.clear()
    first = subbyte.profile(net(), DATA, timing, choices=choices, bank=Bank(tmp_path))
    assert len(Counting.opened) == 2 * (3 + 1)  # two geometries, float and two options each, and the file that does nothing beside them
    assert list(first.seconds) == ["0", "2", "5"] and list(first.seconds["0"]) == [(2, 8), (8, 8)]
    assert first.times["0"] == first.times["2"] and first.floats["0"] == first.floats["2"]
    assert all(0 < one.least <= one.median for row in first.times.values() for one in row.values())
    again = subbyte.profile(net(), DATA, timing, choices=choices, bank=Bank(tmp_path))
    assert len(Counting.opened) == 8 and again.times == first.times and again.runtime == first.runtime
    assert first.total(dict.fromkeys(["0", "2"], (8, 8))) == pytest.approx(2 * first.seconds["0"][8, 8])


def test_the_number_of_samples_is_the_users(tmp_path: Path) -> None:
    assert [layer.input_shape[0] for layer in layers_at(net(), [DATA], 3, ["0", "5"])] == [3, 3]
    assert [layer.input_shape[0] for layer in layers_at(net(), [DATA[:2]], 5, ["5"])] == [5]
    with pytest.raises(LayerError, match="'spare'.*not called"):
        layers_at(net(), [DATA], 1, ["spare"])


def test_a_layer_that_is_called_twice_takes_twice_the_time() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
            self.eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.once(self.twice(self.twice(x)))

    timed = subbyte.profile(Twice(), torch.randn(8, 8), TIMING, choices=Choices((8,)))
    assert timed.times["twice"][8, 8].median == pytest.approx(2 * timed.times["once"][8, 8].median)


def table(fast: Sequence[int], names: Sequence[str] = ("0", "2", "5")) -> dict[str, dict[tuple[int, int | None], float]]:
    """1 s for widths that are fast, 2 s for the others."""
    return {name: {(bits, 8): 1.0 if bits in fast else 2.0 for bits in range(2, 9)} for name in names}


def test_a_budget_takes_a_profile_or_a_table() -> None:
    times = {name: {option: LayerTime(t, t) for option, t in row.items()} for name, row in table([3, 4]).items()}
    given = Profile(TIMING, 1, "none", {}, times)
    for seconds in (given, given.seconds):
        budget = Budget(latency=4.0, seconds=seconds, target=OnnxRuntimeCPU(), choices=Choices((3, 4, 8)))
        result = subbyte.quantize(net(), DATA, budget=budget, recipe=subbyte.rounding())
        assert result.plan is not None and result.plan.allocation.latency == 4.0
        assert sorted(option[0] for option in result.allocation.values()) == [4, 4, 8]
        assert "latency predicted by the sum of the layers: 4000.000 ms" in str(result)
    assert result.plan.solve(Budget(minimize="latency", kl=9.0, seconds=given)).latency == 3.0


def test_a_budget_with_a_target_measures_by_itself_and_the_export_compares(tmp_path: Path) -> None:
    budget = Budget(minimize="latency", size=0.9, target=OnnxRuntimeCPU(), choices=Choices((4, 8)))
    bank = Bank(tmp_path)
    result = subbyte.quantize(net(), DATA, budget=budget, recipe=subbyte.rounding(), bank=bank)
    assert result.plan is not None and result.plan.profile is not None
    assert result.plan.allocation.latency == pytest.approx(result.plan.profile.total(result.allocation))
    assert all(option[1] == 8 for option in result.allocation.values())
    done = result.export_onnx(tmp_path / "m.onnx", threads=1)
    assert done.predicted_milliseconds == pytest.approx(1000 * result.plan.profile.total(result.allocation))
    assert "the sum of the layers alone; the whole file" in str(done)
    assert result.export_onnx(tmp_path / "m.onnx", threads=2).predicted_milliseconds is None
    assert result.export_onnx(tmp_path / "m.onnx", Simulation(), threads=1).predicted_milliseconds is None


@dataclass(frozen=True)
class Elsewhere(OnnxRuntimeCPU):
    """Runs nowhere near."""

    timed = False


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Timing(threads=0), "at least 1"),
        (lambda: Timing(Elsewhere()), "cannot be run here"),
        (lambda: Budget(latency=1.0), "needs a `target`"),
        (lambda: Budget(minimize="latency", size=0.5), "needs a `target`"),
        (lambda: Profile(TIMING, 1, "none", {}, {}).total({"fc": (8, 8)}), "not measured: 'fc'"),
    ],
)
def test_what_cannot_be_timed_is_said(build: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build()


@pytest.mark.parametrize("target", [OnnxRuntimeCPU(), subbyte.OpenVINOCPU()])
def test_the_programme_offers_only_what_the_target_runs(target: Target) -> None:
    result = subbyte.quantize(net(), DATA, budget=Budget(size=1.0, target=target), recipe=subbyte.rounding())
    assert result.plan is not None and set(result.plan.market.options["0"]) == set(target.options())
    for choices in (Choices(pinned={"0": 4}), Choices(activation_bits=(None,)), Choices(allowed={"5": [(4, 4)]})):
        with pytest.raises(OptionError, match=f"{target.name} does not run; .*it runs \\(2, 8\\), \\(3, 8\\)"):
            subbyte.quantize(net(), DATA, budget=Budget(size=1.0, target=target, choices=choices))


def test_a_table_that_shares_its_weight_has_the_options_of_its_partner() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.ReLU(), nn.Linear(8, 20)).eval()
    model[2].weight = model[0].weight
    tokens, choices = torch.randint(0, 20, (32, 4)), Choices((4, 8), activation_bits=(8,))
    timed = subbyte.profile(model, tokens, TIMING, choices=choices)
    assert timed.seconds["0"] == {(4, 8): 0.0, (8, 8): 0.0} and min(timed.seconds["2"].values()) > 0.0
    budget = Budget(latency=1.0, seconds=timed, choices=choices)
    result = subbyte.quantize(model, tokens, budget=budget, recipe=subbyte.rounding())
    assert result.plan is not None and result.plan.profile is timed


def test_tables_count_nothing_and_pass_the_programme(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).eval()
    tokens = torch.randint(0, 20, (32, 4))
    choices, bank = Choices((4, 8)), Bank()
    timed = subbyte.profile(model, tokens, TIMING, choices=choices, bank=bank)
    assert timed.seconds["0"] == {(4, None): 0.0, (8, None): 0.0} and list(timed.seconds["1"]) == [(4, 8), (8, 8)]
    budget = Budget(latency=1.0, target=OnnxRuntimeCPU(), choices=choices)
    result = subbyte.quantize(model, tokens, budget=budget, recipe=subbyte.rounding(), bank=bank)
    assert result.plan is not None and result.plan.profile is not None and result.plan.profile.times == timed.times

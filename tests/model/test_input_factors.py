"""A layer that multiplies its own input computes what it did, keeps its factors everywhere, and loses less by rounding."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import subbyte
from subbyte.export.onnx_model import OnnxModel
from subbyte.model.equalize import Equalization, equalize_
from subbyte.model.input_factors import exponents_of, factors_from, put_exponents_
from subbyte.model.layers import survey
from subbyte.model.operators import Linear, operator_of
from subbyte.model.quantized_layer import QuantizedLayer

HIDDEN, WIDTHS = 24, subbyte.Widths(8, 8)


class PostNorm(nn.Module):
    """Norms behind residual sums, as BERT has them: what a layer reads, the next sum reads too; a few channels are large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)
        self.last, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 5)
        self.norm.weight.data[3], self.norm.bias.data[7] = 40.0, -30.0
        self.up.weight.data[:, [3, 7]] *= 0.05
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head(self.last(x + self.down(nn.functional.gelu(self.up(x)))))


def inputs(count: int = 64) -> Tensor:
    return torch.randn(count, 6, HIDDEN, generator=torch.Generator().manual_seed(1))


def quantized(setting: Equalization | None, widths: subbyte.Widths = WIDTHS) -> subbyte.Result:
    torch.manual_seed(0)
    return subbyte.quantize(PostNorm(), inputs(), widths=widths, recipe=_with(setting))


def _with(setting: Equalization | None) -> subbyte.Recipe:
    return subbyte.Recipe(solver=subbyte.RoundToNearest(), loss=subbyte.RelativeSquaredError(), equalization=setting)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_float_layer_computes_the_same_numbers(transposed: bool, by_name: bool) -> None:
    linear, x = nn.Linear(5, 3), torch.randn(4, 5)
    if transposed:
        linear = pytest.importorskip("transformers").pytorch_utils.Conv1D(3, 5)
    operator = operator_of(linear)
    assert operator == Linear(transposed=transposed)
    before, weight = linear(x), linear.weight.detach().clone()
    put_exponents_(linear, torch.tensor([0, 1, -3, 5, 60], dtype=torch.int8), operator)
    assert torch.equal(linear(**{"x" if transposed else "input": x}) if by_name else linear(x), before)
    assert not torch.equal(linear.weight, weight)


def test_what_is_read_elsewhere_too_is_scaled_by_its_reader_and_outputs_stay() -> None:
    net, x = PostNorm(), inputs()
    found, _ = survey(net, [x])
    before = net(x)
    done = equalize_(net, found.multiplying, [x], {layer.name: [(8, 8)] for layer in found.layers}, Equalization())
    own = [one.source for one in done if one.is_own]
    assert own == ["up", "down"]
    factors = next(one.factors for one in done if one.source == "up")
    assert torch.equal(factors_from(exponents_of(net.up)), factors) and bool((factors[[3, 7]] < factors[:3].min()).all())
    torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize("options", [[(8, None)], [(8, 8), (8, None)]])
def test_inputs_that_may_stay_in_float32_are_not_scaled(options: list[tuple[int, int | None]]) -> None:
    net, x = PostNorm(), inputs()
    found, _ = survey(net, [x])
    assert not any(
        one.is_own for one in equalize_(net, found.multiplying, [x], {name: options for name in ("up", "down", "head")}, Equalization())
    )


def test_rounding_loses_less_and_the_receipt_and_the_report_say_so() -> None:
    with_it, without = quantized(Equalization()), quantized(Equalization(own_below=0.0))
    assert with_it.loss < 0.8 * without.loss
    assert "layers that scale their own input: 2 (up, down)" in str(with_it) and "scale their own" not in str(without)
    assert with_it.summary().scaling_own_input == ("up", "down")
    assert "scales its input" in repr(with_it.model.up) and "scales its input" not in repr(with_it.model.head)


@pytest.mark.parametrize("recipe", [subbyte.Recipe(), subbyte.Recipe(flavour=subbyte.Flavour.SEQUENTIAL), subbyte.default()])
def test_every_step_of_a_recipe_sees_what_the_layer_multiplies(recipe: subbyte.Recipe) -> None:
    torch.manual_seed(0)
    net, x = PostNorm(), inputs()
    result = subbyte.quantize(net, x, widths=subbyte.Widths(4, 8), recipe=recipe)
    rounded = quantized(Equalization(own_below=0.0), subbyte.Widths(4, 8))
    wanted = net(inputs(32) + 0.1).detach()
    errors = [(model(inputs(32) + 0.1) - wanted).square().mean().item() for model in (result.model, rounded.model)]
    assert result.model.up.input_exponents is not None and errors[0] < 0.5 * errors[1]


def test_a_budget_counts_the_factors_bytes(tmp_path: Path) -> None:
    result = subbyte.quantize(PostNorm(), inputs(), budget=subbyte.Budget(average_bits=5.0), recipe=_with(Equalization()))
    assert result.model.up.input_exponents is not None
    assert result.plan is not None
    assert result.save(tmp_path / "net") == (tmp_path / "net").stat().st_size == result.plan.allocation.size_bytes


@pytest.mark.parametrize("program", [False, True])
def test_the_packed_file_gives_the_same_numbers(tmp_path: Path, program: bool) -> None:
    result, x = quantized(Equalization(), subbyte.Widths(4, 8)), inputs(3)
    result.save(tmp_path / "net", program=program)
    loaded = subbyte.load(tmp_path / "net") if program else subbyte.load(tmp_path / "net", into=PostNorm())
    torch.testing.assert_close(loaded(x), result.model(x), rtol=0, atol=0)


def test_the_onnx_file_scales_too(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", subbyte.ExportWarning)  # so small a file is no faster
        exported = quantized(Equalization()).export_onnx(tmp_path / "net.onnx", threads=1)
    x = inputs(5)
    found, expected = OnnxModel(tmp_path / "net.onnx", threads=1)(x), exported.simulation(x)
    assert all(check.agreement == 100.0 for check in exported.verification.checks)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_compressed_tensors_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(subbyte.LayerError, match="up"):
        quantized(Equalization()).export_compressed_tensors(tmp_path / "folder")


def test_copies_keep_the_factors() -> None:
    linear = nn.Linear(2, 1)
    put_exponents_(linear, torch.tensor([1, -1], dtype=torch.int8), Linear())
    layer = copy.deepcopy(QuantizedLayer(copy.deepcopy(linear), Linear()))
    assert torch.equal(layer.input_exponents, torch.tensor([1, -1], dtype=torch.int8))
    assert torch.equal(layer(torch.ones(1, 2)), linear(torch.ones(1, 2)))


class TwoReaders(PostNorm):
    """Two layers read what the norm gives, and the sum does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 48)
        self.gate.weight.data[:, [3, 7]] *= 0.05
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head(self.last(x + self.down(nn.functional.gelu(self.up(x)) * self.gate(x).sigmoid())))


def test_layers_that_read_the_same_have_the_same_factors_and_the_onnx_file_multiplies_once(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    result = subbyte.quantize(TwoReaders(), inputs(), widths=WIDTHS, recipe=_with(Equalization()))
    up, gate, down = (exponents_of(getattr(result.model, name)) for name in ("up", "gate", "down"))
    assert torch.equal(up, gate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", subbyte.ExportWarning)  # so small a file is no faster
        exported = result.export_onnx(tmp_path / "net.onnx", threads=1)
    assert all(check.agreement == 100.0 for check in exported.verification.checks)
    graph = onnx.load(tmp_path / "net.onnx").graph
    vectors = {tensor.name: list(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer if len(tensor.dims) == 1}
    multiplied = [vectors[name] for node in graph.node if node.op_type == "Mul" for name in node.input if name in vectors]
    wanted = [factors_from(exponents).tolist() for exponents in (up, down) if exponents is not None]
    assert [factors for factors in multiplied if factors in wanted] == wanted

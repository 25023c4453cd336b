"""Every operator is one matrix problem on rows: `rows @ W^T + b` is the module's forward at every position."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subbyte.model.layers import survey
from subbyte.model.operators import Convolution, Linear, Lookup, Operator, operator_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MODES = ("zeros", "reflect", "replicate", "circular")
EVEN_SAME = "ignore:Using padding='same' with even kernel lengths:UserWarning"


def the_operator(module: nn.Module) -> Operator:
    operator = operator_of(module)
    assert operator is not None
    return operator


def check(module: nn.Module, x: Tensor) -> None:
    """The whole contract of an operator, for one module in float64 and one input."""
    module, x = module.double(), x.double()
    operator, weight, bias = the_operator(module), module.weight.detach(), module.bias
    y = module(x).detach()

    matrix = operator.to_matrix(weight)
    groups, outputs, unknowns = matrix.shape
    assert torch.equal(operator.from_matrix(matrix), weight)

    samples, positions = operator.count(x)
    which, where = torch.arange(samples).repeat_interleave(positions), torch.arange(positions).repeat(samples)
    rows = operator.rows(x, which, where)
    assert rows.shape == (groups, samples * positions, unknowns)
    by_rows = (rows @ matrix.mT).permute(1, 0, 2).reshape(samples, positions, groups * outputs)
    if bias is not None:
        by_rows = by_rows + bias
    channels_last = by_rows if isinstance(operator, Linear) else by_rows.transpose(1, 2)
    torch.testing.assert_close(channels_last.reshape(y.shape), y)
    torch.testing.assert_close(operator(x, weight, bias), y)

    some = torch.randint(samples * positions, (5,))
    assert torch.equal(operator.rows(x, which[some], where[some]), rows[:, some])

    values = torch.arange(1.0, groups * outputs + 1).double()
    scaled = operator.to_matrix(weight * operator.per_channel(values, weight))
    assert torch.equal(scaled, matrix * values.view(groups, outputs, 1))
    if x.dim() == len(operator.layout(x)) + 1:
        check_weight_gradients(operator, weight, x)


def check_weight_gradients(operator: Operator, weight: Tensor, x: Tensor) -> None:
    gradient = torch.randn_like(operator(x, weight, None))
    found = operator.weight_gradients(x, gradient, weight)
    for sample in range(len(x)):
        own = weight.clone().requires_grad_()
        (operator(x[sample : sample + 1], own, None) * gradient[sample : sample + 1]).sum().backward()
        torch.testing.assert_close(found[sample], own.grad)


@st.composite
def convolutions(draw: st.DrawFn, *, transposed: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution of any settings, and the shape of an input that it accepts."""
    dimensions = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.lists(st.integers(low, high), min_size=dimensions, max_size=dimensions)))  # noqa: E731
    groups = draw(st.sampled_from((1, 2, 3)))
    wide = st.integers(1, 2)
    settings = {
        "in_channels": groups * draw(wide),
        "out_channels": groups * draw(wide),
        "kernel_size": each(1, 3),
        "stride": each(1, 3),
        "dilation": each(1, 2),
        "padding": each(0, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    reach = [d * (k - 1) for d, k in zip(settings["dilation"], settings["kernel_size"], strict=True)]
    sizes = tuple(max(3, r + 1) + draw(st.integers(0, 2)) for r in reach)  # reflect needs more values than it pads
    if transposed:
        settings["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(settings["stride"], settings["dilation"], strict=True)
        )
        settings["padding"] = tuple(min(p, r) for p, r in zip(settings["padding"], reach, strict=True))
        module = TRANSPOSED[dimensions - 1](**settings)
    else:
        settings["padding_mode"] = draw(st.sampled_from(MODES))
        if draw(st.booleans()):
            settings["padding"] = draw(st.sampled_from(("same", "valid")))
        if settings["padding"] == "same":
            settings["stride"] = 1
        module = CONVOLUTIONS[dimensions - 1](**settings)
    batch = (draw(st.integers(1, 2)),) if draw(st.booleans()) else ()
    return module, (*batch, settings["in_channels"], *sizes)


@pytest.mark.filterwarnings(EVEN_SAME)
@given(convolutions(transposed=False))
def test_convolution_is_a_matrix_problem_on_rows(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = case
    check(module, torch.randn(shape))


@given(convolutions(transposed=True))
def test_transposed_convolution_is_a_matrix_problem_on_rows(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = case
    check(module, torch.randn(shape))


@pytest.mark.filterwarnings(EVEN_SAME)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "unbatched"])
def test_every_padding_of_every_dimension(mode: str, dimensions: int, padding: int | str, batch: tuple[int, ...]) -> None:
    kernel, sizes = (3, 2, 3)[:dimensions], (5, 4, 3)[:dimensions]
    for groups in (1, 2, 4):
        module = CONVOLUTIONS[dimensions - 1](4, 8, kernel, padding=padding, groups=groups, padding_mode=mode)
        check(module, torch.randn(*batch, 4, *sizes))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 7, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_matrix_problem_on_rows(shape: tuple[int, ...], bias: bool) -> None:
    check(nn.Linear(5, 3, bias=bias), torch.randn(shape))


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(4, 6)])
def test_codes_keep_their_dtype_in_matrix_form(module: nn.Module) -> None:
    operator = the_operator(module)
    codes = torch.randint(-8, 8, module.weight.shape, dtype=torch.int16)
    matrix = operator.to_matrix(codes)
    assert matrix.dtype == torch.int16
    assert torch.equal(operator.from_matrix(matrix), codes)


def test_zero_padding_stays_zero_in_rows() -> None:
    module = nn.Conv1d(1, 1, 3, padding=1)
    rows = the_operator(module).rows(torch.tensor([[[5.0, 7.0]]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert rows.tolist() == [[[0.0, 5.0, 7.0], [5.0, 7.0, 0.0]]]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Linear(5, 3), (4, 7, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1), (4, 4, 5, 6)),
        (nn.Conv2d(6, 6, 3, groups=6), (4, 6, 5, 6)),
        (nn.Conv2d(6, 12, 3, groups=3, dilation=2), (4, 6, 7, 6)),
        (nn.Conv3d(2, 3, 2), (4, 2, 3, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 4, 5, 4)),
        (nn.ConvTranspose1d(4, 6, 3, stride=3, groups=2), (4, 4, 5)),
    ],
    ids=str,
)
def test_macs_are_those_that_torch_counts(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(x)
    (layer,) = survey(nn.Sequential(module).eval(), [x])[0].layers
    assert layer.macs * shape[0] == counter.get_total_flops() // 2
    assert layer.positions == math.prod(module(x).shape[1:]) // layer.outputs
    assert layer.weight_count == module.weight.numel()


def test_subclass_with_torchs_forward_has_an_operator() -> None:
    class Named(nn.Conv2d):
        pass

    assert operator_of(Named(2, 4, 3)) == operator_of(nn.Conv2d(2, 4, 3)) == Convolution((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)


def test_subclass_with_its_own_forward_has_none() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    class OwnConvolution(nn.Conv2d):  # what Conv2d.forward calls
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    assert operator_of(Standardised(2, 4, 3)) is None
    assert operator_of(Adapted(4, 4)) is None
    assert operator_of(OwnConvolution(2, 4, 3)) is None
    assert operator_of(nn.Bilinear(2, 2, 2)) is None


def test_instance_with_its_own_forward_has_none() -> None:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x * 2  # type: ignore[method-assign]
    assert operator_of(module) is None


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_positions_are_counted_without_running(size: int, kernel: int, stride: int, dilation: int, padding: int) -> None:
    assume(size + 2 * padding > dilation * (kernel - 1))
    x = torch.empty(2, 1, size, device="meta")
    forward = nn.Conv1d(1, 1, kernel, stride, padding, dilation, device="meta")
    back = nn.ConvTranspose1d(1, 1, kernel, stride, 0, stride - 1, 1, dilation=dilation, device="meta")
    for module in (forward, back):
        assert the_operator(module).count(x) == (2, module(x).shape[2])


def test_the_conv1d_of_transformers_is_a_linear_with_its_weight_transposed() -> None:
    library = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    module = library.Conv1D(5, 3).eval()
    operator = operator_of(module)
    assert operator == Linear(transposed=True)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(operator(x, module.weight, module.bias), module(x))
    matrix = operator.to_matrix(module.weight.detach())
    assert matrix.shape == (1, 5, 3) and torch.equal(operator.from_matrix(matrix), module.weight)
    steps = torch.arange(1.0, 6.0)
    assert torch.equal(operator.to_matrix(module.weight * operator.per_channel(steps, module.weight))[0], matrix[0] * steps[:, None])


def test_weight_gradients_of_tables_and_of_the_conv1d_of_transformers() -> None:
    check_weight_gradients(Lookup(), torch.randn(5, 3).double(), torch.randint(5, (4, 6)))
    check_weight_gradients(Linear(transposed=True), torch.randn(5, 3).double(), torch.randn(4, 6, 5).double())

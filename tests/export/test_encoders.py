"""Transformer encoders as ONNX files: any number of samples and any length, every Linear layer an int8 matrix product."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.export.onnx import Demands
from subbyte.export.onnx_model import OnnxModel
from subbyte.export.trace import Example, in_order
from subbyte.export.translation import marked, to_file, trace
from subbyte.export.verify import as_arrays, compared
from subbyte.model.quantized_layer import QuantizedLayer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore::subbyte.export.onnx.ExportWarning", "ignore::ResourceWarning")
HIDDEN, TOKENS = 32, 60
WIDTHS = subbyte.Widths(4, 8, pinned={"*attention*": (8, 8)}, exclude=("*embeddings*",))


class Attending(nn.Module):
    """An encoder block of the user's own, over vectors, with scaled_dot_product_attention; then the mean of the real positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False), nn.Linear(2 * HIDDEN, HIDDEN)
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 3)
        self.eval()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask.bool()
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        x = self.second(x + self.down(F.gelu(self.up(x))))
        kept = real.to(torch.float32)[..., None]
        return self.head((x * kept).sum(1) / kept.sum(1))


def padded(samples: int, length: int, seed: int = 0) -> Tensor:
    """A mask, int64 (samples, length): the first sample is whole, the others end somewhere."""
    ends = torch.randint(1, length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    ends[0] = length
    return (torch.arange(length) < ends[:, None]).to(torch.int64)


def sentences(samples: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens with padding."""
    mask = padded(samples, length, seed)
    tokens = torch.randint(1, TOKENS, (samples, length), generator=torch.Generator().manual_seed(seed)) * mask
    return {"input_ids": tokens, "token_type_ids": (torch.arange(length) >= length // 2).to(torch.int64) * mask, "attention_mask": mask}


def bert(attention: str, head: str = "SequenceClassification") -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'subbyte[hf]'")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.3,
        num_labels=3,
        attn_implementation=attention,
    )
    return getattr(transformers, f"BertFor{head}")(config).eval()


def exported(model: nn.Module, batches: list[Any], path: Path, widths: subbyte.Widths, **options: Any) -> subbyte.Exported:
    recipe = subbyte.Recipe(solver=subbyte.RoundToNearest(), loss=subbyte.RelativeSquaredError())
    result = subbyte.quantize(model, batches, widths=widths, recipe=recipe)
    return result.export_onnx(path, threads=1, **options)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subbyte.Exported, Path]]:
    path = tmp_path_factory.mktemp("onnx") / "bert.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield exported(bert(request.param), [sentences(8, length, length) for length in (7, 12, 9, 12)], path, WIDTHS), path


def test_every_linear_layer_is_an_int8_matrix_product(encoder: tuple[subbyte.Exported, Path]) -> None:
    kernels = encoder[0].verification.kernels
    assert len(kernels) == 2 * 6 + 2
    assert set(kernels.values()) == {"QGemm"}  # which adds the bias itself
    assert encoder[0].quantizers == 0


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (1, 17), (5, 12), (2, 33), (1, 1)])
def test_any_number_of_samples_and_any_length(encoder: tuple[subbyte.Exported, Path], samples: int, length: int) -> None:
    """Float operators lie between the quantisers, so that now and then a number falls to the other side of a rounding's border."""
    batch = sentences(samples, length, 3)
    expected = next(iter(encoder[0].simulation(**batch).values())).detach()
    found = OnnxModel(encoder[1], threads=1)(**batch)
    assert found.shape == (samples, 3) and float(expected.std()) > 0.05
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_padding_changes_nothing(encoder: tuple[subbyte.Exported, Path]) -> None:
    run = OnnxModel(encoder[1], threads=1)
    bare = sentences(1, 9, 4)
    longer = {name: torch.cat([tensor, torch.zeros(1, 6, dtype=tensor.dtype)], dim=1) for name, tensor in bare.items()}
    assert torch.allclose(run(**bare), run(**longer), atol=0.05)
    ignored = longer | {"attention_mask": torch.ones(1, 15, dtype=torch.int64)}
    assert not torch.allclose(run(**bare), run(**ignored), atol=0.2)


def test_runtime_and_simulation_agree_with_and_without_optimizations(encoder: tuple[subbyte.Exported, Path]) -> None:
    checks = encoder[0].verification.checks
    assert [check.optimized for check in checks] == [False, True]
    assert all(check.agreement == 100.0 and check.largest_steps < 6.0 for check in checks)
    assert encoder[0].loss == pytest.approx(encoder[0].model_loss, rel=0.2)


def test_inputs_go_by_their_names(encoder: tuple[subbyte.Exported, Path]) -> None:
    run, batch = OnnxModel(encoder[1], threads=1), sentences(3, 8)
    turned = dict(reversed(batch.items()))
    assert list(turned) != list(batch) and torch.equal(run(**turned), run(**batch))


def test_codes_of_linear_layers_take_their_true_width(encoder: tuple[subbyte.Exported, Path]) -> None:
    kinds = onnx.TensorProto.DataType
    stored = dict.fromkeys((kinds.INT4, kinds.INT8, kinds.UINT8), 0)
    for tensor in onnx.load(encoder[1]).graph.initializer:
        if tensor.data_type in stored and len(tensor.dims) == 2:
            stored[tensor.data_type] += int(np.prod(tensor.dims))
    wide = kinds.UINT8 if subbyte.OnnxRuntimeCPU().layout.unsigned_weights else kinds.INT8
    of_8_bits, of_4_bits = 2 * 4 * HIDDEN * HIDDEN, 2 * 2 * HIDDEN * 64 + HIDDEN * HIDDEN + 3 * HIDDEN
    zero_points = 2 * (64 + HIDDEN) + HIDDEN + 3
    dense = stored[kinds.UINT8] - (of_8_bits if wide == kinds.UINT8 else 0)  # a plane of 4 bits: two codes a byte
    assert stored[wide] - (dense if wide == kinds.UINT8 else 0) == of_8_bits and stored[kinds.INT4] == 0
    assert (of_4_bits + zero_points) // 2 <= dense <= (of_4_bits + zero_points) // 2 + 4


def test_the_file_has_standard_operators_only(encoder: tuple[subbyte.Exported, Path]) -> None:
    file = onnx.load(encoder[1])
    onnx.checker.check_model(file, full_check=True)
    assert [entry.domain for entry in file.opset_import] == [""] and not file.functions


def test_outputs_for_every_token_are_compared_without_padding(tmp_path: Path) -> None:
    model = bert("eager", "TokenClassification")
    batches = [sentences(6, length, length) for length in (6, 11, 8)]
    done = exported(model, batches, tmp_path / "m.onnx", WIDTHS)
    assert all(check.agreement is not None and check.agreement > 97.0 for check in done.verification.checks)
    found = OnnxModel(tmp_path / "m.onnx", threads=1)(**batches[1])
    assert found.shape == (6, 11, 3)


def test_a_block_of_the_users_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, length, HIDDEN), padded(8, length)) for length in (5, 9)]
    done = exported(Attending(), batches, tmp_path / "m.onnx", subbyte.Widths(4, 8))
    assert set(done.verification.kernels) == {"qkv", "out", "up", "down", "head"} and done.verification.float_layers == ()
    x, mask = torch.randn(3, 14, HIDDEN), padded(3, 14, 1)
    expected = done.simulation(x, mask).detach()
    found = OnnxModel(tmp_path / "m.onnx", threads=1)(x, mask)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_as_many_samples_are_timed_as_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 5, HIDDEN), padded(8, 5))]
    done = exported(Attending(), batches, tmp_path / "m.onnx", subbyte.Widths(4, 8), batch_size=4)
    assert done.verification.clock.batch_size == 4 and "ms for 4 samples, float" in str(done)
    with pytest.raises(subbyte.OptionError, match="batch_size is at least 1, not 0"):
        Demands(batch_size=0)


def test_lengths_that_the_model_fixes_stay_fixed() -> None:
    """Whole numbers of one length may be no tokens: a model that reads just so many is traced all the same."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, codes: Tensor) -> Tensor:
            return self.linear(codes.to(torch.float32))

    from subbyte.export.trace import trace

    graph = trace(Fixed().eval(), Example.of([torch.zeros(5, 4, dtype=torch.int64)]))
    assert graph(torch.zeros(7, 4, dtype=torch.int64)).shape == (7, 2)


def test_batches_of_different_structure_are_an_error() -> None:
    with pytest.raises(subbyte.ModelError, match=r"different inputs, \['a'\] and \['a', 'b'\]"):
        Example.of([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}])
    with pytest.raises(subbyte.ModelError, match="not of one structure"):
        Example.of([torch.zeros(2, 3), torch.zeros(2, 3, 1)])
    assert in_order(torch.zeros(1), {}).shape == (1,)


def test_comparison_leaves_padding_out() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    expected = np.zeros((1, 3, 2), np.float32)
    expected[..., 0] = 1.0
    found = expected.copy()
    found[0, 2] = (0.0, 50.0)  # padding
    check = compared(True, [batch], [[expected]], [[found]])
    assert check.agreement == 100.0 and check.largest_steps == 0.0
    found[0, 1] = (0.0, 1.0)
    check = compared(True, [batch], [[expected]], [[found]])
    assert check.agreement == 50.0 and check.largest_steps == 255.0


def test_arrays_of_what_is_no_mapping_stay_in_order() -> None:
    assert [array.item() for array in as_arrays((torch.tensor(1), torch.tensor(2)), ("b", "a"))] == [1, 2]


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"), [(8, True, None), (4, True, None), (3, False, None), (8, False, None), (4, True, 8)]
)
def test_embeddings_are_looked_up_as_codes(tmp_path: Path, bits: int, symmetric: bool, group: int | None) -> None:
    model = bert("eager")
    recipe = subbyte.Recipe(symmetric_weights=symmetric, weight_group=group)
    only = subbyte.Widths(bits, 8, include=("*embeddings*",))
    result = subbyte.quantize(model, [sentences(8, 9, seed) for seed in range(4)], widths=only, recipe=recipe)
    exported = result.export_onnx(tmp_path / "e.onnx", subbyte.OnnxRuntimeCPU())
    assert set(exported.verification.kernels.values()) == {"Gather"} and len(exported.verification.kernels) == 3
    file = onnx.load(tmp_path / "e.onnx").graph
    kinds = {tuple(item.dims): item.data_type for item in file.initializer}
    assert kinds.get((TOKENS, HIDDEN)) != onnx.TensorProto.FLOAT
    other = sentences(3, 14, 9)
    with torch.no_grad():
        expected = result.model(**other).logits
    found = OnnxModel(tmp_path / "e.onnx")(**other)
    torch.testing.assert_close(next(iter(found.values())) if isinstance(found, dict) else found, expected, rtol=1e-4, atol=1e-4)


def test_the_conv1d_of_transformers_runs_in_int8(tmp_path: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    model = nn.Sequential(conv1d(48, HIDDEN), nn.ReLU(), nn.Linear(48, 5)).eval()
    with torch.no_grad():
        model[0].weight.mul_(10)
    result = subbyte.quantize(model, torch.randn(32, HIDDEN), widths=subbyte.Widths(4, 8))
    exported = result.export_onnx(tmp_path / "c.onnx")
    assert exported.verification.kernels["0"] is not None
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(exported.simulation(x), OnnxModel(tmp_path / "c.onnx")(x), rtol=1e-4, atol=1e-3)


class Masked(nn.Module):
    """Attention of four heads under a mask that the user gives; the output is what attention gives."""

    def __init__(self, *, causal: bool = False, grouped: bool = False) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(12, 24), nn.Linear(12, 12 if grouped else 48), nn.Linear(24, 5)
        self.causal, self.grouped = causal, grouped
        self.eval()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 6)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 1 if self.grouped else 4, 6)).permute(2, 0, 3, 1, 4)
        given = {"is_causal": True} if self.causal else {"attn_mask": mask}
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped, **given).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["bool", "float", "least", "causal", "grouped"])
def test_attention_is_that_of_torch_and_zero_where_no_key_is_seen(kind: str, tmp_path: Path) -> None:
    model = Masked(causal=kind == "causal", grouped=kind == "grouped")
    x, mask = torch.randn(4, 7, 12), torch.rand(4, 1, 7, 7) < 0.6
    mask[1], mask[2, :, 3] = False, False  # no key at all: of a whole sample, of one position
    given = mask
    if kind in ("float", "least"):  # a row of the least numbers sees every key, one of minus infinity none
        given = torch.where(mask, torch.randn(4, 1, 7, 7), -torch.inf if kind == "float" else torch.finfo(torch.float32).min)
    batch = {"x": x, "mask": given}
    content, _ = to_file(trace(marked(model).model, Example.of([batch])), Example.of([batch]), {})
    (tmp_path / "net.onnx").write_bytes(content)
    torch.testing.assert_close(OnnxModel(tmp_path / "net.onnx", threads=1)(**batch), model(**batch), rtol=0, atol=1e-5)
    operators = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert "IsNaN" not in operators and operators.count("Transpose") <= 4


def test_the_encoder_of_torch_itself_is_exported(tmp_path: Path) -> None:
    """Its attention turns what comes out another way than the transformers library does."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(HIDDEN, 4, 64, batch_first=True), 1, enable_nested_tensor=False)
    x = torch.randn(24, 9, HIDDEN)
    widths = subbyte.Widths(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = exported(encoder.eval(), [x], tmp_path / "net.onnx", widths)
    torch.testing.assert_close(OnnxModel(tmp_path / "net.onnx", threads=1)(x), done.simulation(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("target", [subbyte.OnnxRuntimeCPU(), subbyte.OpenVINOCPU()], ids=repr)
def test_what_ships_is_the_quantized_model_with_biases_as_the_kernels_add_them(target: subbyte.Target, tmp_path: Path) -> None:
    """In float64 both compute the same; another bias would move a part of the codes behind it."""
    if target.name == "OpenVINOCPU":
        pytest.importorskip("openvino")
    x, mask = torch.randn(24, 9, HIDDEN), padded(24, 9)
    batches = [{"x": x, "attention_mask": mask}]
    result = subbyte.quantize(Attending(), batches, widths=subbyte.Widths(4, 8, exclude=("head",)))
    ships = result.export_onnx(tmp_path / "net.onnx", threads=1, target=target).simulation
    expected = copy.deepcopy(result.model).double()
    for layer in [module for module in expected.modules() if isinstance(module, QuantizedLayer)]:
        if target.layout.token_rows and layer.bias is not None:
            unit = layer.activation_scale.double() * layer.scale.double()
            layer.bias = unit * (layer.bias / unit).round()
    torch.testing.assert_close(ships(x=x, attention_mask=mask).double(), expected(x.double(), mask), rtol=0, atol=1e-4)

"""Bad input gives one clear error that names the layer, file or option and the remedy; nothing is written and nothing is lost."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import subbyte
from subbyte import DataError, FileError, Flavour, LayerError, ModelError, OptionError, Recipe, SubbyteError, Widths


class Net(nn.Module):
    """A small network; `spoil` may change what its second layer receives."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)
        self.spoil = spoil
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(self.spoil(x)))
        return self.head(self.dropout(x.mean(dim=(2, 3))))


def data() -> Tensor:
    return torch.randn(24, 3, 8, 8)


FLAVOURS = [Recipe(flavour=flavour) for flavour in Flavour]
flavours = pytest.mark.parametrize("recipe", FLAVOURS, ids=[flavour.value for flavour in Flavour])


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs in an empty folder and leaves it so."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert list((tmp_path / "here").iterdir()) == []


def refused(kind: type[SubbyteError], match: str, model: nn.Module, batches: Any = None, **options: Any) -> SubbyteError:
    """Quantizing raises exactly this kind of error, and leaves the model as it was."""
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(kind, match=match) as caught:
        subbyte.quantize(model, data() if batches is None else batches, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    for name, tensor in before.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    return caught.value


# The model.


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.ReLU()), nn.Sequential(nn.LSTM(8, 4)), nn.Sequential(nn.Flatten(), nn.Bilinear(2, 2, 2))],
    ids=["relu", "lstm", "bilinear"],
)
def test_a_model_without_a_layer_to_quantize(model: nn.Module) -> None:
    class FirstOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    refused(
        ModelError,
        f"nothing to quantize: no Linear, convolution or Embedding.*modules found:.*{type(model[-1]).__name__}",
        FirstOnly().eval(),
    )


def test_a_model_whose_layers_are_all_excluded() -> None:
    refused(ModelError, "nothing to quantize.*all are excluded", Net(), widths=Widths(exclude=("*",)))


def test_a_model_whose_layers_are_never_called() -> None:
    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    refused(ModelError, "nothing to quantize", Unused())


@pytest.mark.parametrize(
    "model", [None, torch.relu, nn.Linear, {"weight": torch.ones(2, 2)}, "model.py"], ids=["none", "function", "class", "weights", "path"]
)
def test_what_is_no_model(model: Any) -> None:
    refused(ModelError, f"the model is a torch.nn.Module, not {type(model).__name__}", model)


def test_a_model_that_is_itself_one_layer() -> None:
    """It is quantized, or the error says what to do: there is no parent to hang the new layer into."""
    model, x = nn.Linear(8, 4).eval(), torch.randn(32, 8)
    try:
        result = subbyte.quantize(model, x)
    except ModelError as error:
        assert "Sequential" in str(error)
        return
    assert torch.allclose(result.model(x), model(x), atol=0.05)


def test_training_mode() -> None:
    refused(ModelError, r"'Net' is in training mode; call model.eval\(\) first", Net().train())
    model = Net()
    model.dropout.train()
    refused(ModelError, r"'dropout' is in training mode; call model.eval\(\)", model)
    model = Net()
    model.bn1.train()
    refused(ModelError, r"'bn1' is in training mode", model)


@pytest.mark.parametrize("fold", [True, False], ids=["folding", "not folding"])
@flavours
def test_dropout_that_evaluation_mode_does_not_switch_off(recipe: Recipe, fold: bool) -> None:
    model = Net(lambda x: F.dropout(x, 0.5, training=True))
    refused(ModelError, "switch dropout and other randomness off", model, recipe=Recipe(flavour=recipe.flavour, fold_batch_norms=fold))


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 3, 8, 8))], ids=["script", "trace"])
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "part"])
def test_scripted_and_traced_modules(make: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = make(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    model = nn.Sequential(scripted, nn.Conv2d(4, 4, 3)).eval() if inside else scripted
    refused(ModelError, "is scripted or traced; pass the eager model", model)


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "part"])
def test_compiled_modules(inside: bool) -> None:
    compiled = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), backend="eager")
    model = nn.Sequential(compiled, nn.Conv2d(4, 4, 3)).eval() if inside else compiled
    refused(ModelError, "is compiled by torch.compile; pass the eager model", model)


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "part"])
def test_modules_compiled_in_place(inside: bool) -> None:
    model = Net()
    (model.conv2 if inside else model).compile(backend="eager")
    refused(ModelError, "compiled", model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    refused(LayerError, rf"is {name}; convert the model with model.float\(\) first", Net().to(dtype), data().to(dtype))
    model = Net()
    model.conv2.to(dtype)
    assert "conv2" in str(refused(LayerError, rf"is {name}; convert the model with model.float\(\)", model))
    model = Net()
    model.bn1.running_mean = model.bn1.running_mean.to(dtype)
    assert "bn1.running_mean" in str(refused(LayerError, rf"is {name}", model))


def test_complex_weights() -> None:
    model = Net()
    model.conv2.weight = nn.Parameter(model.conv2.weight.detach().to(torch.complex64))
    with pytest.raises(ModelError, match="conv2"):
        subbyte.quantize(model, data())


def test_autocast_around_the_call() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert refused(LayerError, "receives bfloat16.*switch autocast off", Net()).layer in ("conv2", "head")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["conv2.weight", "conv2.bias", "bn1.running_var", "head.weight"])
def test_weights_that_are_not_finite(value: float, place: str) -> None:
    model = Net()
    model.state_dict()[place].view(-1)[0] = value
    assert refused(LayerError, "holds NaN or infinite numbers; the trained model is damaged", model).layer == place


def test_lazy_parameters_that_have_no_numbers_yet() -> None:
    with pytest.raises(LayerError, match=r"1\.weight"):
        subbyte.quantize(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval(), data())


def test_parameters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(LayerError, match=r"conv1\.weight"):
        subbyte.quantize(model, data())


def test_a_model_that_cannot_be_copied() -> None:
    model = Net()
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match="copied"):
        subbyte.quantize(model, data())


def test_a_model_with_state_that_is_no_tensor() -> None:
    """It is quantized and can be saved and loaded, or it is refused."""

    class Extra(Net):
        def get_extra_state(self) -> object:
            return {"version": 3}

        def set_extra_state(self, state: object) -> None:
            assert state == {"version": 3}

    with contextlib.suppress(ModelError):
        assert subbyte.quantize(Extra(), data(), recipe=subbyte.rounding()).size_bytes > 0


def test_a_model_that_is_quantized_already() -> None:
    refused(ModelError, "nothing to quantize", subbyte.quantize(Net(), data(), recipe=subbyte.rounding()).model)


@pytest.mark.parametrize(
    "output",
    [lambda x: x.argmax(dim=1), lambda x: None, lambda x: {"label": x > 0}, lambda x: x.tolist()],
    ids=["ids", "none", "bools", "lists"],
)
def test_outputs_that_cannot_be_compared(output: Callable[[Tensor], object]) -> None:
    class Labels(Net):
        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            return output(super().forward(x))

    refused(ModelError, "no floating-point tensor, so its outputs cannot be compared", Labels())


@flavours
def test_outputs_that_are_not_finite(recipe: Recipe) -> None:
    class Infinite(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0

    with pytest.raises(ModelError, match="NaN or infinite"):
        subbyte.quantize(Infinite(), data(), recipe=recipe)


# What reaches a layer.


@flavours
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(recipe: Recipe, value: float) -> None:
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 0, 0, 0] = value
        return x

    error = refused(LayerError, "receives NaN or infinite numbers.*check the model and the calibration data", Net(spoil), recipe=recipe)
    assert error.layer == "conv2"


@flavours
def test_activations_that_are_not_finite_in_a_later_batch(recipe: Recipe) -> None:
    model = Net(lambda x: x / 0 if len(x) == 5 else x)
    assert refused(LayerError, "receives NaN or infinite", model, data().split([8, 8, 5, 3]), recipe=recipe).layer == "conv2"


@flavours
@pytest.mark.parametrize("spoil", [torch.zeros_like, lambda x: torch.full_like(x, 0.7), lambda x: x * 0], ids=["zeros", "constant", "dead"])
def test_a_layer_whose_input_is_constant(recipe: Recipe, spoil: Callable[[Tensor], Tensor]) -> None:
    error = refused(LayerError, "receives the same input.*check the calibration data.*or exclude the layer", Net(spoil), recipe=recipe)
    assert error.layer == "conv2"
    result = subbyte.quantize(Net(spoil), [*data().split(8)], widths=Widths(exclude=("conv2", "head")), recipe=recipe)
    assert set(result.allocation) == {"conv1"}


@flavours
def test_a_layer_whose_input_is_constant_but_for_rounding(recipe: Recipe) -> None:
    """What counts is what the float model feeds: an input that quantization makes constant is no fault of the data."""
    result = subbyte.quantize(Net(lambda x: 0.7 + 1e-6 * x), data(), recipe=recipe)
    assert result.measured.loss <= result.measured.baseline_loss


@flavours
def test_calibration_data_that_is_the_same_everywhere(recipe: Recipe) -> None:
    assert refused(LayerError, "receives the same input", Net(), torch.ones(8, 3, 8, 8), recipe=recipe).layer == "conv1"


# The calibration set.


@pytest.mark.parametrize(
    "batches",
    [[], (), torch.zeros(0, 3, 8, 8), [torch.zeros(0, 3, 8, 8)], iter([])],
    ids=["list", "tuple", "tensor", "list of a tensor", "iterator"],
)
def test_an_empty_calibration_set(batches: Any) -> None:
    refused(DataError, "the calibration set is empty", Net(), batches)


@pytest.mark.parametrize("batches", [None, 5, "images/", {"x": torch.zeros(2, 3, 8, 8)}], ids=["none", "number", "text", "mapping"])
def test_what_is_no_calibration_set(batches: Any) -> None:
    with pytest.raises(DataError, match="calibration data is a tensor or an iterable of batches"):
        subbyte.quantize(Net(), batches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite(value: float) -> None:
    x = data()
    x[20, 0, 0, 0] = value
    refused(DataError, "batch 2 holds NaN or infinite numbers; remove those samples", Net(), x.split(8))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.randn(4, 1, 8, 8)], r"in or after layer 'conv1' with input float32 \(4, 1, 8, 8\)"),
        ([(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))], r"leave labels out"),
        ([{"images": torch.randn(4, 3, 8, 8)}], r"images.*mappings as keyword arguments"),
        ([torch.zeros(4, 3, 8, 8, dtype=torch.uint8)], r"uint8"),
        ([torch.randn(4, 3, 8, 8).double()], r"float64"),
        ([torch.randn(4, 3, 8, 8).half()], r"float16"),
        ([torch.randn(4, 3, 2, 2)], r"float32 \(4, 3, 2, 2\)"),
        ([["a", "b"]], r"no tensor with samples"),
    ],
    ids=["channels", "labels", "names", "integers", "double", "half", "too small", "text"],
)
@flavours
def test_batches_that_the_model_does_not_accept(batches: Any, message: str, recipe: Recipe) -> None:
    with pytest.raises((ModelError, DataError), match=message):
        subbyte.quantize(Net(), batches, recipe=recipe)


@flavours
def test_a_later_batch_that_the_model_does_not_accept(recipe: Recipe) -> None:
    error = refused(LayerError, r"batch float32 \(4, 1, 8, 8\)", Net(), [torch.randn(4, 3, 8, 8), torch.randn(4, 1, 8, 8)], recipe=recipe)
    assert error.layer == "conv1"


def test_a_list_of_samples_in_the_place_of_batches() -> None:
    """A convolution takes (channels, height, width) too, but then the first dimension does not count samples."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises((ModelError, DataError)):
        subbyte.quantize(model, list(data()))


def test_samples_that_require_gradients_are_as_good_as_others() -> None:
    x = data()
    expected = subbyte.quantize(Net(), x).measured
    result = subbyte.quantize(Net(), x.clone().requires_grad_())
    assert result.measured.samples == expected.samples


# Widths and names.


@pytest.mark.parametrize("bits", [1, 0, -4, 9, 16, 4.0, "4", True, None, [4]], ids=repr)
def test_widths_outside_two_to_eight(bits: Any) -> None:
    with pytest.raises(OptionError, match="weight_bits.*2 to 8"):
        Widths(weight_bits=bits)
    with pytest.raises(OptionError, match="for 'conv1'.*2 to 8"):
        Widths(pinned={"conv1": (bits, 4)})
    if bits is not None:
        with pytest.raises(OptionError, match="activation_bits.*2 to 8"):
            Widths(activation_bits=bits)
        with pytest.raises(OptionError, match="for 'conv1'.*2 to 8"):
            Widths(pinned={"conv1": bits})


@pytest.mark.parametrize("option", [(4,), (4, 4, 4), (), [4, 4], {"weights": 4}], ids=repr)
def test_a_pin_that_is_neither_one_width_nor_two(option: Any) -> None:
    with pytest.raises(OptionError, match="conv1"):
        Widths(pinned={"conv1": option})


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (Widths(pinned={"conv9": 8}), "'conv9' is not among the layers.*conv1, conv2, head"),
        (Widths(pinned={"bn1": 8}), "'bn1' is not among the layers"),
        (Widths(pinned={"head": 8}, exclude=("head",)), "'head' is not among the layers that are quantized: conv1, conv2"),
        (Widths(include=("layer*",)), r"no layer matches 'layer\*'; the layers are conv1, conv2, head"),
        (Widths(exclude=("fc",)), "no layer matches 'fc'"),
        (Widths(exclude=("Conv1",)), "no layer matches 'Conv1'"),
    ],
    ids=["pinned", "pinned norm", "pinned and excluded", "included", "excluded", "case"],
)
def test_unknown_layer_names(widths: Widths, message: str) -> None:
    refused(OptionError, message, Net(), widths=widths)


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_text_where_a_list_of_globs_belongs(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is a list of globs, not the text 'head'"):
        Widths(**{name: "head"})  # type: ignore[arg-type]


# Files.


@pytest.fixture
def result() -> subbyte.Result:
    return subbyte.quantize(Net(), data(), recipe=subbyte.rounding())


def test_an_output_path_that_cannot_be_written(result: subbyte.Result, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "no" / "x.safetensors", ""):
        with pytest.raises(FileError, match="cannot write '.*choose a path in a folder that exists and can be written"):
            result.save(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "here"]


def test_an_output_path_that_exists_is_replaced_whole(result: subbyte.Result, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old" * 100_000)
    assert result.save(tmp_path / "x") == (tmp_path / "x").stat().st_size
    subbyte.load(tmp_path / "x", into=Net())


def test_a_packed_file_that_cannot_be_used(result: subbyte.Result, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    result.save(path)
    whole = path.read_bytes()
    contents = {
        "truncated, damaged": whole[: len(whole) // 2],
        "damaged": whole[:-1] + bytes([whole[-1] ^ 1]),
        "no safetensors file": b"\x80\x04K\x01.",
    }
    for message, changed in contents.items():
        path.write_bytes(changed)
        with pytest.raises(FileError, match=f"net.safetensors.*{message}.*save it again"):
            subbyte.load(path, into=Net())
    path.write_bytes(whole)
    with pytest.raises(FileError, match="net.safetensors' was made from another model"):
        subbyte.load(path, into=nn.Sequential(nn.Linear(3, 3)))


def test_every_error_is_of_the_one_family() -> None:
    for kind in (OptionError, ModelError, LayerError, DataError, FileError):
        assert issubclass(kind, SubbyteError)
    assert LayerError("conv1", "text").layer == "conv1"

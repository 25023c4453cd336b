"""The whole method on small networks of every kind: one body over all of them, in both flavours."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import subbyte
from subbyte import Flavour, Lattice, LayerError, Recipe, Result, RoundToNearest, Widths
from subbyte.model.batches import call, tensors
from subbyte.model.quantized_layer import QuantizedLayer
from subbyte.run.events import Event, LayerSolved, StageFinished, StageStarted, Warned

FLAVOURS = {flavour.value: Recipe(flavour=flavour) for flavour in Flavour}
flavours = pytest.mark.parametrize("recipe", FLAVOURS.values(), ids=FLAVOURS)


class ResidualNet(nn.Module):
    """Batch norm, a grouped convolution, functional activations, a residual sum and a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.down = nn.Conv2d(8, 12, 3, stride=2)
        self.norm = nn.GroupNorm(2, 12)
        self.head = nn.Linear(12, 5)
        self.unused = nn.Linear(2, 2)
        self.bn.running_mean.normal_(0, 0.3)
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.grouped(x))
        x = F.silu(self.norm(self.down(x)))
        features = x.mean(dim=(2, 3))
        return {"logits": self.head(features), "features": features}


class LearnedQueries(nn.Module):
    """A layer that is fed a view of a parameter, the same for all samples; attention to the input; an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv1d(3, 8, 3, padding=1), nn.SiLU(inplace=True)
        self.queries = nn.Parameter(torch.randn(4, 8))
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.act(self.stem(x)).transpose(1, 2)
        q = self.q(self.queries.expand(x.shape[0], -1, -1))
        read = (q @ self.k(seen).transpose(1, 2)).softmax(dim=-1) @ self.v(seen)
        return self.head(read.mean(dim=1))


def depthwise() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        depth = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        return [depth, nn.BatchNorm2d(inputs), nn.ReLU6(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6()]

    return nn.Sequential(*block(4, 8, 1), *block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, output_padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2),
    )


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, padding=2, padding_mode="circular"),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 6, 3, dilation=2, groups=3),
        nn.GELU(),
        nn.ConvTranspose1d(6, 4, 4, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 18, 3),
    )


def three_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding="same"),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Conv3d(4, 6, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


class Mixer(nn.Module):
    """Attention by hand over (samples, T, C), as in a transformer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        q, k, v = self.qkv(self.ln1(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -1e9)
        x = x + self.scale * self.out(scores.softmax(dim=-1) @ v)
        return x + self.down(F.gelu(self.up(self.ln2(x)))), None


class Twice(nn.Module):
    """One layer is called twice, and another has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = self.first
        self.last = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.step(torch.tanh(self.step(x))))
        return self.last(x)


class Experts(nn.Module):
    """The sign of a batch decides which expert it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[0 if float(x.sum()) > 0 else 1]
        return self.head(F.relu(expert(F.relu(self.stem(x)))))


@dataclass(frozen=True)
class Case:
    """A network, calibration data for it, the layers in running order, and what stays float."""

    build: Callable[[], nn.Module]
    data: Callable[[], Any]
    layers: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def batches(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


RESIDUAL = ("stem", "grouped", "down", "head")
MIXER = ("qkv", "out", "up", "down")
CASES: dict[str, Case] = {
    "residual": Case(ResidualNet, lambda: torch.randn(40, 3, 8, 8), RESIDUAL, ("norm", "unused")),
    "depthwise": Case(depthwise, lambda: torch.randn(40, 4, 8, 8).relu(), ("0", "3", "6", "9", "14")),
    "transposed": Case(transposed, lambda: torch.randn(24, 2, 7, 7), ("0", "2", "5")),
    "one-dimensional": Case(one_dimensional, lambda: torch.randn(40, 3, 12), ("0", "3", "5", "7")),
    "three-dimensional": Case(three_dimensional, lambda: torch.randn(24, 1, 4, 4, 4), ("0", "3", "6")),
    "mixer": Case(Mixer, lambda: torch.randn(40, 5, 8), MIXER, ("Mixer", "ln1", "ln2")),
    "learned queries": Case(LearnedQueries, lambda: torch.randn(40, 3, 6), ("stem", "q", "k", "v", "head"), ("LearnedQueries",)),
    "twice": Case(Twice, lambda: torch.randn(64, 6), ("first", "step", "head")),
    "experts": Case(
        Experts,
        lambda: [x * s for x, s in zip(batches(*[(8, 6)] * 6), (1, 1, -1, 1, -1, 1), strict=True)],
        ("stem", "experts.0", "experts.1", "head"),
        ("experts.2",),
    ),
    "smaller last batch": Case(ResidualNet, lambda: batches((16, 3, 8, 8), (16, 3, 8, 8), (3, 3, 8, 8)), RESIDUAL, ("norm", "unused")),
    "different sizes": Case(ResidualNet, lambda: batches((8, 3, 8, 8), (8, 3, 10, 7), (8, 3, 5, 9)), RESIDUAL, ("norm", "unused")),
    "mappings": Case(
        Mixer, lambda: [{"x": torch.randn(8, 5, 8), "mask": torch.rand(8, 5) > 0.3} for _ in range(4)], MIXER, ("Mixer", "ln1", "ln2")
    ),
    "tuples": Case(Mixer, lambda: [(torch.randn(8, 5, 8), torch.rand(8, 5) > 0.3) for _ in range(4)], MIXER, ("Mixer", "ln1", "ln2")),
    "an iterator": Case(Twice, lambda: iter(batches(*[(8, 6)] * 5)), ("first", "step", "head")),
    "one sample": Case(ResidualNet, lambda: torch.randn(1, 3, 8, 8), RESIDUAL, ("norm", "unused")),
    "two samples": Case(ResidualNet, lambda: torch.randn(2, 3, 8, 8), RESIDUAL, ("norm", "unused")),
    "many single samples": Case(Twice, lambda: batches(*[(1, 6)] * 30), ("first", "step", "head")),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def built(case: Case) -> tuple[nn.Module, list[Any]]:
    model = case.build().eval()
    data = case.data()
    return model, data if isinstance(data, Tensor) else list(data)


def some_batch(data: Any) -> Any:
    return data[:16] if isinstance(data, Tensor) else data[0]


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(call(model, batch)))


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    above = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return above / sum(float(b.square().sum()) for b in expected)


def hooks(model: nn.Module) -> int:
    """Hooks in a model, without the one that a quantized layer has of its own (it keeps torch's fast path from passing the layer by)."""
    own = sum(isinstance(module, QuantizedLayer) for module in model.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) - own


def content(result: Result, folder: Path) -> bytes:
    result.save(folder / "content")
    return (folder / "content").read_bytes()


@cases
@flavours
@pytest.mark.parametrize("bits", [(4, 4), (3, None)], ids=["W4A4", "W3"])
def test_every_network_is_quantized(case: Case, recipe: Recipe, bits: tuple[int, int | None], tmp_path: Path) -> None:
    model, data = built(case)
    before, batch = copy.deepcopy(model.state_dict()), some_batch(data)
    expected = outputs(model, batch)
    result = subbyte.quantize(model, data, widths=Widths(*bits), recipe=recipe)

    assert result.allocation == dict.fromkeys(case.layers, bits)
    assert {left.name for left in result.left_out} >= set(case.left_out)
    assert result.measured.loss <= result.measured.baseline_loss
    assert all(math.isfinite(layer.error) and layer.error <= layer.baseline_error for layer in result.layers)

    text = str(result)
    assert all(layer.name in text for layer in result.layers)
    assert all(left.name in text and left.reason in text for left in result.left_out)
    assert result.recipe.flavour.value in text

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hooks(model) == hooks(result.model) == 0
    assert type(result.model) is type(model) and not result.model.training
    found = outputs(result.model, batch)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
    assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    size = result.save(tmp_path / "packed")
    assert size == (tmp_path / "packed").stat().st_size == result.size_bytes
    fresh = subbyte.load(tmp_path / "packed", into=case.build())
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, batch), found, strict=True))


def test_learned_queries_are_refined_and_get_widths_within_a_budget() -> None:
    model, data = built(CASES["learned queries"])
    refinements = (subbyte.BiasTuning(epochs=2), subbyte.Blockwise(iterations=20), subbyte.Networkwise(iterations=20))
    result = subbyte.quantize(model, data, budget=subbyte.Budget(average_bits=4.0), recipe=Recipe(refinements=refinements))
    assert not any("nan" in note or "nothing done" in note for report in result.refinements for note in report.notes)
    assert all(math.isfinite(report.loss) for report in result.refinements)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_every_module_that_is_returned_is_in_evaluation_mode(tmp_path: Path) -> None:
    """Otherwise the model would be refused where it is checked, as `quantize` itself does."""
    result = subbyte.quantize(*built(CASES["residual"]))
    result.save(tmp_path / "x")
    for model in (result.model, subbyte.load(tmp_path / "x", into=ResidualNet())):
        assert [name for name, module in model.named_modules() if module.training] == []


@cases
@flavours
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_eight_bits_are_close_to_float(case: Case, recipe: Recipe, symmetric: bool) -> None:
    model, data = built(case)
    result = subbyte.quantize(model, data, widths=Widths(8, 8), recipe=replace(recipe, symmetric_weights=symmetric))
    few = case in (CASES["one sample"], CASES["two samples"])
    batch = some_batch(data)
    assert relative(outputs(result.model, batch), outputs(model, batch)) < (2e-2 if few else 2e-3)


@pytest.mark.parametrize("name", ["residual", "depthwise", "mixer"])
@flavours
def test_the_same_seed_gives_the_same_bits_and_another_gives_others(name: str, recipe: Recipe, tmp_path: Path) -> None:
    model, data = built(CASES[name])
    widths = Widths(4, 4)
    first = content(subbyte.quantize(model, data, widths=widths, recipe=recipe, seed=3), tmp_path)
    torch.manual_seed(99)
    assert content(subbyte.quantize(model, data, widths=widths, recipe=recipe, seed=3), tmp_path) == first
    assert content(subbyte.quantize(model, data, widths=widths, recipe=recipe, seed=4), tmp_path) != first


def test_chance_of_the_caller_is_not_touched() -> None:
    model, data = built(CASES["twice"])
    state = torch.get_rng_state()
    subbyte.quantize(model, data)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_mode_of_the_caller_does_not_matter(mode: Callable[[], Any], tmp_path: Path) -> None:
    model, data = built(CASES["residual"])
    expected = content(subbyte.quantize(model, data, widths=Widths(4, 4)), tmp_path)
    with mode():
        assert content(subbyte.quantize(model, data, widths=Widths(4, 4)), tmp_path) == expected


def test_batching_of_the_samples_hardly_matters() -> None:
    """The same samples are held out; only the rows drawn inside them may differ."""
    model, data = built(CASES["residual"])
    whole = subbyte.quantize(model, [data], widths=Widths(4, 4))
    parts = subbyte.quantize(model, list(data.split(7)), widths=Widths(4, 4))
    assert whole.measured.held_out_samples == parts.measured.held_out_samples == 5
    assert whole.measured.loss == pytest.approx(parts.measured.loss, rel=0.5)


@flavours
def test_widths_may_differ_from_layer_to_layer(recipe: Recipe) -> None:
    model, data = built(CASES["residual"])
    widths = Widths(3, 4, pinned={"*": (4, None), "stem": 8, "he*": (2, 6)}, exclude=("down",))
    result = subbyte.quantize(model, data, widths=widths, recipe=recipe)
    assert result.allocation == {"stem": (8, 8), "grouped": (4, None), "head": (2, 6)}
    assert {left.name: left.reason for left in result.left_out}["down"] == "excluded by the user"
    assert torch.equal(result.model.down.weight, model.down.weight) and isinstance(result.model.down, nn.Conv2d)
    assert "W8A8" in repr(result.model) and "W4A32" in repr(result.model) and "W2A6" in repr(result.model)


def test_only_included_layers_are_quantized() -> None:
    model, data = built(CASES["residual"])
    assert set(subbyte.quantize(model, data, widths=Widths(include=("stem", "g*"))).allocation) == {"stem", "grouped"}


def test_batch_norms_are_folded_or_not_as_the_recipe_says() -> None:
    model, data = built(CASES["residual"])
    folded = subbyte.quantize(model, data, widths=Widths(8, 8))
    assert [(fold.layer, fold.batch_norm) for fold in folded.folds] == [("stem", "bn")]
    assert "batch norms folded: 1 (bn)" in str(folded)
    assert isinstance(folded.model.bn, nn.Identity) and isinstance(model.bn, nn.BatchNorm2d)
    kept = subbyte.quantize(model, data, widths=Widths(8, 8), recipe=Recipe(fold_batch_norms=False))
    assert kept.folds == () and isinstance(kept.model.bn, nn.BatchNorm2d)
    assert "bn" in {left.name for left in kept.left_out}


class ReadTwiceLater(nn.Module):
    """What the batch norm reads is read by someone else too, but only in batches with a negative sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.bn.running_mean.fill_(1.0)
        self.bn.running_var.fill_(9.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y) + (3 * y if float(x.sum()) < 0 else 0)
        return self.head(z.mean(dim=(2, 3)))


@flavours
def test_a_fold_that_only_a_later_batch_disproves(recipe: Recipe) -> None:
    model = ReadTwiceLater().eval()
    data = [torch.randn(8, 3, 6, 6) + shift for shift in (1.0, 1.0, -1.0, -1.0)]
    result = subbyte.quantize(model, data, widths=Widths(8, 8), recipe=recipe)
    for batch in data:
        assert relative(outputs(result.model, batch), outputs(model, batch)) < 1e-2


@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_torchs_own_transformer_layer_computes_with_quantized_inputs() -> None:
    """In evaluation it has a fast path that reads `linear1.weight` and never calls the layer."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    data = torch.randn(32, 5, 16)
    result = subbyte.quantize(model, data, widths=Widths(8, 2))
    assert set(result.allocation) == {"linear1", "linear2"}
    calls: list[int] = []
    handle = result.model.linear1.register_forward_hook(lambda module, args, output: calls.append(1))
    slow = outputs(result.model, data)
    handle.remove()
    assert calls == [1]
    torch.testing.assert_close(outputs(result.model, data), slow)


@flavours
def test_a_layer_with_hooks_of_the_users_keeps_them_or_is_refused(recipe: Recipe) -> None:
    model, data = built(CASES["twice"])
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.first.register_forward_hook(lambda module, args, output: output - 1)
    try:
        result = subbyte.quantize(model, data, widths=Widths(8, 8), recipe=recipe)
    except subbyte.ModelError:
        return
    assert relative(outputs(result.model, data), outputs(model, data)) < 2e-3


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normed",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
    ids=["weight_norm", "spectral_norm", "weight_norm by hooks", "spectral_norm by hooks"],
)
def test_a_reparametrised_weight_is_quantized_or_refused(normed: Callable[[nn.Module], nn.Module]) -> None:
    model, data = built(CASES["twice"])
    normed(model.step)
    model.eval()
    model(data)
    try:
        result = subbyte.quantize(model, data, widths=Widths(8, 8))
    except subbyte.ModelError as error:
        assert "step" in str(error)
        return
    assert relative(outputs(result.model, data), outputs(model, data)) < 2e-3


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_that_do_and_do_not_require_gradients(frozen: bool, tmp_path: Path) -> None:
    model, data = built(CASES["residual"])
    model.requires_grad_(not frozen)
    result = subbyte.quantize(model, data, widths=Widths(4, 4))
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())
    assert not any(tensor.requires_grad for tensor in result.model.buffers())


def test_the_receipt_counts_to_the_byte(tmp_path: Path) -> None:
    model, data = built(CASES["residual"])
    result = subbyte.quantize(model, data, widths=Widths(4, 4, pinned={"stem": 8, "head": (8, None)}))
    text = str(result)
    size = result.save(tmp_path / "x")
    assert f"packed file: {size:,} bytes" in text
    assert f"float32: {result.float_bytes:,} bytes" in text
    assert result.float_bytes == sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert all(f"{layer.float_bytes:,}" in text and f"{layer.size_bytes:,}" in text for layer in result.layers)
    stem = result.layers[0]
    assert (stem.name, stem.weight_bits, stem.activation_bits) == ("stem", 8, 8)
    assert stem.size_bytes == 8 * 27 + 8 * (4 + 4) + 5
    assert f"seed {result.seed}" in text and "held-out" in text


def test_shared_numbers_count_once_in_the_float_models_bytes() -> None:
    model, data = built(CASES["twice"])
    assert subbyte.quantize(model, data).float_bytes == sum(4 * parameter.numel() for parameter in model.parameters())


def test_what_the_user_should_know_is_said() -> None:
    model, data = built(CASES["residual"])
    result = subbyte.quantize(model, data[:1], widths=Widths(4, 4))
    assert any("single calibration sample" in text for text in result.warnings)
    assert any("too few samples" in text and "head" in text for text in result.warnings)
    assert any("never called" in text and "unused" in text for text in result.warnings)
    assert all(f"warning: {text}" in str(result) for text in result.warnings)


def test_shared_layers_are_noted() -> None:
    model, data = built(CASES["twice"])
    notes = {layer.name: layer.note for layer in subbyte.quantize(model, data).layers}
    assert notes["first"] == "also again" and "called 2 times" in notes["step"] and notes["head"] == "also last"


def test_both_names_of_a_shared_module_are_quantized() -> None:
    model, data = built(CASES["twice"])
    quantized = subbyte.quantize(model, data).model
    assert quantized.again is quantized.first and quantized.last is quantized.head


@dataclass(frozen=True)
class Sabotage(subbyte.Solver):
    """Plain rounding with a bias that is wrong by a constant."""

    def solve(self, problem: subbyte.LayerProblem, generator: torch.Generator) -> subbyte.LayerSolution:
        found = RoundToNearest().solve(problem, generator)
        return replace(found, bias=found.bias + 10.0, solver=self.name)


def test_a_solver_that_is_worse_is_not_kept_and_that_is_said() -> None:
    model, data = built(CASES["residual"])
    result = subbyte.quantize(model, data, widths=Widths(4, 4), recipe=Recipe(solver=Sabotage()))
    assert result.measured.loss <= result.measured.baseline_loss
    assert {layer.solver for layer in result.layers} == {"RoundToNearest"}
    assert all(layer.rejected_error is not None for layer in result.layers)
    assert any("plain rounding was better" in text for text in result.warnings)


def test_a_calibrated_model_that_is_worse_as_a_whole_is_given_up() -> None:
    @dataclass(frozen=True)
    class Reversed(subbyte.RelativeSquaredError):
        """The closer model counts as the worse one."""

        def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
            above, below = super().total(reference, output)
            return 1 / (above + 1e-12), torch.ones_like(below)

    model, data = built(CASES["residual"])
    result = subbyte.quantize(model, data, widths=Widths(2, 2), recipe=Recipe(solver=Lattice(), loss=Reversed()))
    assert result.measured.rejected_loss is not None
    assert result.measured.loss == result.measured.baseline_loss < result.measured.rejected_loss
    assert {layer.solver for layer in result.layers} == {"RoundToNearest"}
    assert any("plainly rounded" in text for text in result.warnings)


def test_events_tell_the_whole_run() -> None:
    model, data = built(CASES["residual"])
    events: list[Event] = []
    result = subbyte.quantize(model, data, widths=Widths(4, 4), observer=events.append)
    started = [event for event in events if isinstance(event, StageStarted)]
    assert [event.stage for event in events if isinstance(event, StageFinished)] == [event.stage for event in started]
    solved = [event for event in events if isinstance(event, LayerSolved)]
    assert [event.layer for event in solved] == list(RESIDUAL) and started[0].total == len(RESIDUAL)
    assert [event.message for event in events if isinstance(event, Warned)] == list(result.warnings)
    assert all(event.seconds >= 0 and math.isfinite(event.error) for event in solved)


def test_the_library_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    subbyte.quantize(*built(CASES["residual"]))
    assert capfd.readouterr() == ("", "")


@flavours
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_behind(recipe: Recipe, kind: type[BaseException]) -> None:
    model, data = built(CASES["residual"])
    before, threads = copy.deepcopy(model.state_dict()), threading.active_count()

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == "grouped":
            raise kind("stop")

    with pytest.raises(kind, match="stop"):
        subbyte.quantize(model, data, recipe=recipe, observer=stop)
    assert threading.active_count() == threads
    assert hooks(model) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    subbyte.quantize(model, data, recipe=recipe)


def test_a_model_that_fails_on_a_later_batch_names_layer_and_batch() -> None:
    model, data = built(CASES["residual"])
    model.unused = nn.Identity().eval()  # with a layer that is never called, the survey runs every batch
    with pytest.raises(LayerError, match=r"batch float32 \(2, 4, 8, 8\)") as caught:
        subbyte.quantize(model, [data[:4], data[4:8], torch.randn(2, 4, 8, 8)])
    assert caught.value.layer == "stem"


def test_the_model_runs_no_more_often_than_the_flavour_needs() -> None:
    """Survey, fold, clips and guard look at single batches or few samples; the calibration set itself is run once by each model, and once
    more for the ranges of channels that can be equalized.
    """
    _, data = built(CASES["residual"])
    seen: list[int] = []

    class Counting(ResidualNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(len(x))
            return super().forward(x)

    counting = Counting().eval()
    counting.unused = nn.Identity().eval()  # with a layer that is never called, the survey runs every batch
    subbyte.quantize(counting, [data[:5]] * 16, recipe=Recipe(flavour=Flavour.PARALLEL))
    # Two passes, a few batches, few samples, the tenth that judges and mixtures of it, sources.
    assert sum(seen) <= 2 * 80 + 4 * 5 + 3 * 8 + 4 * 10 + 2 * 12


def test_a_layer_called_more_often_on_a_later_batch() -> None:
    """Either it works or the layer is named; never a wrong result."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1 + int(float(x.sum()) < 0)):
                x = torch.tanh(self.step(x))
            return self.head(x)

    model, data = Loop().eval(), [torch.rand(8, 6), -torch.rand(8, 6), torch.rand(8, 6)]
    for recipe in FLAVOURS.values():
        try:
            result = subbyte.quantize(model, data, widths=Widths(8, 8), recipe=recipe)
        except LayerError as error:
            assert error.layer == "step"
            continue
        assert all(relative(outputs(result.model, batch), outputs(model, batch)) < 2e-3 for batch in data)


def generate(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(5)


def test_a_generator_is_read_once() -> None:
    model, data = built(CASES["twice"])
    assert subbyte.quantize(model, generate(data)).measured.samples == len(data)


class Own(nn.Linear):
    """Computes something of its own with its weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear has
        return input @ self.weight.square().mT


@pytest.mark.parametrize("exclude", [(), ("1",)], ids=["not asked for", "excluded"])
def test_a_model_that_stays_in_float_for_a_good_part_says_so(exclude: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6) if exclude else Own(8, 6), nn.Linear(6, 2)).eval()
    result = subbyte.quantize(model, torch.randn(40, 8), widths=Widths(4, 8, exclude=exclude))
    told = [text for text in result.warnings if "stay in float32" in text]
    assert len(told) == (not exclude)
    if told:
        assert told[0].startswith("42% of the weights stay in float32")
        assert "1 (Own, 54 parameters): Own has a forward of its own" in told[0]
        assert told[0] in str(result)

"""The survey: which layers there are, in which order they run, and why the rest is left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from subbyte.errors import LayerError, ModelError, OptionError
from subbyte.model.layers import Survey, survey

X = torch.ones(2, 4)


def names(found: Survey) -> list[str]:
    return [layer.name for layer in found.layers]


def reasons(found: Survey) -> dict[str, str]:
    return {left.name: left.reason for left in found.left_out}


class Backwards(nn.Module):
    """Runs its layers in another order than it defines them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.first = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(self.norm(self.first(x)))}


def test_layers_come_in_running_order_and_the_rest_with_a_reason() -> None:
    found, output = survey(Backwards().eval(), [X])
    assert names(found) == ["first", "last"]
    assert reasons(found) == {"unused": "never called in a forward", "norm": "not a linear or convolutional layer or an embedding"}
    assert {left.name: left.parameters for left in found.left_out} == {"unused": 20, "norm": 8}
    assert isinstance(output, dict) and output["logits"].shape == (2, 3)


def test_the_model_is_left_as_it_was() -> None:
    model = Backwards().eval()
    before = copy.deepcopy(model.state_dict())
    survey(model, [X])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_hooks_are_gone_after_a_failure_too() -> None:
    model = Backwards().eval()
    with pytest.raises(ModelError):
        survey(model, [torch.ones(2, 9)])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_numbers_of_a_layer() -> None:
    (layer,) = survey(nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)).eval(), [torch.ones(5, 4, 9, 7)])[0].layers
    assert (layer.name, layer.outputs, layer.unknowns, layer.weight_count) == ("0", 6, 18, 108)
    assert (layer.input_shape, layer.positions, layer.macs) == ((5, 4, 9, 7), 12, 108 * 12)
    assert (layer.has_bias, layer.calls, layer.weight_shape) == (False, 1, (6, 2, 3, 3))
    assert layer.kind.startswith("Conv2d(4, 6")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self.step(x).relu()))


def test_calls_positions_and_macs_add_up() -> None:
    step, head = survey(Twice().eval(), [X])[0].layers
    assert (step.name, step.calls, step.positions, step.macs) == ("step", 2, 2, 32)
    assert (head.name, head.calls) == ("head", 1)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight
        self.table = nn.Embedding(4, 4)
        self.table.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.two(self.one(x))) + self.table.weight.sum()


def test_a_module_under_two_names_is_one_layer_and_a_tied_weight_is_two() -> None:
    one, tied = survey(Shared().eval(), [X])[0].layers
    assert (one.name, one.other_names, one.calls) == ("one", ("two",), 2)
    assert (tied.name, tied.other_names) == ("tied", ())
    assert set(one.tied_with) == {"tied", "table"}
    assert set(tied.tied_with) == {"one", "table"}


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


def test_a_subclass_with_its_own_forward_is_left_out_with_a_reason() -> None:
    found, _ = survey(nn.Sequential(Standardised(4, 4), nn.Linear(4, 2)).eval(), [X])
    assert names(found) == ["1"]
    assert "Standardised has a forward of its own" in reasons(found)["0"]


class Written(nn.Linear):
    """Computes what a linear layer computes, in words of its own, as the layers of Falcon do."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Scaled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class WithTwo(nn.Linear):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return super().forward(x) * factor


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.two, self.written = Scaled(4, 4), WithTwo(4, 4), Written(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self.two(self.table(x), 1.0))


def test_a_subclass_whose_own_forward_computes_the_same_is_a_layer() -> None:
    found, _ = survey(Calls().eval(), [torch.randint(0, 4, (5, 3))])
    assert names(found) == ["written"]
    assert "Scaled has a forward of its own" in reasons(found)["table"]
    assert "WithTwo has a forward of its own" in reasons(found)["two"]


class Experts(nn.Module):
    """Sends each batch to one of its experts, by the sign of its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[0 if x.sum() > 0 else 1]
        return self.head(expert(self.stem(x)))


def test_layers_that_the_first_batch_skips_are_found_in_their_place() -> None:
    found, output = survey(Experts().eval(), [X, 2 * X, -X, -X])
    order = names(found)
    assert set(order) == {"stem", "experts.0", "experts.1", "head"}
    assert order[0] == "stem" and order[-1] == "head"
    assert reasons(found) == {"experts.2": "never called in a forward"}
    model = Experts().eval()
    _, output = survey(model, [X, -X])
    assert torch.equal(output, model(X))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (("*",), (), ["first", "last"]),
        (("f*",), (), ["first"]),
        (("*",), ("last",), ["first"]),
        (("first", "last"), ("f*",), ["last"]),
        (("f?rst",), (), ["first"]),
    ],
)
def test_include_and_exclude(include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]) -> None:
    found, _ = survey(Backwards().eval(), [X], include, exclude)
    assert names(found) == expected
    assert all(reasons(found)[name] == "excluded by the user" for name in {"first", "last"} - set(expected))


@pytest.mark.parametrize(("include", "exclude"), [(("nothing*",), ()), (("*",), ("nothing*",)), (("*", "nothing*"), ())])
def test_a_glob_that_matches_nothing_is_refused_with_the_names(include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=r"no layer matches 'nothing\*'; the layers are .*first"):
        survey(Backwards().eval(), [X], include, exclude)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to quantize"):
        survey(Backwards().eval(), [X], exclude=["*"])


def test_parameters_of_the_model_itself_are_reported() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gain = nn.Linear(4, 2), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.gain.sum()

    (left,) = survey(Scaled().eval(), [X])[0].left_out
    assert (left.name, left.kind, left.parameters) == ("Scaled", "Scaled", 3)


class Odd(nn.Module):
    """Calls its layer in a way that `change` decides."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self.first, self.odd, self.change = nn.Linear(4, 4), nn.Linear(4, 4), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.odd, self.first(x))  # type: ignore[operator]


def test_keyword_input_is_found() -> None:
    assert names(survey(Odd(lambda odd, x: odd(input=x)).eval(), [X])[0]) == ["first", "odd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda odd, x: odd(x / 0), "NaN or infinite"),
        (lambda odd, x: odd(x.double()).float(), "only float32"),
        (lambda odd, x: odd(x.half()).float(), "only float32"),
        (lambda odd, x: odd(x, x), "only one input"),
    ],
    ids=["infinite", "double", "half", "two inputs"],
)
def test_a_layer_with_an_impossible_input_is_named(change: object, message: str) -> None:
    with pytest.raises(LayerError, match=message) as caught:
        survey(Odd(change).eval(), [X])
    assert caught.value.layer == "odd"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda odd, x: odd(x[:, :2]), "layer 'odd' with input float32"),
        (lambda odd, x: odd(x) @ x, "in or after layer 'odd'"),
    ],
    ids=["in", "after"],
)
def test_a_model_that_fails_says_where(change: object, where: str) -> None:
    with pytest.raises(ModelError, match=where) as caught:
        survey(Odd(change).eval(), [X])
    assert "float32 (2, 4)" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_model_that_fails_before_its_first_layer_says_so() -> None:
    with pytest.raises(ModelError, match="before the first layer"):
        survey(Backwards().eval(), [(X, X)])


@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_attention_that_reads_weights_without_calling_its_layer_is_left_out() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found, _ = survey(model, [torch.randn(2, 3, 8)])
    assert names(found) == ["linear1", "linear2"]
    assert reasons(found)["self_attn.out_proj"] == "never called in a forward"
    assert reasons(found)["self_attn"] == "not a linear or convolutional layer or an embedding"

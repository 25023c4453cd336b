"""Sensitivities: Measured against a naive loop, Fisher against Measured where the second order is all there is."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from subbyte import Fisher, KLDivergence, LayerError, Measured, ModelError, OptionError, OutputLoss, OwnLoss, RelativeSquaredError
from subbyte.allocate import fisher
from subbyte.allocate.sensitivity import Sensitivity, SensitivityMethod, sensitivity_of
from subbyte.calibrate.kept import Kept
from subbyte.calibrate.loss import Disagreement, measure
from subbyte.calibrate.models import at_option, state_of
from subbyte.model.batches import call
from subbyte.model.quantized_layer import QuantizedLayer
from subbyte.model.replace import replace_module_
from subbyte.run.bank import Bank
from subbyte.run.events import ignore

from .conftest import OPTIONS, Case, case, chain

LOSSES = [KLDivergence(), KLDivergence(temperature=3.0), RelativeSquaredError()]


def table(network: Case, method: SensitivityMethod, loss: OutputLoss, bank: Bank | None = None) -> Sensitivity:
    return sensitivity_of(network.models, network.solved, network.data, (method, loss), Kept(bank or Bank(), "test"), ignore)


@pytest.mark.parametrize("loss", [*LOSSES, Disagreement()], ids=repr)
@pytest.mark.parametrize("remember", [True, False])
def test_measured_is_what_a_naive_loop_finds(network: Case, loss: OutputLoss, remember: bool) -> None:
    found = table(network, Measured(remember=remember), loss)
    original, batches = network.models.original, network.data.batches
    with torch.no_grad():
        references = [copy.deepcopy(call(original, batch)) for batch in batches]
    for item in network.models.layers:
        for option in OPTIONS:
            changed = copy.deepcopy(original)
            old = changed.get_submodule(item.layer.name)
            new = QuantizedLayer(old, item.layer.operator)
            new.assign_(state_of(at_option(item, option), network.solved[item.layer.name][option].solution))
            replace_module_(changed, old, new)
            expected = measure(changed, batches, references, loss)
            assert found.losses[item.layer.name][option] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_part_of_the_samples_is_whole_batches_spread_evenly() -> None:
    batches = [torch.full((4, 1), float(index)) for index in range(8)]
    chosen = {samples: [int(part[0]) for part in Measured(samples=samples).parts(batches)] for samples in (1, 4, 5, 12, 28, 29, 1000)}
    assert chosen == {1: [0], 4: [0], 5: [0, 4], 12: [0, 2, 5], 28: [0, 1, 2, 3, 4, 5, 6], 29: list(range(8)), 1000: list(range(8))}
    assert Measured().parts(batches) == batches
    with pytest.raises(OptionError, match="at least one sample"):
        Measured(samples=0)


class Handing(nn.Module):
    """A block that leaves something in an attribute of another module."""

    def __init__(self, *, empties: bool) -> None:
        super().__init__()
        self.block, self.head, self.empties = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3), empties
        self.left: list[torch.Tensor] = []
        self.block[1].forward = self._leave

    def _leave(self, x: torch.Tensor) -> torch.Tensor:
        self.left.append(x.tanh())
        return self.left[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        if self.empties:  # fails where the block was not run
            return self.head(self.left.pop())
        scale = 1.0 + len(self.left)  # is another one where the block was not run
        self.left.clear()
        return self.head(y) * scale


@pytest.mark.parametrize("empties", [True, False])
def test_a_model_that_memory_cannot_follow_is_measured_without_it(empties: bool) -> None:
    network = case(Handing(empties=empties), torch.randn(40, 6, generator=torch.Generator().manual_seed(2)))
    found = [table(network, Measured(remember), RelativeSquaredError()).losses for remember in (True, False)]
    assert found[0] == found[1]


def test_a_loss_of_the_users_own_is_asked_for_each_option(network: Case) -> None:
    batch = network.data.batches[0]
    with torch.no_grad():
        labels = call(network.models.original, batch)
        wanted = (labels["logits"] if isinstance(labels, dict) else labels).argmax(dim=-1)

    def cross_entropy(model: nn.Module) -> float:
        with torch.no_grad():
            output = call(model, batch)
        return float(nn.functional.cross_entropy(output["logits"] if isinstance(output, dict) else output, wanted))

    found = table(network, OwnLoss(cross_entropy), KLDivergence())
    assert found.loss_name == "cross_entropy"
    start = cross_entropy(network.models.original)
    for item in network.models.layers:
        changed = copy.deepcopy(network.models.original)
        old = changed.get_submodule(item.layer.name)
        new = QuantizedLayer(old, item.layer.operator)
        new.assign_(state_of(at_option(item, (3, 3)), network.solved[item.layer.name][(3, 3)].solution))
        replace_module_(changed, old, new)
        assert found.losses[item.layer.name][(3, 3)] == pytest.approx(cross_entropy(changed) - start, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_fisher_is_measured_where_changes_are_small(network: Case, loss: OutputLoss) -> None:
    measured, fisher = table(network, Measured(), loss), table(network, Fisher(draws=400), loss)
    for name, row in measured.losses.items():
        # where a layer is called twice, the second call rounds what the first has changed, which is not linear: 0.95 to 1.35 over seeds
        near = 0.4 if name == "twice" else 0.15
        assert fisher.losses[name][(8, 8)] == pytest.approx(row[(8, 8)], rel=near), name
    ratios = [fisher.losses[name][option] / row[option] for name, row in measured.losses.items() for option in OPTIONS]
    assert 0.3 < min(ratios) and max(ratios) < 3.0


@pytest.mark.parametrize("method", [Fisher(), Measured()], ids=repr)
def test_the_model_is_left_as_it_was_and_numbers_repeat(network: Case, method: SensitivityMethod) -> None:
    original = network.models.original
    before = copy.deepcopy(original.state_dict())
    wanted = [parameter.requires_grad for parameter in original.parameters()]
    first, second = table(network, method, KLDivergence()), table(network, method, KLDivergence())
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert wanted == [parameter.requires_grad for parameter in original.parameters()]
    assert all(parameter.grad is None for parameter in original.parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in original.modules())


def test_batches_in_the_bank_are_not_measured_again(network: Case) -> None:
    bank = Bank()
    first = table(network, Fisher(), KLDivergence(), bank)

    class Broken(Fisher):
        def share(self, *given: object) -> None:  # type: ignore[override]
            raise AssertionError("measured again")

    Broken.__qualname__ = Fisher.__qualname__  # the same settings, as far as a digest can see
    assert table(network, Broken(), KLDivergence(), bank).losses == first.losses


@pytest.mark.parametrize("shape", [(40, 6), (40, 3, 6)], ids=str)
def test_a_layer_whose_output_is_changed_in_place_has_the_same_sensitivities(shape: tuple[int, ...]) -> None:
    """A linear layer returns a view where its input has more than two dimensions."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=inplace), nn.Linear(16, 5))
        found.append(table(case(model, torch.randn(shape)), Fisher(), KLDivergence()).losses)
    assert found[0] == found[1]


def test_a_layer_that_no_gradient_reaches_is_named() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).detach())

    network = case(Detached(), torch.randn(40, 6))
    with pytest.raises(LayerError, match=r"'first'.*Measured\(\)"):
        table(network, Fisher(), KLDivergence())
    assert all(loss > 0 for loss in table(network, Measured(), KLDivergence()).losses["first"].values())


def test_a_model_without_gradients_asks_for_measured() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).sigmoid()
            out = self.second(y)
            y.mul_(2.0)  # what the gradient of the sigmoid needs
            return out

    with pytest.raises(ModelError, match=r"differentiated.*Measured\(\)"):
        table(case(Overwriting(), torch.randn(40, 6)), Fisher(), KLDivergence())


def test_a_loss_without_a_probe_asks_for_measured() -> None:
    with pytest.raises(OptionError, match=r"Measured\(\)"):
        table(case(chain(), torch.randn(40, 6)), Fisher(), Disagreement())


def test_infinite_negative_and_nan_entries_are_named() -> None:
    odd = Sensitivity({"a": {(2, 2): math.inf, (4, 4): -0.1}, "b": {(2, 2): 1.0}}, "mine", "by hand")
    assert [note for note in odd.notes if "'a'" in note] == list(odd.notes) and len(odd.notes) == 2
    for number in (math.nan, -math.inf):
        with pytest.raises(LayerError, match="'b'"):
            Sensitivity({"a": {(2, 2): 1.0}, "b": {(2, 2): number}}, "mine", "by hand")
    with pytest.raises(LayerError, match="'a'.*each of its options"):
        Sensitivity({"a": {(2, 2): math.inf}}, "mine", "by hand")


class Unread(nn.Module):
    """A layer that nothing reads, beside one that only a step function reads."""

    def __init__(self, step: bool) -> None:
        super().__init__()
        self.body, self.pooler, self.step = nn.Linear(6, 6), nn.Linear(6, 6), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        pooled = self.pooler(y)
        return y + (pooled > 0).float() if self.step else y


def test_a_layer_that_nothing_reads_costs_nothing_at_any_width() -> None:
    found = table(case(Unread(step=False), torch.randn(40, 6)), Fisher(), RelativeSquaredError())
    assert set(found.losses["pooler"].values()) == {0.0} and min(found.losses["body"].values()) > 0


def test_a_layer_that_counts_and_gets_no_gradient_is_refused() -> None:
    with pytest.raises(LayerError, match="use the sensitivity method Measured"):
        table(case(Unread(step=True), torch.randn(40, 6)), Fisher(), RelativeSquaredError())


def test_fisher_finds_the_same_whichever_way_products_are_formed(network: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = table(network, Fisher(), KLDivergence())
    for name, value in {"GRADIENT_POSITIONS": 10**9, "MOST_GRADIENTS": 1}.items():
        with monkeypatch.context() as patch:
            patch.setattr(fisher, name, value)
            other = table(network, Fisher(), KLDivergence())
        for layer, row in found.losses.items():
            assert list(other.losses[layer].values()) == pytest.approx(list(row.values()), rel=1e-3)


def test_a_loss_on_samples_of_the_users_own_is_taken_as_it_is(network: Case) -> None:
    first = network.models.layers[0].layer.name
    known = {option: replace(judged, gap=3.0) for option, judged in network.solved[first].items()}
    found = []
    for solved in (network.solved, {**network.solved, first: known}):
        asked = iter(range(1000))
        found.append(
            table(replace(network, solved=solved), OwnLoss(lambda model, asked=asked: float(next(asked))), RelativeSquaredError()).losses
        )
    assert found[0] == found[1] and all(loss > 0 for loss in found[0][first].values())


@pytest.mark.parametrize("method", [Fisher(), Measured()], ids=repr)
def test_a_layer_that_knows_its_samples_by_heart_counts_as_on_others(network: Case, method: SensitivityMethod) -> None:
    first, *others = [item.layer.name for item in network.models.layers]
    gap, held = 3.0, torch.cat(list(network.data.held_out)).double().mean().item()
    known = {option: replace(judged, gap=gap) for option, judged in network.solved[first].items()}
    before = table(network, method, RelativeSquaredError()).losses
    after = table(replace(network, solved={**network.solved, first: known}), method, RelativeSquaredError()).losses
    assert 0 < held < 1 and all(after[name] == before[name] for name in others)
    for option, loss in before[first].items():  # what it is on all samples, the held-out ones among them, for what it is on these
        assert after[first][option] * (1 - held + held * gap) == pytest.approx(gap * loss)

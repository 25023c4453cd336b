"""Budgets through the front door: bytes to the byte, limits that hold as measured, other budgets from one bank, a killed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import subbyte
from subbyte import (
    Bank,
    Budget,
    Choices,
    Flavour,
    InfeasibleError,
    KLDivergence,
    LayerError,
    Measured,
    OptionError,
    Recipe,
    Result,
    Solver,
    Widths,
)
from subbyte.allocate.saved import load_market, market_data, market_from
from subbyte.calibrate.loss import measure
from subbyte.calibrate.problem import LayerProblem, LayerSolution
from subbyte.calibrate.whole import Judge
from subbyte.errors import FileError
from subbyte.run.events import Event, LayerSolved, StepDone


def build() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )
    return net.eval()


SAMPLES = torch.randn(96, 2, 8, 8, generator=torch.Generator().manual_seed(5))
NAMES = ["0", "3", "6", "8"]


def quantized(budget: Budget, recipe: Recipe | None = None, bank: Bank | None = None) -> Result:
    return subbyte.quantize(build(), SAMPLES, budget=budget, recipe=recipe or Recipe(), bank=bank)


CHOICES = {
    "tied": Choices(),
    "eight-bit inputs": Choices((2, 3, 5, 8), activation_bits=(8,)),
    "independent": Choices((2, 4), activation_bits=(3, 6)),
    "float inputs": Choices((2, 3, 4, 7), activation_bits=(None,)),
    "pinned": Choices((2, 3, 4), pinned={"0": (8, None)}, exclude=("8",)),
    "one left": Choices((2, 3, 4, 5, 6, 7), activation_bits=(None,), pinned={"8": (8, 8)}),
}


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_the_file_has_the_bytes_that_were_counted(choices: Choices, affine: bool, tmp_path: Path) -> None:
    recipe, bank = Recipe(symmetric_weights=not affine, solver=subbyte.RoundToNearest()), Bank()
    for average_bits in (2.6, 3.4, 5.0):
        budget = Budget(bytes=100_000, average_bits=max(average_bits, 3.9 if choices is CHOICES["one left"] else 0), choices=choices)
        result = quantized(budget, recipe, bank)
        assert result.plan is not None
        assert result.save(tmp_path / "packed") == (tmp_path / "packed").stat().st_size == result.plan.allocation.size_bytes
        assert result.plan.allocation.average_bits <= budget.average_bits
        assert result.allocation == result.plan.allocation.options


def test_every_size_on_the_frontier_is_that_of_a_file() -> None:
    result = quantized(Budget(size=0.2), Recipe(solver=subbyte.RoundToNearest()))
    assert result.plan is not None
    points = result.plan.frontier(6)
    assert [p.size_bytes for p in points] == sorted({p.size_bytes for p in points})
    assert [p.predicted for p in points] == sorted({p.predicted for p in points}, reverse=True)
    for point in points:
        fixed = subbyte.quantize(build(), SAMPLES, widths=Widths(pinned=dict(point.options)), recipe=subbyte.rounding())
        assert fixed.size_bytes == point.size_bytes


def test_the_receipt_tells_predicted_beside_measured_and_the_proof() -> None:
    result = quantized(Budget(size=0.17))
    assert result.plan is not None and result.widths is None
    assert result.plan.allocation.status == "optimal" and result.plan.allocation.gap == 0
    assert result.size_bytes <= 0.17 * result.float_bytes
    text = str(result)
    assert "proved optimal" in text and "RelativeSquaredError by Fisher over 4 layers and 28 options: predicted" in text
    assert f"measured on held-out samples {result.plan.measured_loss:.4g}" in text


@dataclass(frozen=True)
class Telling(Solver):
    """Plain rounding that tells whether the whole solver or its draft was asked, and at which width."""

    asked: list[tuple[str, int]] = field(default_factory=list, compare=False, repr=False)
    is_draft: bool = False

    @property
    def draft(self) -> Telling:
        return replace(self, is_draft=True)

    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        self.asked.append(("draft" if self.is_draft else "whole", problem.weight_grid.bits))
        return subbyte.RoundToNearest().solve(problem, generator)


@pytest.mark.parametrize("flavour", Flavour, ids=lambda flavour: flavour.value)
def test_tables_are_drafts_where_layers_are_solved_anew(flavour: Flavour) -> None:
    solver, bank, choices = Telling(), Bank(), Choices((2, 4, 8), activation_bits=(8,))
    result = quantized(Budget(size=0.17, choices=choices), Recipe(solver=solver, flavour=flavour), bank)
    table = [(kind, bits) for kind in ("draft" if flavour is Flavour.SEQUENTIAL else "whole",) for bits in (2, 4, 8)] * len(NAMES)
    chosen = [("whole", result.allocation[name][0]) for name in NAMES] if flavour is Flavour.SEQUENTIAL else []
    assert sorted(solver.asked) == sorted(table + chosen)
    quantized(Budget(size=0.17, choices=choices), Recipe(solver=solver, flavour=flavour), bank)
    assert len(solver.asked) == len(table + chosen), "both are kept"


def test_a_draft_is_never_taken_for_a_solution() -> None:
    """A bank that a sequential run has filled with drafts serves a parallel one as an empty bank does."""
    bank, parallel = Bank(), Recipe(flavour=Flavour.PARALLEL)
    quantized(Budget(size=0.17), bank=bank)
    one, other = (quantized(Budget(size=0.17), parallel, kept) for kept in (bank, Bank()))
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())


@pytest.mark.parametrize("limit", [0.3, 0.03, 0.003])
def test_a_limit_on_kl_holds_as_measured(limit: float) -> None:
    bank = Bank()
    result = quantized(Budget(kl=limit), bank=bank)
    plan = result.plan
    assert plan is not None and plan.sensitivity.loss_name == "KLDivergence" and plan.missed == {}
    kept = next(one for one in plan.rounds if one.allocation.options == result.allocation)
    assert kept.met and kept.measured["kl"] <= limit and 1 <= len(plan.rounds) <= 16
    assert result.measured.held_out_samples == 24
    assert all(one.allocation.size_bytes >= result.size_bytes for one in plan.rounds if one.met)
    again = quantized(Budget(kl=limit), bank=bank)
    assert again.allocation == result.allocation and torch.equal(again.model(SAMPLES), result.model(SAMPLES))


def test_limits_on_cost_and_degradation_together() -> None:
    result = quantized(Budget(minimize="bit_operations", kl=0.1, size=0.2))
    assert result.plan is not None and result.size_bytes <= 0.2 * result.float_bytes
    assert result.plan.allocation.minimized == "bit_operations"


def test_an_accuracy_that_the_user_measures() -> None:
    labels = build()(SAMPLES).argmax(dim=1)

    def score(model: nn.Module) -> float:
        return 100.0 * float((model(SAMPLES).argmax(dim=1) == labels).double().mean())

    result = quantized(Budget(accuracy_drop=5.0, score=score))
    assert result.plan is not None and score(result.model) >= 95.0
    assert any(one.measured["accuracy_drop"] == 100.0 - score(result.model) for one in result.plan.rounds)


def test_a_limit_that_cannot_be_met_says_by_how_much() -> None:
    impossible = Budget(kl=1e-12)
    with pytest.raises(InfeasibleError, match=r"as measured on 24 held-out samples and 360 mixtures of them; the least is") as caught:
        quantized(impossible)
    assert caught.value.limit == "kl" and caught.value.nearest is not None and caught.value.nearest > 1e-12
    best = quantized(Budget(kl=1e-12, best_effort=True))
    assert best.plan is not None and best.plan.missed["kl"] > 1e-12
    assert any("kl is" in text and "above its limit" in text for text in best.warnings)


def test_limits_are_measured_on_mixtures_too_unless_these_make_no_sense() -> None:
    def measured(budget: Budget, recipe: Recipe) -> tuple[float, float, float]:
        result = quantized(budget, recipe)
        assert result.plan is not None
        alone = Judge.of(result.original, result.calibration, KLDivergence())
        mixed = alone.with_mixtures(result.original, 15, seed=0)
        assert (alone.held_out_samples, mixed.mixtures) == (24, 360)
        kept = next(one.measured["kl"] for one in result.plan.rounds if one.allocation.options == result.allocation)
        return kept, alone.loss_of(result.model), mixed.loss_of(result.model)

    kept, alone, mixed = measured(Budget(kl=0.02), Recipe())
    assert kept == mixed != alone
    kept, alone, mixed = measured(Budget(kl=0.02, mixtures=0), Recipe())
    assert kept == alone != mixed
    kept, alone, mixed = measured(Budget(kl=0.02), Recipe(mixtures=0))
    assert kept == alone != mixed
    with pytest.raises(OptionError, match="mixtures are counted from 0, not -1"):
        Budget(kl=0.02, mixtures=-1)


def test_sizes_that_cannot_be_had_name_the_nearest() -> None:
    with pytest.raises(InfeasibleError) as caught:
        quantized(Budget(bytes=100))
    assert caught.value.limit == "bytes" and caught.value.nearest is not None
    nearest = quantized(Budget(bytes=int(caught.value.nearest)))
    assert nearest.size_bytes == caught.value.nearest


def test_ties_pins_and_tables_of_seconds() -> None:
    options = Choices((2, 4, 8), ties=[("3", "6")], pinned={"0": 8})
    row = {(bits, bits): 1e-3 * bits for bits in (2, 4, 8)}
    result = quantized(Budget(latency=0.022, choices=options, seconds=dict.fromkeys(NAMES, row)))
    chosen = result.allocation
    assert chosen["0"] == (8, 8) and chosen["3"] == chosen["6"]
    assert sum(row[option] for option in chosen.values()) <= 0.022
    with pytest.raises(OptionError, match="no entry for layer '8'"):
        quantized(Budget(latency=1.0, choices=options, seconds=dict.fromkeys(NAMES[:3], row)))


def test_other_budgets_reuse_what_was_solved_and_measured() -> None:
    bank, events = Bank(), list[Event]()
    quantized(Budget(size=0.2), bank=bank)
    subbyte.quantize(build(), SAMPLES, budget=Budget(size=0.18), observer=events.append, bank=bank)
    assert not any(isinstance(event, LayerSolved) and event.stage == "reconstruct" for event in events)
    parallel = subbyte.quantize(build(), SAMPLES, budget=Budget(size=0.2), recipe=Recipe(flavour=Flavour.PARALLEL), bank=bank)
    fresh = subbyte.quantize(build(), SAMPLES, budget=Budget(size=0.2), recipe=Recipe(flavour=Flavour.PARALLEL))
    assert torch.equal(parallel.model(SAMPLES), fresh.model(SAMPLES))
    assert any(isinstance(event, StepDone) for event in events)


def test_a_market_survives_its_file(tmp_path: Path) -> None:
    result = quantized(Budget(size=0.2), Recipe(solver=subbyte.RoundToNearest()), Bank(tmp_path))
    assert result.plan is not None
    market = load_market(tmp_path)
    assert market_data(market) == market_data(market_from(market_data(result.plan.market)))
    assert market.sensitivity == result.plan.sensitivity and market.costs == result.plan.market.costs
    (tmp_path / "market.json").write_text("{}")
    with pytest.raises(FileError, match="damaged"):
        load_market(tmp_path)


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    quantized(Budget(size=0.2), Recipe(solver=subbyte.RoundToNearest()), Bank(tmp_path))
    entry = next(iter((tmp_path / "bank").glob("*.safetensors")))
    for path in (tmp_path / "bank").glob("*.safetensors"):
        path.write_bytes(entry.read_bytes()[:50])
    with pytest.raises(FileError, match="damaged.*remove it"):
        quantized(Budget(size=0.2), Recipe(solver=subbyte.RoundToNearest()), Bank(tmp_path))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import torch, subbyte
torch.set_num_threads(1)
from test_budget_net import build, SAMPLES
budget = subbyte.Budget(size=0.2, choices=subbyte.Choices((2, 4, 8)))
result = subbyte.quantize(build(), SAMPLES, budget=budget, bank=subbyte.Bank(Path(sys.argv[1])))
result.save(Path(sys.argv[1]) / "packed")
"""


def test_a_killed_run_goes_on_and_gives_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "test_budget_net.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-c", KILLED.format(folder=str(tmp_path))]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True)
    entries = len(list((whole / "bank").iterdir()))
    for wanted in (entries // 2,):
        process = subprocess.Popen([*command, str(killed)])
        while process.poll() is None and (not killed.is_dir() or len(list(killed.glob("bank/*.safetensors"))) < wanted):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = {path.name: path.read_bytes() for path in killed.glob("bank/*.safetensors")}
    subprocess.run([*command, str(killed)], check=True)
    for path in (*(whole / "bank").glob("*.safetensors"), whole / "packed"):
        assert (killed / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert len(before) >= entries // 2 and all((killed / "bank" / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a limit"),
        ({"minimize": "speed", "size": 0.1}, "minimize is one of"),
        ({"size": 0}, "share of the float model's bytes"),
        ({"agreement": 101}, "percentage"),
        ({"kl": float("nan")}, "not negative"),
        ({"accuracy_drop": 1.0}, "belong together"),
        ({"latency": 1.0}, "time of each layer"),
        ({"kl": 0.1, "held_out": 0.9}, "held_out"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Budget(**fields)  # type: ignore[arg-type]


def test_widths_and_budget_together_are_refused() -> None:
    with pytest.raises(OptionError, match="not both"):
        subbyte.quantize(build(), SAMPLES, widths=Widths(4, 4), budget=Budget(size=0.1))


def test_measured_and_a_loss_of_the_users_choice() -> None:
    result = quantized(Budget(size=0.17, loss=KLDivergence(2.0)), Recipe(sensitivity=Measured(), solver=subbyte.RoundToNearest()))
    assert result.plan is not None and (result.plan.sensitivity.method, result.plan.sensitivity.loss_name) == ("Measured", "KLDivergence")
    held = result.plan.measured_loss
    assert held >= 0 and measure(result.model, [SAMPLES], [build()(SAMPLES).detach()], KLDivergence(2.0)) > 0
    assert issubclass(LayerError, subbyte.ModelError)

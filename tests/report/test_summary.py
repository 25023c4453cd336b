"""A summary says what its result says, survives JSON, and names what nobody should overlook."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

import subbyte
from subbyte.report.planned import Limit
from subbyte.report.stored import SUMMARY_FILE, as_data, from_data, keep_export, load_summary, save_summary
from subbyte.report.summary import Score, Summary


def test_fixed_widths(fixed: subbyte.Result) -> None:
    summary = fixed.summary(scores={"top-1 %": (90.0, 89.5)})
    assert summary.model == "Sequential" and summary.layers == fixed.layers and summary.planned is None
    assert (summary.size_bytes, summary.float_bytes, summary.loss) == (fixed.size_bytes, fixed.float_bytes, fixed.loss)
    assert summary.times_smaller == fixed.float_bytes / fixed.size_bytes
    weights = [8 * 9, 8 * 8 * 9, 128 * 5]
    assert [layer.weight_count for layer in summary.layers] == weights
    assert summary.average_bits == pytest.approx((8 * weights[0] + 4 * weights[1] + 4 * weights[2]) / sum(weights))
    assert summary.asked == "Widths(weight_bits=4, activation_bits=None, pinned={'0': (8, 8)})"
    assert summary.differing == () and summary.recipe["flavour"] == "'sequential'" and "ridges" in summary.recipe["solver"]
    assert summary.scores == {"top-1 %": Score(90.0, 89.5)} and summary.agreement is None
    assert [step.name for step in summary.steps] == ["RoundToNearest everywhere", "Lattice"]
    assert [step.loss for step in summary.steps] == [fixed.measured.baseline_loss, fixed.measured.loss]
    assert set(summary.versions) == {"subbyte", "torch", "Python"}


def test_a_budget(budgeted: subbyte.Result, exported: subbyte.Exported) -> None:
    summary, plan = budgeted.summary([exported]), budgeted.plan
    assert plan is not None and summary.planned is not None
    planned = summary.planned
    assert planned.chosen == {name: f"W{weight_bits}A8" for name, (weight_bits, _) in budgeted.allocation.items()}
    assert planned.options == ("W8A8", "W4A8", "W2A8") and list(planned.table) == [layer.name for layer in summary.layers]
    assert sum(planned.sensitivity(name) for name in planned.table) == pytest.approx(planned.predicted)
    assert (planned.size_bytes, planned.measured, planned.status) == (budgeted.size_bytes, plan.measured_loss, "optimal")
    assert [point.size_bytes for point in planned.frontier] == [point.size_bytes for point in plan.frontier()]
    assert [one.kept for one in planned.rounds].count(True) == 1 and len(planned.rounds) == len(plan.rounds)
    kept = next(one for one in planned.rounds if one.kept)
    assert planned.limits == (
        Limit("relative_error", 0.05, kept.measured["relative_error"]),
        Limit("agreement", pytest.approx(80.0), kept.measured["agreement"], least=True),
    )
    assert all(limit.met for limit in planned.limits) and summary.agreement == kept.measured["agreement"]
    assert [step.name for step in summary.steps][2:] == ["BatchNormTuning", "BiasTuning"]
    assert summary.differing == ("refinements",)
    file = summary.files[0]
    assert file.name == "net.onnx" and file.verification == exported.verification and file.warnings == exported.warnings


def test_an_agreement_below_its_limit_is_missed() -> None:
    assert not Limit("agreement", 99.0, 98.9, least=True).met and Limit("agreement", 99.0, 99.0, least=True).met
    assert not Limit("latency", 1.0, math.nan).met


def test_what_nobody_should_overlook(troubled: Summary) -> None:
    alerts = troubled.alerts
    assert [alert.title for alert in alerts] == ["Warning", "Warning", "Refinement taken back", "Plain rounding", "Left in float32"]
    assert [alert.serious for alert in alerts] == [True, True, False, False, False]
    assert "BiasTuning" in alerts[2].text and "nan" in alerts[2].text
    assert "Lattice left these layers to RoundToNearest: <script>" in alerts[3].text
    assert alerts[4].text.startswith("2 of the model's modules, 76 bytes") and alerts[4].text.endswith("4, the model itself")
    assert not any(alert.serious for alert in replace(troubled, warnings=()).alerts)


def test_warnings_of_an_export_are_serious(budgeted: subbyte.Result, exported: subbyte.Exported) -> None:
    told = replace(exported, warnings=("the file is not faster",))
    serious = [alert for alert in budgeted.summary([told]).alerts if alert.serious]
    assert [(alert.title, alert.text) for alert in serious[len(budgeted.warnings) :]] == [("ONNX file net.onnx", "the file is not faster")]


def test_a_given_up_calibration_is_a_step_that_was_not_kept(fixed: subbyte.Result) -> None:
    summary = fixed.summary()
    lost = replace(summary, measured=replace(summary.measured, loss=0.2, baseline_loss=0.2, rejected_loss=0.3))
    assert [(step.name, step.loss, step.kept) for step in lost.steps] == [("RoundToNearest everywhere", 0.2, True), ("Lattice", 0.3, False)]


@pytest.mark.parametrize("name", ["fixed", "budgeted", "troubled"])
def test_json_there_and_back(name: str, request: pytest.FixtureRequest, exported: subbyte.Exported, tmp_path: Path) -> None:
    made = request.getfixturevalue(name)
    summary = made if isinstance(made, Summary) else made.summary([exported], {"own": (1.0, math.inf)})
    save_summary(tmp_path / "run", summary)
    text = (tmp_path / "run" / SUMMARY_FILE).read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    again = load_summary(tmp_path / "run")
    assert as_data(again) == as_data(summary)  # compared as data, where NaN is a text and equals itself
    assert name == "troubled" or again == summary


def test_a_run_folder_keeps_it(samples: Tensor, tmp_path: Path) -> None:
    float_model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    result = subbyte.quantize(float_model, samples, recipe=subbyte.rounding(), bank=subbyte.Bank(tmp_path / "run"))
    assert load_summary(tmp_path / "run") == result.summary()


@pytest.mark.parametrize("change", [{"layers": 3}, {"seed": 1.5}, {"loss": True}, {"asked": None}, {"model": None, "seed": "0"}])
def test_another_document_is_refused(change: dict[str, object], fixed: subbyte.Result, tmp_path: Path) -> None:
    path = tmp_path / SUMMARY_FILE
    path.write_text(json.dumps(as_data(fixed.summary()) | change))
    with pytest.raises(subbyte.FileError, match="is damaged or of another version"):
        load_summary(tmp_path)
    path.write_text("{")
    with pytest.raises(subbyte.FileError, match="is damaged"):
        load_summary(tmp_path)


def test_numbers_are_shortened_only_where_asked() -> None:
    assert as_data({"a": (1 / 3, 12)}, digits=3) == {"a": [0.333, 12]} and as_data(1 / 3) == 1 / 3
    assert from_data(tuple[float, ...], ["NaN", "Infinity", 2])[1:] == (math.inf, 2.0)


def test_exports_are_noted_in_the_run_that_they_are_of(budgeted: subbyte.Result, exported: subbyte.Exported, tmp_path: Path) -> None:
    run, packed = tmp_path / "run", tmp_path / "run" / "model.subbyte.safetensors"
    save_summary(run, budgeted.summary())
    budgeted.save(packed)
    for _ in range(2):
        keep_export(packed, exported)
    assert [file.name for file in load_summary(run).files] == ["net.onnx"]
    packed.write_bytes(b"of another run")
    keep_export(packed, replace(exported, path=Path("other.onnx")))
    assert [file.name for file in load_summary(run).files] == ["net.onnx"]
    elsewhere = tmp_path / "alone.safetensors"
    budgeted.save(elsewhere)
    keep_export(elsewhere, exported)
    assert not (tmp_path / SUMMARY_FILE).exists()

"""The tables in docs/results.md are those that the benchmarks print for their recorded rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return found


def test_the_table_of_the_main_job_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark("main_job", monkeypatch).table(rows("main_job")) in RESULTS


def test_the_table_of_low_bits_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark("low_bits", monkeypatch).table(rows("low_bits")) in RESULTS


def test_the_table_of_solvers_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark("solvers", monkeypatch).table(rows("solvers")) in RESULTS


def test_the_table_of_column_groups_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    assert benchmark("column_groups", monkeypatch).table(rows("column_groups")) in RESULTS


def test_the_table_of_onnx_files_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for measured in ("onnx", "onnx_amx", "onnx_without_amx", "onnx_avx2"):
        assert benchmark("onnx_files", monkeypatch).table(rows(measured)) in RESULTS


def test_the_table_of_agreement_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert benchmark("onnx_agreement", monkeypatch).table(rows("onnx_agreement")) in RESULTS


def test_the_table_of_sample_counts_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert benchmark("sample_count", monkeypatch).table(rows("sample_count")) in RESULTS


@pytest.mark.parametrize("name", ["text", "embeddings"])
def test_the_tables_of_text_encoders_are_those_of_their_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    assert benchmark("text", monkeypatch).table(rows(name)) in RESULTS


def test_the_table_of_causal_models_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    for name in ("causal_lm", "causal_lm_zero_points"):
        assert benchmark("causal_lm", monkeypatch).table(rows(name)) in RESULTS


def test_the_figures_of_the_encoders_file_are_those_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    row = json.loads((ROOT / "docs" / "results" / "encoder_onnx.json").read_text(encoding="utf-8"))
    assert benchmark("encoder_onnx", monkeypatch).table(row).split("\n\n")[1] in RESULTS
    assert f"{row['int8']} of {row['layers']} layers in int8, {row['bytes']:,} bytes" in RESULTS
    assert f"simulation {row['agreement']:.2f} %, top-1 {row['accuracy']:.2f} %" in RESULTS


def test_the_table_of_layouts_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    assert benchmark("architectures", monkeypatch).table(rows("architectures")) in RESULTS


def test_the_tables_of_the_recipes_are_those_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("recipes", monkeypatch)
    assert module.recipes_table(rows("recipes")) in RESULTS
    assert module.steps_table(rows("recipes")) in RESULTS


def test_no_recorded_step_of_a_recipe_made_the_held_out_loss_worse() -> None:
    for row in rows("recipes"):
        losses = [step["loss"] for step in row["steps"]]
        assert losses == sorted(losses, reverse=True), (row["network"], row["recipe"], row["seed"])

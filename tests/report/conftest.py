"""Runs of a small network, made once: with fixed widths, within a budget, and one that went wrong wherever it could."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import subbyte
from subbyte.calibrate.refinement import RefinementReport
from subbyte.model.layers import LeftOut
from subbyte.report.summary import Summary

HOSTILE = "<script>alert('&amp;')</script>"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Flatten())
    net.add_module(HOSTILE, nn.Linear(128, 5))
    return net.eval()


@pytest.fixture(scope="session")
def samples() -> torch.Tensor:
    return torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def fixed(samples: torch.Tensor) -> subbyte.Result:
    return subbyte.quantize(network(), samples, widths=subbyte.Widths(4, None, pinned={"0": (8, 8)}))


@pytest.fixture(scope="session")
def budgeted(samples: torch.Tensor) -> subbyte.Result:
    budget = subbyte.Budget(relative_error=0.05, agreement=80, choices=subbyte.Choices((2, 4, 8), activation_bits=(8,)))
    return subbyte.quantize(network(), samples, budget=budget, recipe=subbyte.advanced())


@pytest.fixture(scope="session")
def exported(budgeted: subbyte.Result, tmp_path_factory: pytest.TempPathFactory) -> subbyte.Exported:
    pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", subbyte.ExportWarning)  # so small a network is neither smaller nor faster
        return budgeted.export_onnx(tmp_path_factory.mktemp("onnx") / "net.onnx", threads=1)


@pytest.fixture(scope="session")
def troubled(fixed: subbyte.Result) -> Summary:
    """Everything that a user must not overlook, at once."""
    summary = fixed.summary()
    first, second, third = summary.layers
    layers = (
        replace(first, solver="RoundToNearest", rejected_error=float("nan"), error=first.baseline_error),
        replace(second, unknowns=100, equations=10),
        replace(third, solver="RoundToNearest", error=0.0, baseline_error=0.0),
    )
    refinements = (RefinementReport("BiasTuning", summary.loss, float("nan"), 1.5, ("it <diverged>",)),)
    left_out = (*summary.left_out, LeftOut("", "Odd", 3, "<b>its own reason</b>"))
    told = ("too few samples to determine these layers", "x" * 2000)
    return replace(summary, layers=layers, refinements=refinements, left_out=left_out, warnings=told)


@pytest.fixture(scope="session")
def many(budgeted: subbyte.Result) -> Callable[[int], Summary]:
    """The same run as of a model with many layers."""
    summary = budgeted.summary()
    planned, layers = summary.planned, summary.layers
    assert planned is not None

    def of(count: int) -> Summary:
        names = {f"model.encoder.layers.{k // 6}.block.{'abcdef'[k % 6]}_proj": layers[k % len(layers)] for k in range(count)}
        table = {name: planned.table[layer.name] for name, layer in names.items()}
        chosen = {name: planned.chosen[layer.name] for name, layer in names.items()}
        renamed = tuple(replace(layer, name=name) for name, layer in names.items())
        return replace(summary, layers=renamed, planned=replace(planned, table=table, chosen=chosen))

    return of

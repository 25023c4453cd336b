"""`make demo` prints what it measured, and leaves the files that it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from subbyte.export.packed import read_packed
from subbyte.tasks import demo


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "WIDTHS", (4, 2))
    demo.main(tmp_path / "demo")
    printed = capsys.readouterr().out
    rows = {int(row[0]): row for row in (line.split() for line in printed.splitlines()) if len(row) == 11 and row[1] == "b"}
    assert set(rows) == {4, 2}
    four, two = (dict(zip(("float", "rounding", "subbyte"), map(float, rows[bits][4:7]), strict=True)) for bits in (4, 2))
    assert four["float"] >= 98 and four["subbyte"] >= four["float"] - 1
    assert two["subbyte"] >= two["rounding"] + 3, "calibration should show where rounding fails"
    assert two["float"] - two["subbyte"] <= (two["float"] - two["rounding"]) / 3, "calibration should show there"
    path, onnx, page = (tmp_path / "demo" / name for name in ("digits-w4a4.subbyte.safetensors", "digits.onnx", "report.html"))
    assert set((tmp_path / "demo").iterdir()) == {path, onnx, page}
    report = page.read_text(encoding="utf-8")
    assert f"Wrote {page}" in printed and report.startswith("<!DOCTYPE html>") and "digits.onnx" in report and "conv5" in report
    assert f"{onnx.stat().st_size:,} bytes, float" in printed and "int8 kernels: 6 of 6 layers" in printed
    assert read_packed(path).metadata["weight_bits"] == [8, 4, 4, 4, 4, 8]
    size = f"{path.stat().st_size:,}"
    assert f"packed file: {size} bytes" in printed and f"{path}: {size} bytes, to the byte what the receipt says" in printed
    assert re.search(r"outputs on 500 digits are bit-identical", printed)


def test_a_file_that_breaks_its_promise_is_an_error(tmp_path: Path) -> None:
    from dataclasses import fields

    import torch
    from torch import nn

    import subbyte
    from subbyte.tasks import Task

    class Lying(subbyte.Result):
        @property
        def size_bytes(self) -> int:
            return 1

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    task = Task("lie", model, torch.randn(16, 4), torch.randn(8, 4), torch.zeros(8, dtype=torch.int64), ("0", "1"))
    result = demo.quantized(task, 4, subbyte.rounding())
    assert result.allocation == {"0": (8, 8), "1": (8, 8)}
    demo.write_and_load_back(task, result, tmp_path)
    with pytest.raises(subbyte.FileError, match="1 promised"):
        demo.write_and_load_back(task, Lying(**{field.name: getattr(result, field.name) for field in fields(result)}), tmp_path)

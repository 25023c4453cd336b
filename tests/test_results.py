"""The table in docs/results.md is the one that the benchmark prints for its recorded rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_the_main_job_is_that_of_its_rows() -> None:
    spec = importlib.util.spec_from_file_location("main_job", ROOT / "benchmarks" / "main_job.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = json.loads((ROOT / "docs" / "results" / "main_job.json").read_text(encoding="utf-8"))["rows"]
    assert module.table(rows) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")

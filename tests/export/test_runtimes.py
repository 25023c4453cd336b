"""Runtimes in the process of the user: what they leave behind, and what is said about what they compute."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

import subbyte
from subbyte.export.onnx import Demands, _warnings
from subbyte.export.verify import Clock, RuntimeCheck, Verification

INTERRUPTED = """
import os, signal, time
from onnx import TensorProto, helper
from subbyte.export.runtimes import open_openvino

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with the signal ignored
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
first = open_openvino(content, optimized=True, threads=1)
second = open_openvino(content, optimized=True, threads=1)
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_after_openvino_has_run_is_an_interrupt() -> None:
    """Two of its cores that end in the order in which they began leave the thread with a signal stack that is no more: a crash."""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.parametrize(
    ("agreement", "samples", "warned"),
    [
        (100.0, 32, False),
        (96.875, 32, False),
        (93.75, 32, True),
        (93.75, 16, True),
        (0.0, 1, True),
        (98.5, 1000, True),
        (99.2, 1000, False),
    ],
)
def test_one_sample_of_dozens_that_differs_without_optimizations_is_no_warning(agreement: float, samples: int, warned: bool) -> None:
    checks = (RuntimeCheck(False, agreement, 0.5), RuntimeCheck(True, 100.0, 0.0))
    found = Verification("X", samples, checks, {"a": "QGemm"}, 1, 2, 1.0, 2.0, Clock(1), 1.0, 2.0)
    told = _warnings(found, Demands(), subbyte.OnnxRuntimeCPU(), [])
    assert [f"{agreement:.2f} %" in line for line in told] == [True] * warned
    shipped = replace(found, checks=(RuntimeCheck(False, 100.0, 0.0), RuntimeCheck(True, agreement, 0.5)))
    assert len(_warnings(shipped, Demands(), subbyte.OnnxRuntimeCPU(), [])) == (agreement < 99.0)

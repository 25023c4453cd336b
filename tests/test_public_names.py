"""What `import subbyte` gives: exactly the names of `__all__`, each with an example, and none of the extras."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import subbyte

EXTRAS = {"onnx", "onnxscript", "onnxruntime", "openvino", "transformers", "datasets", "ray", "plotly", "sklearn", "PIL"}


def test_all_is_exactly_the_public_names():
    public = {
        name
        for name, value in vars(subbyte).items()
        if not name.startswith("_") and not (isinstance(value, ModuleType) and value.__name__ == f"subbyte.{name}")
    }
    assert sorted(subbyte.__all__) == sorted(public)


@pytest.mark.parametrize("name", getattr(subbyte, "__all__", []))
def test_every_public_name_shows_an_example(name: str):
    docstring = getattr(subbyte, name).__doc__ or ""
    assert "Example:" in docstring and ">>>" in docstring


def test_import_needs_no_extra():
    code = f"import subbyte, sys; print(*sorted({EXTRAS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")

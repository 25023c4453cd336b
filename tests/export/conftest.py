"""What holds in every test of files: the exporter's operators are read once."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def operators_read_once() -> Iterator[None]:
    """At every export torch asks onnxscript for its operators, which reads the source of all of them anew: a third of a small export."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError, AttributeError):  # without onnxscript, or where a later torch does otherwise: slower
            apis = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
            patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield

"""Running ONNX files in ONNX Runtime and OpenVINO, and asking them which kernels they chose."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from subbyte.errors import FileError, OptionError

Arrays = Sequence[npt.NDArray[Any]]
INT8_KERNELS = {
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}


@dataclass(frozen=True)
class WeightSite:
    """Where a layer is in a file.

    Args:
        codes: name of the INT8 value that holds its widened codes.
        outputs: names of the values that its calls compute.
    """

    codes: str
    outputs: tuple[str, ...]


def version_of(module: str, extra: str) -> str:
    """A runtime and its version.

    Args:
        module: its package.
        extra: of subbyte, that installs it.

    Raises:
        OptionError: if it is not installed.
    """
    return f"{module} {_imported(module, extra).__version__}"


def input_names(content: bytes) -> tuple[str, ...]:
    """Names of a file's inputs, in its order.

    Args:
        content: of the ONNX file.
    """
    return tuple(value.name for value in onnx.load_from_string(content).graph.input)


def open_onnxruntime(content: bytes, *, optimized: bool, threads: int) -> Callable[[Arrays], Arrays]:
    """A file in ONNX Runtime.

    Args:
        content: of the ONNX file.
        optimized: whether the runtime may rewrite the graph.
        threads: processor threads.

    Returns:
        A function from input arrays to output arrays, both in the order of the file.

    Raises:
        OptionError: if ONNX Runtime is not installed.
        FileError: if it refuses the file.
    """
    session = _session(content, optimized=optimized, threads=threads)
    names = [given.name for given in session.get_inputs()]

    def run(arrays: Arrays) -> Arrays:
        found: Arrays = session.run(None, dict(zip(names, arrays, strict=True)))
        return found

    return run


def onnxruntime_kernels(content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
    """The operator that reads each layer's codes in the graph that ONNX Runtime made of a file.

    Args:
        content: of the ONNX file.
        sites: by layer name.

    Returns:
        By layer name an int8 operator, or None.

    Raises:
        OptionError: if ONNX Runtime is not installed.
        FileError: if it refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        _session(content, optimized=True, threads=1, save_to=path)
        graph = onnx.load(path).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    found: dict[str, str | None] = {}
    for layer, site in sites.items():
        kinds = readers.get(site.codes, set())
        found[layer] = ", ".join(sorted(kinds)) if kinds and kinds <= INT8_KERNELS else None
    return found


def open_openvino(content: bytes, *, optimized: bool, threads: int) -> Callable[[Arrays], Arrays]:
    """A file in OpenVINO, on the processor.

    Args:
        content: of the ONNX file.
        optimized: whether numbers may be kept in less than float32.
        threads: processor threads.

    Returns:
        A function from input arrays to output arrays, both in the order of the file.

    Raises:
        OptionError: if OpenVINO is not installed.
        FileError: if it refuses the file.
    """
    request = _compiled(content, optimized=optimized, threads=threads).create_infer_request()

    def run(arrays: Arrays) -> Arrays:
        outputs = request.infer(dict(enumerate(arrays)))
        return [outputs[index].copy() for index in range(len(outputs))]

    return run


def openvino_kernels(content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
    """The primitive that computes each layer in OpenVINO, where it computes in int8.

    Args:
        content: of the ONNX file.
        sites: by layer name.

    Returns:
        By layer name the primitive, or None.

    Raises:
        OptionError: if OpenVINO is not installed.
        FileError: if it refuses the file.
    """
    owner = {name: layer for layer, site in sites.items() for name in site.outputs}
    found: dict[str, str | None] = dict.fromkeys(sites)
    for node in _compiled(content, optimized=True, threads=1).get_runtime_model().get_ops():
        told = node.get_rt_info()
        if "originalLayersNames" not in told or told["layerType"].value not in ("Convolution", "FullyConnected", "MatMul"):
            continue
        layers = {owner[name] for name in told["originalLayersNames"].value.split(",") if name in owner}
        if told["runtimePrecision"].value in ("i8", "u8"):
            found |= {layer: str(told["primitiveType"].value) for layer in layers}
    return found


def _session(content: bytes, *, optimized: bool, threads: int, save_to: Path | None = None) -> Any:
    runtime = _imported("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    level = runtime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime's own errors, one class for each of its states
        raise FileError(f"ONNX Runtime {runtime.__version__} refuses the file: {error}") from error


def _compiled(content: bytes, *, optimized: bool, threads: int) -> Any:
    openvino = _imported("openvino", "openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if not optimized:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    core = _openvino_core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        try:
            return core.compile_model(core.read_model(path), "CPU", settings)
        except RuntimeError as error:
            raise FileError(f"OpenVINO {openvino.__version__} refuses the file: {error}") from error


@functools.cache
def _openvino_core() -> Any:
    """One for the whole process: each makes its thread's signals be handled on a stack of its own, and where two end in the order in which
    they began, the thread is left with a stack that is no more, so that Ctrl-C ends the process by a segmentation fault (2026.4)."""
    return _imported("openvino", "openvino").Core()


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise OptionError(f"{module} is not installed; pip install 'subbyte[{extra}]'") from None

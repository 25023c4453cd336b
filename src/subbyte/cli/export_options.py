"""The options of `export`, and how their text becomes the library's values."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from subbyte import OnnxRuntimeCPU, OpenVINOCPU, Simulation, Target
from subbyte.errors import OptionError


class TargetName(Enum):
    """Where a file is to run, as the command line spells it.

    Example:
        >>> TargetName("openvino")
        <TargetName.OPENVINO: 'openvino'>
    """

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    SIMULATION = "simulation"


ExportedPackedOption = Annotated[Path, typer.Option("--packed", metavar="FILE", help="The packed file that `quantize` wrote.")]
OnnxOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The ONNX file, usually NAME.onnx.")]
TargetOption = Annotated[TargetName, typer.Option("--target", help="Where it is to run.")]
CompactOption = Annotated[bool, typer.Option("--compact", help="Fewer bytes, by functions of the file; ONNX Runtime only.")]
FasterOption = Annotated[bool, typer.Option("--require-faster", help="Write nothing if the file is not faster than the float model's.")]
AllowFloatOption = Annotated[bool, typer.Option("--allow-float", help="List layers that run in floating point instead of refusing.")]


def target_from(name: TargetName, *, compact: bool) -> Target:
    """The target that the options name.

    Args:
        name: of the target.
        compact: whether repeated operators become functions of the file.

    Raises:
        OptionError: if the target does not read such files.

    Example:
        >>> target_from(TargetName.ONNXRUNTIME, compact=True)
        OnnxRuntimeCPU(compact=True)
    """
    if name is TargetName.ONNXRUNTIME:
        return OnnxRuntimeCPU(compact=compact)
    if compact:
        raise OptionError(f"--compact files are read by onnxruntime, not by {name.value}")
    return OpenVINOCPU() if name is TargetName.OPENVINO else Simulation()

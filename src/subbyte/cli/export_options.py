"""The options of `export`, and how their text becomes the library's values."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from subbyte import OnnxRuntimeCPU, OpenVINOCPU, Simulation, Target, TensorRT, Widths
from subbyte.errors import OptionError
from subbyte.widths import as_option


class TargetName(Enum):
    """Where a file is to run, as the command line spells it.

    Example:
        >>> TargetName("openvino")
        <TargetName.OPENVINO: 'openvino'>
    """

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    SIMULATION = "simulation"


ExportedPackedOption = Annotated[Path, typer.Option("--packed", metavar="FILE", help="The packed file that `quantize` wrote.")]
OnnxOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The ONNX file, usually NAME.onnx.")]
TargetOption = Annotated[TargetName, typer.Option("--target", help="Where it is to run.")]
RunFolderOption = Annotated[Path, typer.Option("--out", metavar="RUN/", help="Run folder, in whose bank the times are kept.")]
TimedSamplesOption = Annotated[int, typer.Option("--timed-samples", metavar="N", help="Samples in one forward that is timed.")]
RunsOnOption = Annotated[
    TargetName | None,
    typer.Option("--target", help="Where the model is to run: widths are those that run there, --max-latency is measured there."),
]
FasterOption = Annotated[bool, typer.Option("--require-faster", help="Write nothing if the file is not faster than the float model's.")]
AllowFloatOption = Annotated[bool, typer.Option("--allow-float", help="List layers that run in floating point instead of refusing.")]


def widths_on(widths: Widths, target: Target) -> Widths:
    """Fixed widths, all of which a target runs.

    Args:
        widths: as given.
        target: where the model is to run.

    Raises:
        OptionError: if it does not run one of them.

    Example:
        >>> widths_on(Widths(4, 8), OnnxRuntimeCPU()).weight_bits
        4
    """
    asked = {"": (widths.weight_bits, widths.activation_bits)} | {f" of '{key}'": as_option(pin) for key, pin in widths.pinned.items()}
    for where, option in asked.items():
        if option not in target.options():
            listed = ", ".join(map(str, target.options()))
            raise OptionError(f"{target.name} does not run the widths {option}{where}; as (weight bits, activation bits) it runs {listed}")
    return widths


def target_from(name: TargetName) -> Target:
    """The target that the options name.

    Args:
        name: of the target.

    Example:
        >>> target_from(TargetName.ONNXRUNTIME).name
        'OnnxRuntimeCPU'
    """
    named: dict[TargetName, Target] = {
        TargetName.ONNXRUNTIME: OnnxRuntimeCPU(),
        TargetName.OPENVINO: OpenVINOCPU(),
        TargetName.TENSORRT: TensorRT(),
    }
    return named.get(name, Simulation())

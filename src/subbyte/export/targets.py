"""Targets as values: where a file is to run, what that needs, and how to run it there.

A target says which options it runs (`options`, what an integer programme may choose from), whether the tensors between layers have to be
quantised for it (`int8_between`), and opens a file as it does in production, so that the file is checked there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from subbyte.export.arithmetic import Arithmetic, OnnxRuntimeArithmetic, OpenVINOArithmetic
from subbyte.export.layout import PLAIN, Layout
from subbyte.quantizers.grid import MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    from subbyte.export.runtimes import WeightSite

Arrays = Sequence[npt.NDArray[Any]]
Run = Callable[[Arrays], Arrays]
BITS = range(MIN_BITS, MAX_BITS + 1)


def runs_in_groups(weight_bits: int, activation_bits: int | None) -> bool:
    """Whether ONNX Runtime runs weights with a step for each column group: 1.32 fuses them with a quantized input into a kernel that fails,
    unless they are INT4.

    Args:
        weight_bits: of the weights.
        activation_bits: of the input; None: float32.

    Example:
        >>> runs_in_groups(4, 8), runs_in_groups(8, None), runs_in_groups(8, 8)
        (True, True, False)
    """
    return weight_bits == 4 or activation_bits is None


class Target(ABC):
    """Where an ONNX file is to run.

    Example:
        >>> isinstance(OnnxRuntimeCPU(), Target)
        True
    """

    int8_between: bool
    weight_groups: tuple[int, ...] = ()
    """Sizes of column groups that it has kernels for."""
    arithmetic: Arithmetic | None = None
    """How its int8 kernels round; None: the simulation computes with real numbers."""
    timed: bool = True
    """Whether `open` gives the runtime itself, so that times say something about it."""

    @property
    def name(self) -> str:
        """The target in a word."""
        return type(self).__name__

    @property
    def layout(self) -> Layout:
        """What it asks of its files beside standard operators."""
        return PLAIN

    @abstractmethod
    def version(self) -> str:
        """The runtime and its version.

        Raises:
            OptionError: if the runtime is not installed.
        """

    @abstractmethod
    def options(self) -> tuple[tuple[int, int | None], ...]:
        """`(weight bits, activation bits or None)` that the target runs. Weights below 8 bits run no faster than with 8, but take less
        room."""

    @abstractmethod
    def open(self, content: bytes, *, optimized: bool, threads: int) -> Run:
        """Load a file.

        Args:
            content: of the ONNX file.
            optimized: whether the runtime may rewrite the graph.
            threads: processor threads.

        Returns:
            A function from input arrays to output arrays.

        Raises:
            OptionError: if the runtime is not installed.
        """

    @abstractmethod
    def kernels(self, content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
        """What runs each layer once the runtime has rewritten the graph.

        Args:
            content: of the ONNX file.
            sites: of the layers' weights, by layer name.

        Returns:
            By layer name the int8 kernel; None where the layer runs in floating point.

        Raises:
            OptionError: if the runtime is not installed.
        """


@dataclass(frozen=True)
class OnnxRuntimeCPU(Target):
    """ONNX Runtime on a processor: convolutions and sums run in int8 if their outputs are quantised too.

    Args:
        saturates: whether kernels for weights of 8 bits lose sums on the processors that the file is for, as those with AVX2 but without
            VNNI do: such weights are UINT8 then. None: as the processor here.

    Example:
        >>> OnnxRuntimeCPU().options()[:2]
        ((2, 8), (3, 8))
    """

    saturates: bool | None = None

    int8_between = True
    arithmetic = OnnxRuntimeArithmetic()

    @property
    def layout(self) -> Layout:
        """See `Target`.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        from subbyte.export.saturation import saturates

        lost = saturates(self) if self.saturates is None else self.saturates
        return Layout(unsigned_weights=lost, channel_blocks=True, channels_last=True, token_rows=True, apart=True)

    def version(self) -> str:
        """See `Target`.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        from subbyte.export import runtimes

        return runtimes.version_of("onnxruntime", "onnx")

    def options(self) -> tuple[tuple[int, int | None], ...]:
        """Any weights, inputs of 8 bits: fewer are no faster on a processor and take no less room."""
        return tuple((bits, MAX_BITS) for bits in BITS)

    def open(self, content: bytes, *, optimized: bool, threads: int) -> Run:
        """See `Target`.

        Args:
            content: of the ONNX file.
            optimized: whether the runtime may rewrite the graph.
            threads: processor threads.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        from subbyte.export import runtimes

        return runtimes.open_onnxruntime(content, optimized=optimized, threads=threads)

    def kernels(self, content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
        """See `Target`.

        Args:
            content: of the ONNX file.
            sites: of the layers' weights, by layer name.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        from subbyte.export import runtimes

        return runtimes.onnxruntime_kernels(content, sites)


@dataclass(frozen=True)
class OpenVINOCPU(Target):
    """OpenVINO on a processor; the file is the one that `OnnxRuntimeCPU` gives, but for channels and UINT8
    weights that only the latter needs.

    Example:
        >>> OpenVINOCPU().options() == OnnxRuntimeCPU().options()
        True
    """

    int8_between = True
    arithmetic = OpenVINOArithmetic()

    def version(self) -> str:
        """See `Target`.

        Raises:
            OptionError: if OpenVINO is not installed.
        """
        from subbyte.export import runtimes

        return runtimes.version_of("openvino", "openvino")

    def options(self) -> tuple[tuple[int, int | None], ...]:
        """Any weights, inputs of 8 bits."""
        return OnnxRuntimeCPU().options()

    def open(self, content: bytes, *, optimized: bool, threads: int) -> Run:
        """See `Target`; OpenVINO always rewrites the graph, without `optimized` it keeps float32 where it would take bfloat16.

        Args:
            content: of the ONNX file.
            optimized: whether numbers may be kept in less than float32.
            threads: processor threads.

        Raises:
            OptionError: if OpenVINO is not installed.
        """
        from subbyte.export import runtimes

        return runtimes.open_openvino(content, optimized=optimized, threads=threads)

    def kernels(self, content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
        """See `Target`.

        Args:
            content: of the ONNX file.
            sites: of the layers' weights, by layer name.

        Raises:
            OptionError: if OpenVINO is not installed.
        """
        from subbyte.export import runtimes

        return runtimes.openvino_kernels(content, sites)


@dataclass(frozen=True)
class Simulation(Target):
    """No runtime in particular: quantisers stand where the quantized model has them, and nowhere else. Checked in ONNX Runtime, where it
    computes what the model computes, mostly in floating point.

    Example:
        >>> (4, None) in Simulation().options()
        True
    """

    int8_between = False

    def version(self) -> str:
        """See `Target`.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        from subbyte.export import runtimes

        return runtimes.version_of("onnxruntime", "onnx")

    def options(self) -> tuple[tuple[int, int | None], ...]:
        """Whatever a layer can be quantized to."""
        return tuple((weight_bits, inputs) for weight_bits in BITS for inputs in (*BITS, None))

    def open(self, content: bytes, *, optimized: bool, threads: int) -> Run:
        """See `Target`.

        Args:
            content: of the ONNX file.
            optimized: whether the runtime may rewrite the graph.
            threads: processor threads.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        return OnnxRuntimeCPU().open(content, optimized=optimized, threads=threads)

    def kernels(self, content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
        """See `Target`.

        Args:
            content: of the ONNX file.
            sites: of the layers' weights, by layer name.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        return OnnxRuntimeCPU().kernels(content, sites)


@dataclass(frozen=True)
class TensorRT(Target):
    """TensorRT with explicit quantization: INT8 inputs and weights with zero-point 0, or INT4 weights in blocks with float32 inputs.

    There is no TensorRT here. Files are written as its documentation asks for, checked by `onnx.checker` and against what it says that its
    kernels need, and run in ONNX Runtime as a reference for the numbers; they are not timed, and were never run on TensorRT itself.

    Example:
        >>> TensorRT().options()[-2:]
        ((8, 8), (4, None))
    """

    int8_between = True
    weight_groups = (64, 128)
    timed = False

    @property
    def layout(self) -> Layout:
        """See `Target`."""
        return Layout(signed_codes=True)

    def version(self) -> str:
        """See `Target`; of the reference.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        return OnnxRuntimeCPU().version()

    def options(self) -> tuple[tuple[int, int | None], ...]:
        """Inputs of 8 bits, weights stored in 8 whatever their width; 4-bit weights with float32 inputs, linear layers only."""
        return *OnnxRuntimeCPU().options(), (4, None)

    def open(self, content: bytes, *, optimized: bool, threads: int) -> Run:
        """See `Target`; opens the reference, which must not rewrite the graph: it would round inputs of INT4 layers on its own account.

        Args:
            content: of the ONNX file.
            optimized: makes no difference.
            threads: processor threads.

        Raises:
            OptionError: if ONNX Runtime is not installed.
        """
        return OnnxRuntimeCPU().open(content, optimized=False, threads=threads)

    def kernels(self, content: bytes, sites: Mapping[str, WeightSite]) -> dict[str, str | None]:
        """See `Target`; what the graph qualifies for, by the documentation.

        Args:
            content: of the ONNX file.
            sites: of the layers' weights, by layer name.
        """
        from subbyte.export import explicit

        return explicit.qualified(content, sites)

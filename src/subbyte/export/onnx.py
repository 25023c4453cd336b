"""The ONNX file, top-down: a quantized model becomes a graph, the graph a file and a simulation, and the file is run before it is kept.

    trace      the model as a graph of operators, layers marked             (trace, markers)
    place      the quantisers that the target needs between layers          (placement)
    constants  biases rounded to what int8 kernels add                      (constants)
    translate  standard operators, codes at their true width                (onnx_graph, widening, onnx_file)
    verify     in the runtime, against the graph: the simulation            (verify)

The graph of the third step is the simulation: what is measured on it is what the file computes. It adds up exactly, as an int8 kernel does,
and rounds as the kernels of the target do (kernels, arithmetic); for targets without kernels of their own it computes in float64.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.loss import OutputLoss
from subbyte.calibrate.whole import Judge
from subbyte.errors import LayerError, ModelError, OptionError
from subbyte.export.latency import Profile
from subbyte.export.targets import Simulation, Target, runs_in_groups
from subbyte.export.verify import CONSTANT, Clock, RuntimeCheck, Verification, verify
from subbyte.model.quantized_layer import QuantizedState
from subbyte.model.replace import copy_of
from subbyte.quantizers.grid import MAX_BITS
from subbyte.run.files import write_file
from subbyte.widths import Option


class ExportWarning(UserWarning):
    """An exported file is larger or slower than the float model, or computes something else than its simulation.

    Example:
        >>> issubclass(ExportWarning, UserWarning)
        True
    """


@dataclass(frozen=True)
class Demands:
    """What a file has to be, or it is not written.

    Args:
        faster: than the float model's file in the same runtime; otherwise there is a warning.
        int8: every quantized layer runs in an int8 kernel; otherwise those that do not are listed.
        threads: processor threads of the runtime; None takes those of torch.
        batch_size: samples in one of the runs that are timed.

    Raises:
        OptionError: if a number is below 1.

    Example:
        >>> Demands(faster=True).int8
        True
    """

    faster: bool = False
    int8: bool = True
    threads: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads are at least 1, not {self.threads}")
        if self.batch_size < 1:
            raise OptionError(f"batch_size is at least 1, not {self.batch_size}")


@dataclass(frozen=True, eq=False)
class Exported:
    """A file that was written, and what was measured.

    Args:
        path: of the file.
        simulation: the PyTorch model that computes what the file computes; takes what the model takes.
        quantizers: 8-bit quantisers between layers that the target needed.
        loss_name: what the losses measure.
        loss: of the simulation on held-out samples, from the float model.
        model_loss: of the quantized model without those quantisers, likewise.
        verification: of the file in the runtime.
        warnings: what the user should know.
        predicted_milliseconds: sum of the layers' shortest times in the profile that widths were chosen by; None without one.

    Example:
        >>> import subbyte, torch, tempfile, os
        >>> float_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4)).eval()
        >>> result = subbyte.quantize(float_model, torch.randn(64, 3, 8, 8), widths=subbyte.Widths(4, 8))
        >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", ExportWarning)  # so small a model is not faster
        ...     exported = result.export_onnx(os.path.join(folder, "model.onnx"))
        >>> exported.verification.kernels
        {'0': 'QLinearConv', '3': 'QGemm'}
    """

    path: Path
    simulation: nn.Module
    quantizers: int
    loss_name: str
    loss: float
    model_loss: float
    verification: Verification
    warnings: tuple[str, ...]
    predicted_milliseconds: float | None = None

    def __str__(self) -> str:
        """The figures in lines."""
        added = f"{self.quantizers} 8-bit quantisers between layers were added"
        losses = f"{self.loss_name} from the float model on held-out samples: {self.loss:.4g}, without them {self.model_loss:.4g}"
        lines = [str(self.verification), f"{added}; {losses}"]
        if self.predicted_milliseconds is not None:
            whole = f"the whole file {self.verification.least_milliseconds:.3f} ms"
            lines.append(f"shortest runs: predicted {self.predicted_milliseconds:.3f} ms, the sum of the layers alone; {whole}")
        return "\n".join([*lines, *(f"WARNING: {text}" for text in self.warnings)])


@dataclass(frozen=True, eq=False)
class Exportable:
    """What an export starts from.

    Args:
        quantized: model with quantized layers.
        original: the float model.
        calibration: samples, and which of them are held out.
        loss: by which models are compared.
        profile: times of the layers, and the options that they have; None where they are not known.
    """

    quantized: nn.Module
    original: nn.Module
    calibration: CalibrationSet
    loss: OutputLoss
    profile: tuple[Profile, Mapping[str, Option]] | None = None

    def predicted_milliseconds(self, target: Target, clock: Clock) -> float | None:
        """From the profile, if that was measured in this target in the same way.

        Args:
            target: where a file is to run.
            clock: how it is timed.
        """
        if self.profile is None:
            return None
        timed, options = self.profile
        same = (timed.timing.target.name, timed.threads, timed.timing.batch_size) == (target.name, clock.threads, clock.batch_size)
        return 1000.0 * timed.total(options) if same else None


def export_onnx(models: Exportable, path: str | os.PathLike[str], target: Target, demands: Demands) -> Exported:
    """Write a quantized model as an ONNX file of standard operators, and check it by running it.

    Args:
        models: what to export.
        path: of the file; one that exists is replaced, whole or not at all.
        target: where it is to run.
        demands: what the file has to be.

    Raises:
        OptionError: if the packages for ONNX, or the target's runtime, are not installed, or weights have steps that the target has no int8
            kernel for.
        ModelError: if the model cannot be traced or translated, or the file is not faster where that is demanded.
        LayerError: if a layer does not run in int8 where that is demanded.
        FileError: if the file cannot be written, or the runtime refuses it.
    """
    translation = _translation()
    if demands.faster and not target.timed:
        raise OptionError(f"{target.name} cannot be run here, so that no file can be required to be faster in it")
    models = replace(models, quantized=copy_of(models.quantized).cpu(), original=copy_of(models.original).cpu())
    marked = translation.marked(models.quantized)
    if not marked.states:
        raise ModelError("nothing in this model is quantized, so there is nothing to export")
    _check_groups(marked.states, target if target.int8_between and demands.int8 else None)
    judge = Judge.of(models.original, models.calibration, models.loss)
    example = translation.Example.of(models.calibration.batches)
    graph = translation.trace(marked.model, example)
    quantizers = translation.place_for_(graph, models.calibration.batches, target)
    unmoved = translation.constant_layers(graph)
    constants = translation.fix_constants_(graph, marked)
    content, sites = translation.to_file(graph, example, constants, target.layout)
    tables = {name: "Gather" for name, operator in marked.operators.items() if not operator.multiplies and name in sites}
    kernels = (target.kernels(content, sites) if not isinstance(target, Simulation) else dict.fromkeys(sites)) | tables
    kernels |= {name: CONSTANT for name in unmoved if name in sites and name not in tables}
    _check_layers(kernels, list(marked.states), target, demands)
    plain = translation.to_file(translation.trace(translation.marked(models.original).model, example), example, {})[0]
    if target.arithmetic is not None:
        translation.use_kernels_(graph, constants, target.arithmetic)
    simulation = translation.Simulated(graph)
    clock = Clock(demands.threads or torch.get_num_threads(), demands.batch_size)
    verification = verify((content, plain), kernels, simulation, judge.batches, target, clock)
    told = _warnings(verification, demands, target, _cut_off(marked.states, verification, target))
    write_file(path, content)
    for text in told:
        warnings.warn(text, ExportWarning, stacklevel=3)
    losses = judge.loss_of(simulation), judge.loss_of(models.quantized)
    predicted = models.predicted_milliseconds(target, clock)
    return Exported(Path(path), simulation, quantizers, type(models.loss).__name__, *losses, verification, told, predicted)


def _translation() -> ModuleType:
    """The modules that need the packages for ONNX, which `import subbyte` does not."""
    try:
        from subbyte.export import translation
    except ImportError as error:
        raise OptionError(f"exporting needs packages that are not installed ({error}); pip install 'subbyte[onnx]'") from error
    return translation


def _check_groups(states: Mapping[str, QuantizedState], target: Target | None) -> None:
    """Int8 kernels multiply whole sums by a step: they have none for the groups of an output channel. The target is that whose int8 kernels
    are demanded, if they are."""
    for name, state in states.items():
        bits, inputs = state.weight_grid.bits, None if state.activation is None else state.activation[2].bits
        if state.weight_grid.group is not None and target is None and not runs_in_groups(bits, inputs):
            raise OptionError(
                f"ONNX Runtime fails on weights of {bits} bits with a step for every {state.weight_grid.group} inputs where the input is "
                f"quantized, as in '{name}'; give it 4 bits, leave its input in float32, or quantize with weight_group=None (no "
                "--group-size)"
            )
    if target is None:
        return
    layers = {name: state for name, state in states.items() if state.bias is not None}  # a table is looked up in
    grouped = [name for name, state in layers.items() if state.weight_grid.group not in (None, *target.weight_groups)]
    if grouped:
        raise OptionError(
            f"{target.name} has no int8 kernel for weights with a step for every {states[grouped[0]].weight_grid.group} inputs, as in "
            f"'{grouped[0]}'; quantize with weight_group=None (no --group-size), export with the target Simulation(), or allow floating "
            "point, which lists such layers"
        )


def _check_layers(kernels: dict[str, str | None], layers: Sequence[str], target: Target, demands: Demands) -> None:
    """Every quantized layer has to be in the file, and where that is demanded in int8."""
    for layer in layers:
        if layer not in kernels:
            raise LayerError(layer, "is not in the exported graph: the model does not call it for this input; exclude it")
        if demands.int8 and target.int8_between and kernels[layer] is None:
            raise LayerError(
                layer,
                f"does not run in int8 in {target.name}: its input is not quantised, or the runtime has no int8 kernel for it, as "
                "TensorRT has none for INT4 weights with zero-points; quantize its input (or its weights with symmetric_weights=True), "
                "exclude the layer, or allow floating point, which lists it",
            )


def _disagrees(check: RuntimeCheck, samples: int) -> bool:
    """Whether classes differ; in float32, without optimizations, on more than one sample of dozens, which may lie on a border."""
    if check.agreement is None or check.agreement >= 99.0:
        return False
    return check.optimized or check.agreement < 95.0 or (100.0 - check.agreement) * samples > 101.0


def _cut_off(states: Mapping[str, QuantizedState], verification: Verification, target: Target) -> list[str]:
    """Layers whose sums the processor's kernels may cut off, where the outputs say that it happened."""
    wide = [name for name, state in states.items() if state.bias is not None and state.weight_grid.bits == MAX_BITS]
    differs = any(check.optimized and (check.agreement not in (None, 100.0) or check.largest_steps > 1.0) for check in verification.checks)
    if not wide or not differs or target.layout.unsigned_weights:
        return []
    from subbyte.export.saturation import saturates  # needs packages that `import subbyte` does not

    return wide if saturates(target) else []


def _warnings(verification: Verification, demands: Demands, target: Target, cut_off: Sequence[str]) -> tuple[str, ...]:
    told = []
    if cut_off:
        told.append(
            f"int8 kernels of {verification.target} on this processor cut off large sums of weights of 8 bits, in "
            f"{', '.join(cut_off)}: give these layers 7 bits or fewer"
        )
    if verification.size_bytes >= verification.float_bytes:
        told.append(f"the file has {verification.size_bytes:,} bytes, not fewer than the float model's {verification.float_bytes:,}")
    if verification.speed < 1.0 and target.int8_between:
        slower = f"the file is not faster in {verification.target}: {verification.timing}"
        if demands.faster:
            raise ModelError(f"{slower}; nothing was written")
        told.append(slower)
    for check in verification.checks:
        if _disagrees(check, verification.samples):
            how = "with" if check.optimized else "without"
            told.append(f"{how} optimizations the runtime agrees with the simulation on {check.agreement:.2f} % only")
    if verification.float_layers and target.int8_between:
        told.append(f"in floating point: {', '.join(verification.float_layers)}")
    return tuple(told)

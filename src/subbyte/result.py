"""What a run returns: the quantized model, and everything that was decided and measured on the way."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.loss import RelativeSquaredError
from subbyte.calibrate.refinement import RefinementReport
from subbyte.calibrate.whole import Measured
from subbyte.export.loading import with_program
from subbyte.export.onnx import Demands, Exportable, Exported, export_onnx
from subbyte.export.pack_quantized import CompressedTensors, export_compressed_tensors
from subbyte.export.packed import LIBRARY_VERSION, pack_model, to_bytes
from subbyte.export.pretrained import save_pretrained
from subbyte.export.targets import OnnxRuntimeCPU, Target
from subbyte.model.attention import products_of
from subbyte.model.equalize import Equalized
from subbyte.model.fold import Fold
from subbyte.model.layers import LeftOut
from subbyte.plan import Plan
from subbyte.recipes import Recipe
from subbyte.report.layer import LayerReport
from subbyte.report.page import page
from subbyte.report.planned import planned
from subbyte.report.summary import FileReport, Score, Summary
from subbyte.report.words import choices_in_words, differing, in_words
from subbyte.run.files import write_file
from subbyte.widths import Option, Widths


@dataclass(frozen=True, eq=False)
class Result:
    """A quantized model and its receipt.

    Args:
        model: an instance of the user's own class, in evaluation mode.
        layers: what became of each layer, in running order.
        left_out: what stays in float32, and why.
        folds: batch norms that were folded.
        equalized: modules whose channels were scaled, and the layers that undo it; layers that scale their own input.
        measured: losses on held-out samples, before refinements.
        refinements: what followed, and what it did to the loss.
        warnings: what the user should know.
        float_bytes: the float model's parameters and buffers.
        structure: fingerprint of the float model's structure.
        widths: as asked for; None where a budget chose them.
        plan: how the budget was met; None where widths were given.
        recipe: as asked for.
        seed: of the run.
        seconds: the run took.
        original: the float model, batch norms folded.
        calibration: the samples, and which of them judged.

    Example:
        >>> import subbyte, torch
        >>> float_model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> result = subbyte.quantize(float_model, torch.randn(64, 8), widths=subbyte.Widths(4, 4))
        >>> result.allocation
        {'0': (4, 4), '2': (4, 4)}
    """

    model: nn.Module
    layers: tuple[LayerReport, ...]
    left_out: tuple[LeftOut, ...]
    folds: tuple[Fold, ...]
    equalized: tuple[Equalized, ...]
    measured: Measured
    refinements: tuple[RefinementReport, ...]
    warnings: tuple[str, ...]
    float_bytes: int
    structure: str
    widths: Widths | None
    plan: Plan | None
    recipe: Recipe
    seed: int
    seconds: float
    original: nn.Module
    calibration: CalibrationSet

    @property
    def loss(self) -> float:
        """Of the returned model on held-out samples, as `measured.loss_name` says."""
        return min([self.measured.loss, *(report.loss for report in self.refinements if report.kept)])

    @property
    def allocation(self) -> Mapping[str, Option]:
        """`(weight bits, activation bits or None)` by layer name."""
        return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in self.layers}

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the packed file, exactly as `save` writes it."""
        return len(self._content())

    def save(self, path: str | os.PathLike[str], *, program: bool = False) -> int:
        """Write the packed file.

        Args:
            path: of the file, usually ``something.subbyte.safetensors``; one that exists is replaced, whole or not at all.
            program: whether the model's computation is put into the file too, so that `subbyte.load` needs no model class.

        Returns:
            Its size in bytes, which is `size_bytes`, and with its program some thousand bytes more.

        Raises:
            ModelError: if torch.export cannot follow the model, whose program is asked for.
            FileError: if it cannot be written.
        """
        content = self._content(program=program)
        write_file(path, content)
        return len(content)

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> int:
        """Write a folder as the transformers library does: configuration, tokenizer, and the packed file in place of the weights.

        Args:
            folder: is made where it does not exist.
            tokenizer: of the library, to be written along; or None.

        Returns:
            Size of the packed file in bytes, which is `size_bytes`. `subbyte.load_pretrained` reads the folder.

        Raises:
            ModelError: if the model is none of the library.
            FileError: if something cannot be written.
        """
        content = self._content()
        save_pretrained(self.model, content, folder, tokenizer)
        return len(content)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        target: Target = OnnxRuntimeCPU(),  # noqa: B008 - a frozen value
        *,
        require_faster: bool = False,
        allow_float: bool = False,
        threads: int | None = None,
        batch_size: int = 1,
    ) -> Exported:
        """Write an ONNX file of standard operators, weights at their true width, and check it by running it.

        Args:
            path: of the file; one that exists is replaced, whole or not at all.
            target: where it is to run.
            require_faster: whether a file that is not faster than the float model's is an error instead of a warning.
            allow_float: whether layers that the target runs in floating point are listed instead of being an error.
            threads: processor threads of the runtime; None takes those of torch.
            batch_size: samples in one of the runs that are timed; the file takes any number.

        Raises:
            OptionError: if the packages for ONNX, or the target's runtime, are not installed.
            ModelError: if the model cannot be traced or translated, or the file is not faster where that is required.
            LayerError: if a layer does not run in int8.
            FileError: if the file cannot be written.
        """
        profile = None if self.plan is None or self.plan.profile is None else (self.plan.profile, self.allocation)
        models = Exportable(self.model, self.original, self.calibration, self.recipe.loss, profile)
        demands = Demands(faster=require_faster, int8=not allow_float, threads=threads, batch_size=batch_size)
        return export_onnx(models, path, target, demands)

    def export_compressed_tensors(self, folder: str | os.PathLike[str]) -> CompressedTensors:
        """Write a folder that compressed-tensors, transformers and vLLM read; for models whose quantized layers are linear and have
        float32 inputs.

        Args:
            folder: is made if it is not there; its `config.json` and `model.safetensors` are replaced.

        Raises:
            ModelError: if batch norms were folded.
            LayerError: if a layer is no linear layer, or has a quantized input.
            FileError: if the folder cannot be written.
        """
        return export_compressed_tensors(Exportable(self.model, self.original, self.calibration, self.recipe.loss), folder, self.folds)

    def summary(self, exported: Sequence[Exported] = (), scores: Mapping[str, tuple[float, float]] | None = None) -> Summary:
        """Everything that a report shows, as one value that JSON can hold.

        Args:
            exported: what `export_onnx` returned, to be shown beside it.
            scores: measures of your own, by name: the float model's and the quantized model's.
        """
        products = products_of(self.model)
        return Summary(
            model=type(self.model).__name__,
            layers=self.layers,
            left_out=self.left_out,
            folds=self.folds,
            equalized={one.source: one.readers for one in self.equalized},
            attention={name: module.grid.bits for name, module in products.items()},
            measured=self.measured,
            refinements=self.refinements,
            loss=self.loss,
            warnings=self.warnings,
            float_bytes=self.float_bytes,
            size_bytes=self.size_bytes,
            asked=in_words(self.widths if self.plan is None else self.plan.budget),
            planned=None if self.plan is None else planned(self.plan),
            solver=self.recipe.solver.name,
            baseline=self.recipe.baseline.name,
            recipe=choices_in_words(self.recipe),
            differing=differing(self.recipe, Recipe()),
            seed=self.seed,
            seconds=self.seconds,
            versions={"subbyte": LIBRARY_VERSION, "torch": str(torch.__version__), "Python": platform.python_version()},
            files=tuple(FileReport.of(one) for one in exported),
            scores={name: Score(*pair) for name, pair in (scores or {}).items()},
        )

    def write_report(
        self,
        path: str | os.PathLike[str],
        exported: Sequence[Exported] = (),
        scores: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Write an HTML page that shows the run: one file, which needs no network.

        Args:
            path: of the file, usually ``report.html``; one that exists is replaced, whole or not at all.
            exported: what `export_onnx` returned, to be shown beside it.
            scores: measures of your own, by name: the float model's and the quantized model's, for example
                ``{"top-1 %": (91.7, 91.3)}``.

        Raises:
            FileError: if it cannot be written.
        """
        write_file(path, page(self.summary(exported, scores)).encode())

    def _content(self, *, program: bool = False) -> bytes:
        packed = pack_model(self.model, self.structure, self.folds)
        return to_bytes(with_program(packed, self.model, self.calibration.batches) if program else packed)

    def __str__(self) -> str:
        """The receipt."""
        return receipt(self)


def receipt(result: Result) -> str:
    """The receipt as text: every layer, what stayed float and why, bytes, losses, warnings.

    Args:
        result: of a run.
    """
    width = max(len("layer"), *(len(layer.name) for layer in result.layers))
    wide = max(2, *(len(layer.weights) for layer in result.layers))
    head = f"{'layer':{width}}  {'W':>{wide}} {'A':>3} {'float bytes':>12} {'bytes':>10}  {'error':>8} {'rounding':>8}  kept"
    lines = [head, "-" * len(head)]
    for layer in result.layers:
        inputs = "-" if layer.activation_bits is None else str(layer.activation_bits)
        kept = layer.solver if layer.rejected_error is None else f"{layer.solver} (solver had {layer.rejected_error:.2g})"
        numbers = f"{layer.float_bytes:>12,} {layer.size_bytes:>10,}  {layer.error:>8.2g} {layer.baseline_error:>8.2g}"
        kept += f"; {layer.note}" if layer.note else ""
        lines.append(f"{layer.name:{width}}  {layer.weights:>{wide}} {inputs:>3} {numbers}  {kept}")
    lines.append("error: squared error of the layer's output on held-out rows, relative to its variance; rounding: that of plain rounding")
    if any(layer.weight_group for layer in result.layers):
        lines.append("W: bits of the weights / weights that share a step, where these are not all of an output channel")
    if result.left_out:
        lines.append("stays in float32:")
        lines += [f"  {left.name} ({left.kind}, {left.parameters:,} parameters): {left.reason}" for left in result.left_out]
    if products := products_of(result.model):
        product_bits = next(iter(products.values())).grid.bits
        lines.append(f"attention products at {product_bits} bits in {len(products)} layers; attention is computed in its eager form")
    if result.folds:
        lines.append(f"batch norms folded: {len(result.folds)} ({', '.join(fold.batch_norm for fold in result.folds)})")
    for what, own in (("channels equalized", False), ("layers that scale their own input", True)):
        if names := [one.source for one in result.equalized if one.is_own == own]:
            lines.append(f"{what}: {len(names)} ({', '.join(names)})")
    size, measured = result.size_bytes, result.measured
    lines.append(f"float32: {result.float_bytes:,} bytes; packed file: {size:,} bytes ({result.float_bytes / size:.2f} times smaller)")
    judged = f"{measured.held_out_samples} held-out of {measured.samples} samples" if measured.held_out_samples else "its one sample"
    judged += f" and {measured.mixtures} mixtures of them" if measured.mixtures else ""
    losses = f"{measured.loss:.4g}, with plain rounding everywhere {measured.baseline_loss:.4g}"
    lines.append(f"{measured.loss_name} from the float model on {judged}: {losses}")
    if measured.rejected_loss is not None:
        lines.append(f"the calibrated model had {measured.rejected_loss:.4g} and was given up for plain rounding")
    for report in result.refinements:
        verdict = "" if report.kept else ", not better, so not kept"
        lines.append(f"{report.name}: {report.start_loss:.4g} -> {report.loss:.4g}{verdict} ({report.seconds:.1f} s)")
        lines += [f"  {note}" for note in report.notes]
    lines += [] if result.plan is None else plan_lines(result.plan)
    lines += [f"warning: {text}" for text in result.warnings]
    lines.append(f"{result.recipe.solver.name}, {result.recipe.flavour.value}, seed {result.seed}, {result.seconds:.1f} s")
    return "\n".join(lines)


def plan_lines(plan: Plan) -> list[str]:
    """How a budget was met, for the receipt.

    Args:
        plan: of the run.
    """
    chosen, table = plan.allocation, plan.sensitivity
    proof = "proved optimal" if chosen.status == "optimal" else f"not proved optimal: at most {chosen.gap:.3g} from it ({chosen.status})"
    options = sum(len(row) for row in plan.market.options.values())
    lines = [
        f"widths chosen for the least {chosen.minimized}: {chosen.average_bits:.2f} bits a weight on average, {proof}",
        f"{table.loss_name} by {table.method} over {len(table.losses)} layers and {options} options: "
        f"predicted {chosen.predicted:.4g}, measured on held-out samples {plan.measured_loss:.4g}",
    ]
    if plan.budget.loss is None and table.loss_name == RelativeSquaredError.__name__:
        lines.append("  a classifier's logits? KL divergence may choose better widths: Budget(loss=KLDivergence()), --classifier")
    if chosen.latency is not None:
        lines.append(f"latency predicted by the sum of the layers: {1000 * chosen.latency:.3f} ms")
    for number, one in enumerate(plan.rounds if plan.budget.degradations else (), 1):
        values = ", ".join(f"{name} {value:.4g}" for name, value in one.measured.items())
        verdict = "met" if one.met else "missed"
        lines.append(
            f"round {number}: {one.allocation.size_bytes:,} bytes, predicted {one.allocation.predicted:.4g}, measured {values}: {verdict}"
        )
    return lines

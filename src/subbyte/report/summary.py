"""What a report shows, as one value of numbers and texts: it holds no model and no tensor, and nothing that JSON could not hold.

Data first, then the template: `report.page` reads a `Summary` and nothing else, and so does whoever reads the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from subbyte.calibrate.refinement import RefinementReport
from subbyte.calibrate.whole import Measured
from subbyte.export.onnx import Exported
from subbyte.export.verify import Verification
from subbyte.model.fold import Fold
from subbyte.model.layers import LeftOut
from subbyte.report.layer import LayerReport
from subbyte.report.planned import Planned


@dataclass(frozen=True)
class Score:
    """A measure of the user's own, of both models.

    Args:
        float_model: its score.
        quantized: of the returned model.
    """

    float_model: float
    quantized: float


@dataclass(frozen=True)
class FileReport:
    """An ONNX file that was written, and how it was checked.

    Args:
        name: of the file, without its folder.
        verification: of the file in its runtime.
        quantizers: 8-bit quantisers between layers that the target needed.
        loss_name: what the losses measure.
        loss: of the file's simulation on held-out samples.
        model_loss: of the quantized model without those quantisers.
        predicted_milliseconds: sum of the layers' times in the profile that widths were chosen by; None without one.
        warnings: what the user should know.
    """

    name: str
    verification: Verification
    quantizers: int
    loss_name: str
    loss: float
    model_loss: float
    predicted_milliseconds: float | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, exported: Exported) -> FileReport:
        """The figures of an export.

        Args:
            exported: what `Result.export_onnx` returned.
        """
        return cls(
            exported.path.name,
            exported.verification,
            exported.quantizers,
            exported.loss_name,
            exported.loss,
            exported.model_loss,
            exported.predicted_milliseconds,
            exported.warnings,
        )


@dataclass(frozen=True)
class Step:
    """A step of the recipe, and the model's loss after it.

    Args:
        name: what was done.
        loss: on held-out samples; NaN where the model returned NaN.
        kept: whether its result was kept.
        seconds: it took; None where that was not measured.
        notes: its own words.
    """

    name: str
    loss: float
    kept: bool
    seconds: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alert:
    """Something that nobody should overlook.

    Args:
        title: what it is about.
        text: what it is, and where.
        serious: whether the result may not be what the user expects; else it is good to know.
    """

    title: str
    text: str
    serious: bool


@dataclass(frozen=True)
class Summary:
    """A run: what became of every layer, what it cost, and what was chosen.

    Args:
        model: the model's class.
        layers: in running order.
        left_out: what stays in float32, and why.
        folds: batch norms that were folded.
        equalized: modules whose channels were scaled, and the layers that undo it; a layer that scales its own input undoes it itself.
        attention: layers with quantized attention products, and their bits.
        measured: losses on held-out samples, before refinements.
        refinements: what followed.
        loss: of the returned model.
        warnings: of the run.
        float_bytes: the float model's parameters and buffers.
        size_bytes: of the packed file.
        asked: the widths or the budget, in words of Python.
        planned: how a budget was met; None where widths were given.
        solver: of the recipe.
        baseline: of the recipe: plain rounding.
        recipe: every choice of the recipe, by name, in words of Python.
        differing: names of the choices that are not the default recipe's.
        seed: of the run.
        seconds: the run took.
        versions: of what computed it, by name.
        files: ONNX files that were written.
        scores: of the user's own, by name.

    Example:
        >>> import subbyte, torch
        >>> float_model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> summary = subbyte.quantize(float_model, torch.randn(64, 8), widths=subbyte.Widths(4, 8)).summary()
        >>> summary.average_bits, [step.name for step in summary.steps]
        (4.0, ['RoundToNearest everywhere', 'Lattice'])
    """

    model: str
    layers: tuple[LayerReport, ...]
    left_out: tuple[LeftOut, ...]
    folds: tuple[Fold, ...]
    equalized: Mapping[str, tuple[str, ...]]
    attention: Mapping[str, int]
    measured: Measured
    refinements: tuple[RefinementReport, ...]
    loss: float
    warnings: tuple[str, ...]
    float_bytes: int
    size_bytes: int
    asked: str
    planned: Planned | None
    solver: str
    baseline: str
    recipe: Mapping[str, str]
    differing: tuple[str, ...]
    seed: int
    seconds: float
    versions: Mapping[str, str]
    files: tuple[FileReport, ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def times_smaller(self) -> float:
        """Bytes of the float model over those of the packed file."""
        return self.float_bytes / self.size_bytes

    @property
    def average_bits(self) -> float:
        """Mean width of all weights that are quantized."""
        return sum(layer.weight_bits * layer.weight_count for layer in self.layers) / sum(layer.weight_count for layer in self.layers)

    @property
    def equalized_sources(self) -> tuple[str, ...]:
        """Modules whose channels were scaled for the layers behind them."""
        return tuple(source for source, readers in self.equalized.items() if tuple(readers) != (source,))

    @property
    def scaling_own_input(self) -> tuple[str, ...]:
        """Layers that multiply their input themselves."""
        return tuple(source for source, readers in self.equalized.items() if tuple(readers) == (source,))

    @property
    def agreement(self) -> float | None:
        """Percent of held-out predictions that are the float model's, where the budget made that known."""
        limits = () if self.planned is None else self.planned.limits
        return next((limit.reached for limit in limits if limit.name == "agreement"), None)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The recipe's steps in order, from plain rounding on."""
        measured = self.measured
        first = Step(f"{self.baseline} everywhere", measured.baseline_loss, kept=True)
        reached = measured.loss if measured.rejected_loss is None else measured.rejected_loss
        solved = Step(self.solver, reached, kept=measured.rejected_loss is None)
        followed = (Step(one.name, one.loss, one.kept, one.seconds, one.notes) for one in self.refinements)
        return first, *((solved,) if self.solver != self.baseline else ()), *followed

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """What nobody should overlook, the serious ones first."""
        found = [Alert("Warning", text, serious=True) for text in self.warnings]
        found += [Alert(f"ONNX file {file.name}", text, serious=True) for file in self.files for text in file.warnings]
        for step in self.steps:
            if not step.kept and step.name != self.solver:
                text = f"{step.name} did not lower the loss ({step.loss:.4g} after it), so the model is as it was before"
                found.append(Alert("Refinement taken back", text, serious=False))
        unsolved = [one.name for one in self.layers if one.solver == self.baseline != self.solver and one.rejected_error is None]
        if unsolved and self.measured.rejected_loss is None:
            text = f"{self.solver} left these layers to {self.baseline}: {', '.join(unsolved)}"
            found.append(Alert("Plain rounding", text, serious=False))
        if self.left_out:
            bytes_left = 4 * sum(left.parameters for left in self.left_out)
            share = 100.0 * bytes_left / max(1, self.float_bytes)
            names = ", ".join(left.name or "the model itself" for left in self.left_out)
            text = f"{len(self.left_out)} of the model's modules, {bytes_left:,} bytes ({share:.1f} % of the float model): {names}"
            found.append(Alert("Left in float32", text, serious=False))
        return tuple(found)

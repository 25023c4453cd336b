"""From widths to a quantized model: layers solved, the whole guarded, refined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.guard import Judged
from subbyte.calibrate.kept import Kept
from subbyte.calibrate.models import Models, prepare
from subbyte.calibrate.passes import calibrate_
from subbyte.calibrate.products import assign_products_, product_grids
from subbyte.calibrate.refinement import RefinementReport, refine_guarded_
from subbyte.calibrate.whole import Judge, Measured, guard_whole_
from subbyte.model.clipping import Clip
from subbyte.model.fold import NormOutput
from subbyte.model.layers import Layer
from subbyte.recipes import Recipe
from subbyte.run.events import Observer
from subbyte.widths import Option


@dataclass(frozen=True, eq=False)
class Assembled:
    """A quantized model, and what was found on the way.

    Args:
        models: the float model and the quantized one.
        judged: solutions by layer name.
        measured: losses on held-out samples, before refinements.
        refinements: what followed.
    """

    models: Models
    judged: Mapping[str, Judged]
    measured: Measured
    refinements: tuple[RefinementReport, ...]


@dataclass(frozen=True, eq=False)
class Assembler:
    """Everything but the widths.

    Args:
        original: float model, batch norms folded; is not changed.
        layers: what is quantized, in running order.
        clips: what is read of the layers' outputs, by name.
        norms: batch norms that were folded, by the layer's name.
        calibration: calibration set.
        recipe: how.
        kept: solutions of the run so far.
        judge: the held-out samples, which limits on degradation are measured on.
        observer: is told what happens.
    """

    original: nn.Module
    layers: tuple[Layer, ...]
    clips: Mapping[str, Clip]
    norms: Mapping[str, NormOutput]
    calibration: CalibrationSet
    recipe: Recipe
    kept: Kept
    judge: Judge
    observer: Observer

    @property
    def tables(self) -> frozenset[str]:
        """Names of the layers that look rows up, and whose input therefore has no width; those not in a tie, where it is not heeded."""
        tied = {name for tie in self.ties for name in tie}
        return frozenset(layer.name for layer in self.layers if not layer.operator.multiplies and layer.name not in tied)

    @property
    def ties(self) -> tuple[tuple[str, str], ...]:
        """Layers that share their codes, and so their width."""
        return tuple((layer.shares, layer.name) for layer in self.layers if layer.shares)

    def prepare(self, options: Mapping[str, Option]) -> Models:
        """The float model beside a copy whose layers have no codes yet.

        Args:
            options: `(weight bits, activation bits or None)` by layer name.
        """
        models = prepare(self.original, self.layers, options, self.clips, self.norms, self.recipe.weights)
        assign_products_(models.quantized, self.product_grids)
        return models

    @cached_property
    def product_grids(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Steps and zero-points of attention products, by the attention layer's name, (4,) each; none where they stay in float32."""
        return product_grids(self.original, self.calibration)

    @cached_property
    def guard(self) -> Judge:
        """What the whole is kept or taken back by: held-out samples and mixtures of them."""
        return self.judge.with_mixtures(self.original, self.recipe.mixtures, self.calibration.seed)

    def assemble(self, options: Mapping[str, Option]) -> Assembled:
        """Solve every layer at its widths, keep the better of calibrated and plainly rounded, refine.

        Args:
            options: `(weight bits, activation bits or None)` by layer name.

        Raises:
            LayerError: if a layer cannot be solved.
            ModelError: if the quantized model returns NaN or infinite numbers.
        """
        recipe, models = self.recipe, self.prepare(options)
        judged = calibrate_(models, self.calibration, recipe.method, recipe.flavour, self.kept, self.observer)
        measured = guard_whole_(models, judged, self.guard, self.observer)
        refinements = refine_guarded_(models, recipe.refinements, self.calibration, self.guard, measured.loss, self.observer)
        return Assembled(models, judged, measured, refinements)

"""Recipes: every choice of a run that is not the model, the data or the widths, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from subbyte.allocate.fisher import Fisher
from subbyte.allocate.sensitivity import SensitivityMethod
from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.loss import OutputLoss, RelativeSquaredError
from subbyte.calibrate.passes import Flavour, Method
from subbyte.calibrate.problem import Solver
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.calibrate.rows import RowSampling


@dataclass(frozen=True)
class Recipe:
    """How to quantize.

    Args:
        solver: gives each layer its codes.
        baseline: what the solver has to beat on held-out rows, layer by layer, and on held-out samples as a whole.
        flavour: whether a layer sees the float input or what the quantized layers before it make of it.
        sampling: rows for each layer, and the share of samples that judge.
        symmetric_weights: True: weight zero-points are 0; False: one for each output channel.
        fold_batch_norms: whether batch norms are folded into the layers before them, where outputs prove it right.
        loss: distance of the model's outputs from the float model's, by which the whole is judged on held-out samples. Squared error of
            logits tells good from bad on a few dozen samples, where KL divergence is mostly chance.
        sensitivity: measures what each layer does to the model at each option, where a budget chooses the widths.
        refinements: what follows when every layer has its codes, in this order; each is kept only if held-out samples agree.

    Example:
        >>> Recipe(flavour=Flavour.PARALLEL).solver.name
        'Lattice'
    """

    solver: Solver = Lattice()
    baseline: Solver = RoundToNearest()
    flavour: Flavour = Flavour.SEQUENTIAL
    sampling: RowSampling = RowSampling()
    symmetric_weights: bool = True
    fold_batch_norms: bool = True
    loss: OutputLoss = RelativeSquaredError()
    sensitivity: SensitivityMethod = Fisher()
    refinements: tuple[Refinement, ...] = ()

    @property
    def method(self) -> Method:
        """The part of the recipe that solves layers."""
        return Method(self.solver, self.baseline, self.sampling)


def rounding() -> Recipe:
    """Plain rounding with ranges of least output error: the baseline as a recipe of its own.

    Example:
        >>> rounding().solver.name
        'RoundToNearest'
    """
    return Recipe(solver=RoundToNearest(), flavour=Flavour.PARALLEL)

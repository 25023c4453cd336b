"""Recipes: every choice of a run that is not the model, the data or the widths, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from subbyte.allocate.fisher import Fisher
from subbyte.allocate.measured import Measured
from subbyte.allocate.sensitivity import SensitivityMethod
from subbyte.calibrate.lattice import Lattice
from subbyte.calibrate.loss import OutputLoss, RelativeSquaredError
from subbyte.calibrate.networkwise import Networkwise
from subbyte.calibrate.passes import Flavour, Method
from subbyte.calibrate.problem import Solver
from subbyte.calibrate.refinement import Refinement
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.calibrate.rows import RowSampling
from subbyte.calibrate.whole import MIXTURES
from subbyte.choices import Choices
from subbyte.errors import OptionError
from subbyte.model.equalize import Equalization
from subbyte.quantizers.grid import Grid, WeightGrids
from subbyte.tune.batch_norm import BatchNormTuning
from subbyte.tune.bias import BiasTuning


@dataclass(frozen=True)
class Recipe:
    """How to quantize.

    Args:
        solver: gives each layer its codes.
        baseline: what the solver has to beat on held-out rows, layer by layer, and on held-out samples as a whole.
        flavour: whether a layer sees the float input or what the quantized layers before it make of it.
        sampling: rows for each layer, and the share of samples that judge.
        symmetric_weights: True: weight zero-points are 0. False: one for each step, of weights with up to 6 bits; each costs as
            many bits of the file as a weight, and nothing where it runs.
        weight_group: how many consecutive weights of an output channel of a linear layer, or of a row of an embedding, share a step and
            zero-point, for example 64; None: all of them, as in convolutions in any case.
        behind_clips: whether a layer's error counts only as far as what follows reads of its output, behind a ReLU for example. Finding
            that out is the one backward pass that a recipe makes which neither trains nor measures sensitivities by gradients.
        attention_bits: of the factors of attention products (query, key, softmax output, value), 2 to 8, in models of the transformers
            library; None leaves them in float32.
        fold_batch_norms: whether batch norms are folded into the layers before them, where outputs prove it right.
        equalization: how channels that share a step are scaled alike, where outputs prove that nothing else changes; None: not at all. Only
            inputs that are quantized call for it.
        loss: distance of the model's outputs from the float model's, by which the whole is judged on held-out samples. Squared error of
            logits tells good from bad on a few dozen samples, where KL divergence is mostly chance.
        mixtures: with other held-out samples, how many of each judge the whole beside it; 0 for inputs of which no mixture makes sense,
            in a budget's limits neither.
            Integers, such as token ids, are never mixed.
        choices: the options of every layer, where a budget chooses the widths and has none of its own. A file holds no inputs: narrower
            ones than 8 bits would cost accuracy and save none of its bytes.
        sensitivity: measures what each layer does to the model at each option, where a budget chooses the widths.
        refinements: what follows when every layer has its codes, in this order; each is kept only if held-out samples agree.

    Raises:
        OptionError: if `attention_bits` is no integer from 2 to 8, `weight_group` no positive one, or `mixtures` negative.

    Example:
        >>> Recipe(flavour=Flavour.PARALLEL).solver.name
        'Lattice'
    """

    solver: Solver = Lattice()
    baseline: Solver = RoundToNearest()
    flavour: Flavour = Flavour.SEQUENTIAL
    sampling: RowSampling = RowSampling()
    symmetric_weights: bool = False
    weight_group: int | None = None
    behind_clips: bool = True
    attention_bits: int | None = None
    fold_batch_norms: bool = True
    equalization: Equalization | None = Equalization()
    loss: OutputLoss = RelativeSquaredError()
    mixtures: int = MIXTURES
    choices: Choices = Choices(activation_bits=(8,))
    sensitivity: SensitivityMethod = Fisher()
    refinements: tuple[Refinement, ...] = ()

    def __post_init__(self) -> None:
        if self.attention_bits is not None:
            Grid(self.attention_bits)
        if self.mixtures < 0:
            raise OptionError(f"mixtures are counted from 0, not {self.mixtures}")
        _ = self.weights  # refuses an impossible group

    @property
    def weights(self) -> WeightGrids:
        """What the grids of all weights have in common."""
        return WeightGrids(self.symmetric_weights, self.weight_group)

    @property
    def method(self) -> Method:
        """The part of the recipe that solves layers."""
        return Method(self.solver, self.baseline, self.sampling, self.behind_clips)

    @property
    def table_method(self) -> Method:
        """The same for the table of all options that a budget chooses from: drafts, where layers are solved anew at the chosen ones."""
        return replace(self.method, solver=self.solver.draft) if self.flavour is Flavour.SEQUENTIAL else self.method


def default() -> Recipe:
    """What `quantize` does without being asked: every layer solved by `Lattice` on what the quantized layers before it return; within a
    budget, all widths from 2 to 8 bits for weights, and inputs of 8.

    Example:
        >>> default() == Recipe()
        True
    """
    return Recipe()


def rounding() -> Recipe:
    """Plain rounding with ranges of least output error: the baseline as a recipe of its own.

    Example:
        >>> rounding().solver.name
        'RoundToNearest'
    """
    return Recipe(solver=RoundToNearest(), flavour=Flavour.PARALLEL)


def light() -> Recipe:
    """Plain rounding, then batch-norm tuning: forward passes only, for models that cannot be differentiated and for the hurried.

    Source:
        Hubara et al., arXiv 2006.10518, section 4, "light pipeline"; sensitivities are measured layer by layer,
        on a part of the samples.

    Example:
        >>> [refinement.name for refinement in light().refinements]
        ['BatchNormTuning']
    """
    return replace(rounding(), behind_clips=False, sensitivity=Measured(samples=64), refinements=(BatchNormTuning(),))


def advanced() -> Recipe:
    """Every layer solved at 2 to 8 bits, widths by integer programme, layers solved anew at these, then tuning of both kinds.

    Source:
        Hubara et al., arXiv 2006.10518, section 4, "advanced pipeline", which chooses between 4 and 8 bits for weights and inputs alike; of
        these nothing below 4 bits on average can be made. The second solving, on what the quantized layers make of the data, is ours.

    Example:
        >>> advanced().choices == default().choices, [refinement.name for refinement in advanced().refinements]
        (True, ['BatchNormTuning', 'BiasTuning'])
    """
    return replace(default(), refinements=(BatchNormTuning(), BiasTuning()))


def relaxed() -> Recipe:
    """The paper's relaxed setting: all widths from 2 to 8 bits to choose from, a layer's input as wide as its weights.

    Source:
        Hubara et al., arXiv 2006.10518, section 5. Narrow inputs save operations, not bytes.

    Example:
        >>> relaxed().choices.weight_bits
        (2, 3, 4, 5, 6, 7, 8)
    """
    return replace(advanced(), choices=Choices())


def thorough() -> Recipe:
    """For 4 bits and fewer, of weights and inputs: codes that correct no other layer's errors, steps and biases that do, and then all of
    them together, by gradient descent against the float model. Takes as long as 500 gradient steps.

    With `Networkwise(iterations=1000, augment=...)` in its place, and what you know of your samples, more: `docs/results.md`.

    Example:
        >>> [refinement.name for refinement in thorough().refinements]
        ['Networkwise']
    """
    return Recipe(flavour=Flavour.HYBRID, refinements=(Networkwise(),))


def weight_only() -> Recipe:
    """For weights alone: inputs stay in float32 (with fixed widths, give `Widths(bits, None)`). Where no input is rounded, the steps of
    weights are tuned with the biases, by what the model returns alone, which holds half of what layers' errors would in memory. Rates are
    those that brought most of a few on a small Llama.

    Example:
        >>> weight_only().choices.activation_bits, weight_only().refinements[-1].step_rate
        ((None,), 0.003)
    """
    tuning = BiasTuning(epochs=4, bias_rate=3e-3, step_rate=3e-3, layer_share=0.0)
    return replace(advanced(), choices=Choices(activation_bits=(None,)), refinements=(BatchNormTuning(), tuning))

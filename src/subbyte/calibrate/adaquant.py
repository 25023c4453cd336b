"""AdaQuant: weights, bias, steps and zero-point of one layer by gradient descent, all at once.

    minimise over V, b', s_w, s_x, z_x
        sum over rows || y - q(W + V; s_w) q(x'; s_x, z_x) - b' ||^2

`V` is continuous, so that a code may move by more than one step; rounding is straight-through, steps have LSQ's gradient, four groups of
parameters have a rate each, and Adam does the rest.

Where this differs from the authors' release: rates are relative to each tensor's own scale (a weight moves in shares of its step, a step in
shares of itself, a bias in shares of its output's spread), they decay to zero, and the iterate that is best on held-out rows is kept.
`AdaQuant.authors()` has none of this and is there for comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from subbyte.calibrate.joint import JointParameters, adam, half_cosine
from subbyte.calibrate.problem import LayerProblem, LayerSolution, Solver, relative_error
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.errors import OptionError
from subbyte.quantizers.ranges import MinMax


@dataclass(frozen=True)
class AdaQuant(Solver):
    """Joint gradient descent over everything that a layer computes with.

    Args:
        start: gives the first codes, steps and bias.
        iterations: gradient steps.
        batch_rows: rows of one gradient step, at most.
        weight_rate: Adam's rate for `V`, in weight steps (absolute: in weights).
        bias_rate: for `b'`, in standard deviations of the output (absolute: in outputs).
        weight_step_rate: for `s_w`, as a share of itself (absolute: in weights).
        activation_rate: for `s_x` as a share of itself and `z_x` in codes (absolute: in inputs and codes).
        relative: whether rates are relative; the authors' are absolute.
        decay: whether rates fall to zero along a half cosine.
        checks: how often held-out rows are looked at, evenly over the iterations; 0 keeps the last iterate, unseen.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Hubara et al., arXiv 2006.10518, section 3.1; rates of the authors' release for `authors()`.

    Example:
        >>> AdaQuant(iterations=100).name, AdaQuant.authors().iterations
        ('AdaQuant', 1000)
    """

    start: Solver = RoundToNearest()
    iterations: int = 400
    batch_rows: int = 1024
    weight_rate: float = 0.03
    bias_rate: float = 1e-3
    weight_step_rate: float = 2e-3
    activation_rate: float = 2e-3
    relative: bool = True
    decay: bool = True
    checks: int = 20

    def __post_init__(self) -> None:
        rates = (self.weight_rate, self.bias_rate, self.weight_step_rate, self.activation_rate)
        if self.iterations < 1 or self.batch_rows < 1 or self.checks < 0 or min(rates) < 0:
            raise OptionError(f"AdaQuant needs positive iterations and batch_rows and no negative rate, not {self}")

    @classmethod
    def authors(cls) -> AdaQuant:
        """The settings of the authors' release: absolute rates, no decay, last iterate."""
        start = RoundToNearest(weight_range=MinMax(), activation_range=MinMax())
        return cls(
            start=start,
            iterations=1000,
            batch_rows=4096,
            weight_rate=1e-5,
            bias_rate=1e-3,
            weight_step_rate=1e-3,
            activation_rate=1e-1,
            relative=False,
            decay=False,
            checks=0,
        )

    @torch.enable_grad()
    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        """See `Solver`.

        Args:
            problem: the layer.
            generator: draws the rows of each gradient step.
        """
        start = self.start.solve(problem, generator)
        spread = problem.fit.targets.std(dim=1, correction=0)
        state = JointParameters(start, problem.weight, spread, problem.weight_grid, problem.activation_grid, relative=self.relative)
        optimizer = adam([state], self)
        shares = [half_cosine(k / self.iterations) if self.decay else 1.0 for k in range(self.iterations)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: shares[min(k, self.iterations - 1)])
        every = math.ceil(self.iterations / self.checks) if self.checks else self.iterations + 1
        best, least = start, relative_error(problem, start, problem.held_out) if self.checks else torch.inf
        rows = problem.fit.inputs.shape[1]
        turns = torch.randint(0, rows, (self.iterations, min(self.batch_rows, rows)), device="cpu", generator=generator)
        for k, chosen in enumerate(turns.to(problem.weight.device), 1):
            optimizer.zero_grad()
            inputs = state.inputs(problem.fit.inputs[:, chosen])
            output = torch.baddbmm(state.bias()[:, None, :], inputs, state.weight().mT)
            loss = (output - problem.fit.targets[:, chosen]).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            if k % every == 0:
                trial = state.solution(self.name)
                error = relative_error(problem, trial, problem.held_out)
                best, least = (trial, error) if error < least else (best, least)
        return best if self.checks else state.solution(self.name)

"""The guard of one layer: a solution is kept only if it beats plain rounding on rows that neither was fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subbyte.calibrate.problem import LayerProblem, LayerSolution, Solver, relative_error


@dataclass(frozen=True, eq=False)
class Judged:
    """A layer's solution after the guard.

    Args:
        solution: what is kept.
        baseline: what plain rounding gives.
        error: relative error of the solver's solution on held-out rows, see `problem.relative_error`.
        baseline_error: relative error of plain rounding on the same rows.
        unknowns: weights of one output channel.
        equations: independent rows that the calibration set offered for them.
        gap: how many times larger the error of what is kept is on held-out rows than on those that it was fitted on, at least 1; 1 where
            there are as many equations as unknowns.
    """

    solution: LayerSolution
    baseline: LayerSolution
    error: float
    baseline_error: float
    unknowns: int
    equations: int
    gap: float = 1.0

    @property
    def rejected(self) -> bool:
        """Whether the solver lost to plain rounding, which is kept instead."""
        return self.solution is self.baseline


def solve_guarded(problem: LayerProblem, solver: Solver, baseline: Solver, generator: torch.Generator) -> Judged:
    """Solve a layer, and keep the solver's solution only if its held-out error is below the baseline's.

    Args:
        problem: the layer; tensors as its docstring says.
        solver: what should win.
        baseline: plain rounding.
        generator: source of every random number, on the CPU.
    """
    plain = baseline.solve(problem, generator)
    found = plain if solver == baseline else solver.solve(problem, generator)
    plain_error = relative_error(problem, plain, problem.held_out)
    error = relative_error(problem, found, problem.held_out)
    kept = found if error < plain_error else plain
    gap = 1.0
    if problem.equations < problem.unknowns:
        fitted = relative_error(problem, kept, problem.fit)
        gap = max(1.0, min(error, plain_error) / fitted) if fitted > 0 else 1.0
    return Judged(kept, plain, error, plain_error, problem.unknowns, problem.equations, gap)

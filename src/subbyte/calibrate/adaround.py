"""AdaRound: learn for every weight whether it is rounded down or up. The paper's comparison.

    w^ = s clip(floor(w / s) + h(V)),    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    minimise over V   mean || y - w^ q(x') - b ||^2 / Var y + strength * mean (1 - |2 h(V) - 1|^beta)

`beta` is annealed from large to small, which drives every `h` to 0 or 1; then codes are fixed. Steps, bias and the input's grid stay as
plain rounding chose them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subbyte.calibrate.problem import LayerProblem, LayerSolution, Solver, quantized_inputs
from subbyte.calibrate.round_to_nearest import RoundToNearest
from subbyte.errors import OptionError

ZETA, GAMMA = 1.1, -0.1


@dataclass(frozen=True)
class AdaRound(Solver):
    """Learned rounding down or up.

    Args:
        start: gives steps, bias and the input's grid.
        iterations: gradient steps.
        batch_rows: rows of one gradient step, at most.
        rate: Adam's rate for `V`.
        strength: weight of the regulariser, relative to the relative error.
        warm_up: share of the iterations without regulariser.
        first_beta: exponent of the regulariser after the warm-up.
        last_beta: exponent at the end.

    Raises:
        OptionError: if a value is outside its range.

    Source:
        Nagel et al. 2020 (arXiv 2004.10568), eqs. 21 to 24; its annealing, with a cosine.

    Example:
        >>> AdaRound(iterations=500).name
        'AdaRound'
    """

    start: Solver = RoundToNearest()
    iterations: int = 1000
    batch_rows: int = 1024
    rate: float = 1e-2
    strength: float = 1e-2
    warm_up: float = 0.2
    first_beta: float = 20.0
    last_beta: float = 2.0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_rows < 1 or self.rate <= 0 or self.strength <= 0 or not 0 <= self.warm_up < 1:
            raise OptionError(f"AdaRound needs positive iterations, rows, rate and strength and a warm_up below 1, not {self}")

    @torch.enable_grad()
    def solve(self, problem: LayerProblem, generator: torch.Generator) -> LayerSolution:
        """See `Solver`.

        Args:
            problem: the layer.
            generator: draws the rows of each gradient step.
        """
        start = self.start.solve(problem, generator)
        scale, zero, grid = start.per_weight(start.scale), start.per_weight(start.zero_point), problem.weight_grid
        ratio = problem.weight / scale
        floor = ratio.floor()
        share = ((ratio - floor).clamp(1e-3, 1 - 1e-3) - GAMMA) / (ZETA - GAMMA)
        logits = torch.logit(share).requires_grad_()
        inputs = quantized_inputs(problem.fit.inputs, start.activation, problem.activation_grid)
        spread = problem.fit.targets.var(correction=0).clamp(min=torch.finfo(torch.float32).tiny)
        optimizer, rows = torch.optim.Adam([logits], lr=self.rate), inputs.shape[1]
        low, high = grid.lowest - zero.float(), grid.highest - zero.float()
        turns = torch.randint(0, rows, (self.iterations, min(self.batch_rows, rows)), device="cpu", generator=generator)
        for k, chosen in enumerate(turns.to(inputs.device)):
            up = _rectified_sigmoid(logits)
            weight = (floor + up).clamp(low, high) * scale
            error = torch.baddbmm(start.bias[:, None, :], inputs[:, chosen], weight.mT) - problem.fit.targets[:, chosen]
            loss = error.square().mean() / spread
            done = (k / self.iterations - self.warm_up) / (1 - self.warm_up)
            if done > 0:
                beta = self.last_beta + 0.5 * (self.first_beta - self.last_beta) * (1 + math.cos(math.pi * done))
                loss = loss + self.strength * (1 - (2 * up - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            levels = (floor + (_rectified_sigmoid(logits) >= 0.5)).clamp(low, high)
        return replace(start, codes=(levels + zero).to(torch.int16), solver=self.name)


def _rectified_sigmoid(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

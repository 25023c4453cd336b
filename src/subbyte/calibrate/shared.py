"""A layer whose weight is another layer's too, such as an output head that is tied to the embedding: one set of codes, stored once.

The codes and steps are those of the layer that runs first. What is left to choose is the input's step and zero-point, and the bias, which
makes good for the mean error:

    minimise over s_x, z_x      Var(y - W^ q(x; s_x, z_x)),        b' = mean y - W^ mean q(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from subbyte.calibrate.given_codes import with_bias, with_input
from subbyte.calibrate.guard import Judged
from subbyte.calibrate.problem import LayerProblem, relative_error
from subbyte.errors import LayerError

T = TypeVar("T")


def owner_of(layer: str, shares: str, found: Mapping[str, T]) -> T:
    """What was found for the layer that gives another its codes.

    Args:
        layer: name of the other.
        shares: name of the layer that gives them.
        found: by name, so far.

    Raises:
        LayerError: if nothing was found yet: the layer is solved later, because it is called several times in a forward.

    Example:
        >>> owner_of("head", "embedding", {"embedding": 1})
        1
    """
    if shares not in found:
        raise LayerError(layer, f"shares its weight with '{shares}', which is called several times in a forward; exclude one of the two")
    return found[shares]


def solve_shared(problem: LayerProblem, owner: Judged) -> Judged:
    """The rest of a layer whose codes are given.

    Args:
        problem: the layer; tensors as its docstring says.
        owner: what was found for the layer that gives its codes; they are laid out alike.

    Returns:
        The solution, with the float layer's bias where that is better on held-out rows, beside the owner's plain rounding.
    """
    plain = replace(with_input(problem, owner.baseline), bias=problem.bias)
    found = replace(with_input(problem, owner.solution), bias=problem.bias, solver=f"{owner.solution.solver}, shared")
    corrected = with_bias(problem, found)
    plain_error, error, corrected_error = (relative_error(problem, one, problem.held_out) for one in (plain, found, corrected))
    kept = corrected if corrected_error < error else found
    return Judged(kept, plain, min(error, corrected_error), plain_error, problem.unknowns, problem.equations)

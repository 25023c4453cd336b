"""How a budget was met, as numbers and texts: what it chose among, what it chose, what that was predicted to cost and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from subbyte.allocate.rounds import Round
from subbyte.allocate.sensitivity import option_text
from subbyte.plan import Plan


@dataclass(frozen=True)
class Limit:
    """A limit of the budget, and what the result has.

    Args:
        name: of the quantity.
        limit: as asked for.
        reached: by the returned model.
        least: whether the quantity should be at least the limit; else at most.

    Example:
        >>> Limit("bytes", 1000.0, 1001.0).met
        False
    """

    name: str
    limit: float
    reached: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether the limit is met."""
        return self.reached >= self.limit if self.least else self.reached <= self.limit


@dataclass(frozen=True)
class Verified:
    """A round: an allocation that was assembled and measured.

    Args:
        size_bytes: of its packed file.
        average_bits: of its weights.
        predicted: loss, by the sum of the sensitivities.
        measured: degradations on held-out samples, by the limit's name.
        met: whether they are within their limits.
        kept: whether it is the returned model.
    """

    size_bytes: int
    average_bits: float
    predicted: float
    measured: Mapping[str, float]
    met: bool
    kept: bool


@dataclass(frozen=True)
class Point:
    """A point of the frontier.

    Args:
        size_bytes: of the packed file.
        average_bits: of the weights.
        predicted: the least loss of all allocations that are no larger.
    """

    size_bytes: int
    average_bits: float
    predicted: float


@dataclass(frozen=True)
class Planned:
    """How a budget was met.

    Args:
        loss_name: what sensitivities, predictions and `measured` are.
        method: what filled the table of sensitivities.
        table: by layer name, in running order, and option, for example ``"W4A8"``: the model's loss with that layer alone quantized so,
            infinite where it breaks the model.
        chosen: the option that each layer got, by name.
        limits: what to keep within, and what the result has.
        minimized: what was made smallest.
        value: of what was made smallest.
        bound: no allocation within the limits has a smaller value.
        gap: how far the value may be above the optimum; 0 if it is proved to be one.
        status: ``"optimal"``, or ``"time limit"`` where the search was cut off.
        solve_seconds: the search took.
        predicted: loss of the chosen allocation, by the sum of the sensitivities.
        measured: the same loss of the returned model on held-out samples.
        average_bits: of the chosen allocation.
        bit_operations: of one sample.
        latency: sum of the layers' seconds; None where they are not known.
        size_bytes: of the chosen allocation.
        rounds: what was assembled and measured, in order.
        frontier: by increasing size.
    """

    loss_name: str
    method: str
    table: Mapping[str, Mapping[str, float]]
    chosen: Mapping[str, str]
    limits: tuple[Limit, ...]
    minimized: str
    value: float
    bound: float
    gap: float
    status: str
    solve_seconds: float
    predicted: float
    measured: float
    average_bits: float
    bit_operations: int
    latency: float | None
    size_bytes: int
    rounds: tuple[Verified, ...]
    frontier: tuple[Point, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Every option that some layer has, widest weights first."""
        found = {option for row in self.table.values() for option in row}
        return tuple(sorted(found, key=lambda text: [int(part) for part in text[1:].split("A")], reverse=True))

    def sensitivity(self, layer: str) -> float:
        """The model's loss with one layer alone at the option that it got.

        Args:
            layer: its name.
        """
        return self.table[layer][self.chosen[layer]]


def planned(plan: Plan) -> Planned:
    """A plan without its model and tensors, its frontier solved.

    Args:
        plan: of a run.
    """
    chosen, market = plan.allocation, plan.market
    return Planned(
        loss_name=plan.sensitivity.loss_name,
        method=plan.sensitivity.method,
        table={
            name: {option_text(option): market.sensitivity.losses[name][option] for option in market.options[name]}
            for name in market.costs.layers
        },
        chosen={name: option_text(option) for name, option in chosen.options.items()},
        limits=_limits(plan),
        minimized=chosen.minimized,
        value=chosen.value,
        bound=chosen.bound,
        gap=chosen.gap,
        status=chosen.status,
        solve_seconds=chosen.seconds,
        predicted=chosen.predicted,
        measured=plan.measured_loss,
        average_bits=chosen.average_bits,
        bit_operations=chosen.bit_operations,
        latency=chosen.latency,
        size_bytes=chosen.size_bytes,
        rounds=tuple(_verified(plan, one) for one in plan.rounds) if plan.budget.degradations else (),
        frontier=tuple(Point(point.size_bytes, point.average_bits, point.predicted) for point in plan.frontier()),
    )


def _limits(plan: Plan) -> tuple[Limit, ...]:
    chosen, budget = plan.allocation, plan.budget
    costs: dict[str, float] = {"bytes": chosen.size_bytes, "average_bits": chosen.average_bits, "bit_operations": chosen.bit_operations}
    costs["latency"] = math.nan if chosen.latency is None else chosen.latency
    found = [Limit(name, limit, float(costs[name])) for name, limit in budget.cost_limits(plan.market.costs.float_bytes).items()]
    measured = next((one.measured for one in plan.rounds if one.allocation is chosen), {})
    for name, limit in budget.degradations.items():
        if name == "disagreement":  # the user's limit is on its complement
            found.append(Limit("agreement", 100.0 * (1.0 - limit), 100.0 * (1.0 - measured[name]), least=True))
        else:
            found.append(Limit(name, limit, measured[name]))
    return tuple(found)


def _verified(plan: Plan, one: Round) -> Verified:
    allocation = one.allocation
    measured = dict(one.measured)
    if (disagreement := measured.pop("disagreement", None)) is not None:
        measured["agreement"] = 100.0 * (1.0 - disagreement)
    return Verified(
        allocation.size_bytes, allocation.average_bits, allocation.predicted, measured, one.met, kept=allocation is plan.allocation
    )

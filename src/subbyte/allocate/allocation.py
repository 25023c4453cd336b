"""From table, costs and budget to an allocation: the budget as an integer programme, and its answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from subbyte.allocate.cost import Costs
from subbyte.allocate.integer_program import Program, Solved, solve
from subbyte.allocate.sensitivity import Sensitivity
from subbyte.budget import Budget, Quantity
from subbyte.errors import InfeasibleError, OptionError
from subbyte.widths import Option

DEGRADATION = "degradation"


@dataclass(frozen=True)
class Allocation:
    """The chosen option of every layer, what it should cost, and the proof that there is none better.

    Args:
        options: `(weight bits, activation bits or None)` by layer name.
        predicted: sum of the layers' sensitivities.
        size_bytes: of the packed file.
        average_bits: mean width of all weights that are quantized.
        bit_operations: of one sample.
        minimized: what was made smallest.
        value: of what was made smallest.
        bound: no allocation within the limits has a smaller value.
        gap: how far the value may be above the optimum; 0 if it is proved to be one.
        status: `"optimal"`, or `"time limit"` where the search was cut off.
        seconds: the search took.
        latency: sum of the layers' seconds; None where they are not known.

    Example:
        >>> Allocation({"fc": (4, 4)}, 0.1, 1000, 4.0, 64, "size", 1000.0, 1000.0, 0.0, "optimal", 0.0).options
        {'fc': (4, 4)}
    """

    options: Mapping[str, Option]
    predicted: float
    size_bytes: int
    average_bits: float
    bit_operations: int
    minimized: str
    value: float
    bound: float
    gap: float
    status: str
    seconds: float
    latency: float | None = None


@dataclass(frozen=True, eq=False)
class Market:
    """What there is to choose from: sensitivities, costs, and which layers go together.

    Args:
        sensitivity: the table.
        costs: of every layer.
        options: of each layer, by name; layers of a group have the same.
        groups: layers that get the same option.

    Raises:
        OptionError: if a layer has an option that was not measured.
    """

    sensitivity: Sensitivity
    costs: Costs
    options: Mapping[str, Sequence[Option]]
    groups: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for name, row in self.options.items():
            missing = [option for option in row if option not in self.sensitivity.losses.get(name, {})]
            if missing:
                raise OptionError(f"layer '{name}' was not measured at {missing}; measure again with these choices")

    def usable(self) -> list[list[Option]]:
        """Options of each group at which none of its layers breaks the model.

        Raises:
            OptionError: if a group has none.
        """
        losses, found = self.sensitivity.losses, []
        for group in self.groups:
            options = [option for option in self.options[group[0]] if all(math.isfinite(losses[name][option]) for name in group)]
            if not options:
                raise OptionError(f"at each option of {', '.join(group)} one of them breaks the model")
            found.append(options)
        return found


def allocate(market: Market, budget: Budget, most_degradation: float | None = None) -> Allocation:
    """The best allocation within a budget's cost limits, and a predicted degradation.

    Args:
        market: what there is to choose from.
        budget: what to make smallest, and limits on costs; limits on degradations are the caller's matter.
        most_degradation: limit on the sum of the sensitivities; None for none.

    Raises:
        InfeasibleError: if no allocation is within the limits.
        OptionError: if a latency is not known.
    """
    counters = _counters(market)
    limits = {name: counters[name].program_limit(limit) for name, limit in budget.cost_limits(market.costs.float_bytes).items()}
    if most_degradation is not None:
        limits[DEGRADATION] = most_degradation
    wanted = _COUNTED[budget.minimized]
    groups = list(zip(market.groups, market.usable(), strict=True))
    tables = {name: _table(groups, counters[name].of) for name in {*limits, wanted, DEGRADATION}}
    try:
        solved = solve(Program(tables[wanted], {name: tables[name] for name in limits}, limits))
        if wanted != DEGRADATION:  # of all that cost the same, the one with the least degradation
            least = limits | {wanted: min(solved.objective, limits.get(wanted, math.inf))}
            tied = solve(Program(tables[DEGRADATION], {name: tables[name] for name in least}, least))
            solved = Solved(tied.chosen, solved.objective, solved.bound, solved.status, solved.seconds + tied.seconds)
    except InfeasibleError as error:
        counter = counters.get(error.limit)
        if counter is None or error.wanted is None or error.nearest is None:
            raise
        raise InfeasibleError(error.limit, counter.total(error.wanted), counter.total(error.nearest), error.where) from None
    chosen = {name: row[k] for (group, row), k in zip(groups, solved.chosen, strict=True) for name in group}
    return _allocation(market, chosen, solved, counters[wanted])


def _table(groups: Sequence[tuple[Sequence[str], Sequence[Option]]], of: Callable[[str, Option], float]) -> list[list[float]]:
    """One number for each group and each of its options: the sum over its layers."""
    return [[sum(of(layer, option) for layer in group) for option in row] for group, row in groups]


def _allocation(market: Market, chosen: Mapping[str, Option], solved: Solved, counter: _Counter) -> Allocation:
    costs, ordered = market.costs, {name: chosen[name] for name in market.costs.layers}
    return Allocation(
        options=ordered,
        predicted=market.sensitivity.total(ordered),
        size_bytes=costs.size_bytes(ordered),
        average_bits=costs.average_bits(ordered),
        bit_operations=costs.bit_operations(ordered),
        minimized=counter.name,
        value=counter.total(solved.objective),
        bound=counter.total(solved.bound),
        gap=solved.gap / counter.divisor,
        status=solved.status,
        seconds=solved.seconds,
        latency=costs.total_latency(ordered),
    )


@dataclass(frozen=True, eq=False)
class _Counter:
    """A sum over layers, as the programme has it, and what the user calls it: `total = constant + sum / divisor`."""

    name: str
    of: Callable[[str, Option], float]
    constant: float = 0.0
    divisor: float = 1.0

    def program_limit(self, limit: float) -> float:
        return (limit - self.constant) * self.divisor

    def total(self, value: float) -> float:
        return self.constant + value / self.divisor


def _counters(market: Market) -> dict[str, _Counter]:
    costs = market.costs
    counters = (
        _Counter(DEGRADATION, lambda name, option: market.sensitivity.losses[name][option]),
        _Counter("bytes", lambda name, option: costs.layers[name].bytes(option), constant=costs.constant_bytes),
        _Counter("average_bits", lambda name, option: costs.layers[name].stored * option[0], divisor=costs.weights),
        _Counter("bit_operations", lambda name, option: costs.layers[name].bit_operations(option)),
        _Counter("latency", costs.latency),
    )
    return {counter.name: counter for counter in counters}


_COUNTED = {
    Quantity.DEGRADATION: DEGRADATION,
    Quantity.SIZE: "bytes",
    Quantity.BIT_OPERATIONS: "bit_operations",
    Quantity.LATENCY: "latency",
}

"""From a budget to widths: sensitivities, the integer programme, and rounds until measured degradations are within their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from subbyte.allocate.allocation import Allocation, Market, allocate
from subbyte.allocate.cost import Seconds, costs_of
from subbyte.allocate.frontier import POINTS, frontier
from subbyte.allocate.rounds import Held, Round, hold
from subbyte.allocate.saved import save_market
from subbyte.allocate.sensitivity import Sensitivity, sensitivity_of
from subbyte.assemble import Assembled, Assembler
from subbyte.budget import DEGRADATION_LOSSES, Budget
from subbyte.calibrate.reconstruct import reconstruct
from subbyte.calibrate.whole import Judge
from subbyte.choices import Choices
from subbyte.errors import InfeasibleError, OptionError
from subbyte.export.latency import Profile, Timing, layers_at, measure_layers
from subbyte.model.fold import Fold
from subbyte.widths import Option, Widths, for_tables


@dataclass(frozen=True, eq=False)
class Plan:
    """How a budget was met.

    Args:
        budget: as asked for.
        market: sensitivities and costs.
        allocation: the chosen one.
        rounds: what was assembled and measured, in order; the kept one among them.
        measured_loss: the sensitivities' loss of the returned model on held-out samples: what `allocation.predicted` predicted.
        missed: limits on degradations that the returned model does not meet: by name, the measured value.
        profile: measured times of the layers, where the budget came with them or asked for them.
    """

    budget: Budget
    market: Market
    allocation: Allocation
    rounds: tuple[Round, ...]
    measured_loss: float
    missed: Mapping[str, float]
    profile: Profile | None = None

    @property
    def sensitivity(self) -> Sensitivity:
        """The table."""
        return self.market.sensitivity

    def frontier(self, points: int = POINTS) -> tuple[Allocation, ...]:
        """The least predicted degradation for every size, see `allocate.frontier`.

        Args:
            points: at most.
        """
        return frontier(self.market, points)

    def solve(self, budget: Budget, most_degradation: float | None = None) -> Allocation:
        """What another budget would choose, from the same table.

        Args:
            budget: limits on costs count; those on degradations are not measured here. Without choices of its own, it has the plan's.
            most_degradation: limit on the predicted degradation.

        Raises:
            InfeasibleError: if no allocation is within the limits.
        """
        market, names = self.market, list(self.market.costs.layers)
        if budget.choices is not None or budget.target is not None:
            sizes, ties = market.costs.layers, [group for group in market.groups if any(market.costs.layers[name].shared for name in group)]
            tables = {name for name, size in sizes.items() if size.table and not any(name in tie for tie in ties)}
            choices = _tied(budget.choices_or(self.budget.choices or Choices()), ties)
            market = replace(market, options=for_tables(choices.of(names), tables), groups=choices.groups(names))
        if isinstance(budget.seconds, Mapping | Profile):
            market = replace(market, costs=replace(market.costs, seconds=_table(budget.seconds)))
        return allocate(market, budget, most_degradation)


def asked_for(widths: Widths | None, budget: Budget | None, choices: Choices) -> tuple[Widths | Budget, Widths | Choices]:
    """What was asked for, and what says which options layers may have.

    Args:
        widths: bits of every layer, or None.
        budget: in place of widths, or None; with neither, 8 bits everywhere.
        choices: of a budget that has none of its own.

    Raises:
        OptionError: if both are given.
    """
    if widths is not None and budget is not None:
        raise OptionError("give widths or a budget, not both; a budget's choices can pin layers")
    if budget is not None:
        own = budget.choices_or(choices)
        return replace(budget, choices=own), own
    return (widths or Widths(),) * 2


def carry_out(assembler: Assembler, asked: Widths | Budget, folds: Sequence[Fold], model: nn.Module) -> tuple[Assembled, Plan | None]:
    """The quantized model at fixed widths, or the best within a budget and how it was met.

    Args:
        assembler: model, data and recipe.
        asked: widths or a budget.
        folds: batch norms that were folded.
        model: the float model as it came.

    Raises:
        InfeasibleError: if no allocation is within the limits, as counted or as measured.
    """
    if isinstance(asked, Widths):
        options = asked.of([layer.name for layer in assembler.layers])
        for owner, other in assembler.ties:
            if options[owner][0] != options[other][0]:
                raise OptionError(
                    f"layers '{owner}' and '{other}' share one weight, so its width is one; give both the same, or exclude one"
                )
        only = for_tables({name: (option,) for name, option in options.items()}, assembler.tables)
        return assembler.assemble({name: row[0] for name, row in only.items()}), None
    profile = measured_profile(assembler, asked)
    market = survey_market(assembler, asked if profile is None else replace(asked, seconds=profile), folds, model)
    assembled, plan = meet(assembler, market, asked)
    return assembled, replace(plan, profile=profile)


def measured_profile(assembler: Assembler, budget: Budget) -> Profile | None:
    """The profile that a budget comes with, or the one that it asks for, measured now; None if it has a table or asks for none.

    Args:
        assembler: model and data.
        budget: its target, choices and seconds.

    Raises:
        OptionError: if the runtime is not installed, or the profile is of other weights than the recipe's.
        ModelError: if a layer cannot be run.
    """
    weights = assembler.recipe.weights
    if budget.timing is None:
        given = budget.seconds if isinstance(budget.seconds, Profile) else None
        if given is not None and given.timing.weights != weights:
            raise OptionError(f"the profile is of weights on {given.timing.weights}, the recipe's are on {weights}; measure again")
        return given
    options = for_tables((budget.choices or Choices()).of([layer.name for layer in assembler.layers]), assembler.tables)
    layers = layers_at(assembler.original, assembler.calibration.batches, budget.timing.batch_size, list(options))
    timing = replace(budget.timing, weights=weights)
    return measure_layers(layers, options, timing, assembler.kept.bank, assembler.observer)


def _table(seconds: Mapping[str, Mapping[Option, float]] | Profile | Timing | None) -> Seconds | None:
    """Seconds by layer name and option, where they are known."""
    return seconds.seconds if isinstance(seconds, Profile) else seconds if isinstance(seconds, Mapping) else None


def survey_market(assembler: Assembler, budget: Budget, folds: Sequence[Fold], model: nn.Module) -> Market:
    """Reconstruct every layer at every option, and measure what each does to the model.

    Args:
        assembler: model, data and recipe.
        budget: its choices, and the loss that it asks for.
        folds: batch norms that were folded.
        model: the float model as it came.
    """
    recipe, names = assembler.recipe, [layer.name for layer in assembler.layers]
    choices = _tied(budget.choices or Choices(), assembler.ties)
    options = for_tables(choices.of(names), assembler.tables)
    first = {name: row[0] for name, row in options.items()}
    models = assembler.prepare(first)
    kept = assembler.kept if recipe.table_method == recipe.method else assembler.kept.by(recipe.table_method)
    solved = reconstruct(models, options, assembler.calibration, recipe.table_method, kept, assembler.observer)
    asked = (recipe.sensitivity, budget.sensitivity_loss(recipe.loss))
    table = sensitivity_of(models, solved, assembler.calibration, asked, kept, assembler.observer)
    market = Market(table, costs_of(models, first, folds, model, _table(budget.seconds)), options, choices.groups(names))
    if assembler.kept.bank.run_folder is not None:
        save_market(assembler.kept.bank.run_folder, market)
    return market


def meet(assembler: Assembler, market: Market, budget: Budget) -> tuple[Assembled, Plan]:
    """The best model within a budget: the programme's answer, assembled; where degradations are limited, in rounds.

    Args:
        assembler: model, data and recipe.
        market: what there is to choose from.
        budget: what to meet.

    Raises:
        InfeasibleError: if no allocation is within the limits, as counted or as measured.
    """
    judge, limits = assembler.judge, budget.degradations
    judges = _judges(assembler, budget)
    loss = budget.sensitivity_loss(assembler.recipe.loss)
    float_score = None if budget.score is None else budget.score(assembler.original)

    def measure(assembled: Assembled) -> dict[str, float]:
        model = assembled.models.quantized
        found = {name: one.loss_of(model) for name, one in judges.items()}
        if budget.score is not None and float_score is not None:
            found["accuracy_drop"] = float_score - budget.score(model)
        return found

    held: Held[Assembled] = hold(
        lambda rhs: allocate(market, budget, rhs),
        lambda allocation: assembler.assemble(allocation.options),
        measure,
        limits,
        _start(market, budget),
        budget.rounds,
    )
    missed = {name: value for name, value in held.kept.measured.items() if not value <= limits[name]}
    if missed and not budget.best_effort:
        name, value = next(iter(missed.items()))
        mixtures = judges[name].mixtures if name in judges else 0
        mixed = f" and {mixtures} mixtures of them" if mixtures else ""
        raise InfeasibleError(name, limits[name], value, f"as measured on {judge.held_out_samples} held-out samples{mixed}")
    measured_loss = assembler.recipe.sensitivity.of_whole(judge, loss, assembler.original, held.assembled.models.quantized)
    return held.assembled, Plan(budget, market, held.kept.allocation, held.rounds, measured_loss, missed)


def _judges(assembler: Assembler, budget: Budget) -> dict[str, Judge]:
    """What measures each limited degradation; on which class is the largest, mixtures have no say, as no user means them by it."""
    judge, limited = assembler.judge, [name for name in DEGRADATION_LOSSES if name in budget.degradations]
    mixtures = budget.mixtures if assembler.recipe.mixtures and limited not in ([], ["disagreement"]) else 0
    with_mixtures = judge.with_mixtures(assembler.original, mixtures, assembler.calibration.seed)
    judges = {name: judge if name == "disagreement" else with_mixtures for name in limited}
    return {name: replace(one, loss=DEGRADATION_LOSSES[name]) for name, one in judges.items()}


def _start(market: Market, budget: Budget) -> float | None:
    """Predicted degradation of the first round: the limit itself where it is in the table's unit; else what 4 to 5 bits everywhere cost."""
    limits, table = budget.degradations, market.sensitivity
    if not limits or budget.minimized == "degradation":
        return None
    for name, value in limits.items():
        if name in DEGRADATION_LOSSES and type(DEGRADATION_LOSSES[name]).__name__ == table.loss_name and value > 0:
            return value
    middle = [sorted(row.values())[len(row) // 3] for row in table.losses.values()]
    return max(sum(middle), 1e-12)


def _tied(choices: Choices, ties: Sequence[Sequence[str]]) -> Choices:
    """The same choices, layers that share their codes tied."""
    return replace(choices, ties=(*choices.ties, *ties)) if ties else choices

"""Recipes by the names that the command line has for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from subbyte import Flavour, Recipe, advanced, default, light, relaxed, rounding, thorough, weight_only
from subbyte.cli.options import check_positive


class RecipeName(StrEnum):
    """Recipes by name.

    Example:
        >>> RecipeName("light").recipe().solver.name
        'RoundToNearest'
    """

    DEFAULT = "default"
    ROUNDING = "rounding"
    LIGHT = "light"
    ADVANCED = "advanced"
    RELAXED = "relaxed"
    THOROUGH = "thorough"
    WEIGHT_ONLY = "weight-only"

    def recipe(self) -> Recipe:
        """The recipe."""
        makers: dict[RecipeName, Callable[[], Recipe]] = {
            RecipeName.DEFAULT: default,
            RecipeName.ROUNDING: rounding,
            RecipeName.LIGHT: light,
            RecipeName.ADVANCED: advanced,
            RecipeName.RELAXED: relaxed,
            RecipeName.THOROUGH: thorough,
            RecipeName.WEIGHT_ONLY: weight_only,
        }
        return makers[self]()


RecipeOption = Annotated[RecipeName, typer.Option("--recipe", help="The steps of the run; 'rounding' is the baseline.")]


def inputs_of(recipe: Recipe) -> str:
    """What `--activation-bits` is where it is not given.

    Args:
        recipe: the one that was asked for.

    Example:
        >>> inputs_of(default()), inputs_of(weight_only())
        ('8', 'none')
    """
    return "none" if recipe.choices.activation_bits == (None,) else "8"


def recipe_from(
    name: RecipeName, flavour: Flavour | None, grouping: tuple[int | None, int | None] = (None, None), *, symmetric: bool
) -> Recipe:
    """The recipe that the options name.

    Args:
        name: as given.
        flavour: None keeps the recipe's own.
        grouping: weights that share a step, None: all of an output channel; and bits of attention's factors, None: float32.
        symmetric: whether weights have no zero-points.

    Raises:
        OptionError: if the group size is below 1, or attention bits are outside 2 to 8.

    Example:
        >>> recipe_from(RecipeName.ROUNDING, None, symmetric=False).solver.name
        'RoundToNearest'
    """
    group_size, attention_bits = grouping
    check_positive("--group-size", group_size)
    recipe = replace(name.recipe(), symmetric_weights=symmetric, weight_group=group_size, attention_bits=attention_bits)
    return recipe if flavour is None else replace(recipe, flavour=flavour)

"""Frozen values in words of Python: what a report says of a recipe or a budget."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any


def in_words(value: Any, *, everything: bool = False) -> str:
    """A value as an expression that makes it.

    Args:
        value: a frozen dataclass, or anything with a readable `repr`; functions have no address.
        everything: whether fields that have their default are named as well.

    Example:
        >>> from subbyte import Budget, Choices
        >>> in_words(Budget(size=0.125, choices=Choices((2, 4))))
        'Budget(size=0.125, choices=Choices(weight_bits=(2, 4)))'
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if everything or not _is_default(field, getattr(value, field.name))]
        inside = ", ".join(f"{field.name}={in_words(getattr(value, field.name), everything=everything)}" for field in fields)
        return f"{type(value).__name__}({inside})"
    if isinstance(value, Enum):
        return repr(value.value)
    if isinstance(value, tuple):
        items = [in_words(item, everything=everything) for item in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, list):
        return f"[{', '.join(in_words(item, everything=everything) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {in_words(item, everything=everything)}" for key, item in value.items()) + "}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def choices_in_words(value: Any) -> dict[str, str]:
    """Every field of a frozen value by name, with all that it is made of.

    Args:
        value: a frozen dataclass.

    Example:
        >>> from subbyte import Widths
        >>> choices_in_words(Widths(4))["pinned"]
        '{}'
    """
    return {field.name: in_words(getattr(value, field.name), everything=True) for field in dataclasses.fields(value)}


def differing(value: Any, other: Any) -> tuple[str, ...]:
    """Names of the fields in which two values of a kind differ.

    Args:
        value: a frozen dataclass.
        other: likewise.

    Example:
        >>> from subbyte import Widths
        >>> differing(Widths(4, 8), Widths(8, 8))
        ('weight_bits',)
    """
    return tuple(field.name for field in dataclasses.fields(value) if getattr(value, field.name) != getattr(other, field.name))


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and (value is field.default or bool(value == field.default))

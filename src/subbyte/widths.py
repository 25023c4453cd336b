"""Which layer gets how many bits, when the user says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from subbyte.errors import OptionError
from subbyte.quantizers.grid import Grid

Option = tuple[int, int | None]


@dataclass(frozen=True)
class Widths:
    """Fixed widths.

    Args:
        weight_bits: of every layer's weights, 2 to 8.
        activation_bits: of every layer's input, 2 to 8, or None to leave inputs in float32.
        pinned: other widths for some layers, by name or glob: one number for both, or `(weight bits, activation bits or None)`.
        include: globs; only these layers are quantized.
        exclude: globs; these layers stay in float32.

    Raises:
        OptionError: if a width is no integer from 2 to 8.

    Example:
        >>> Widths(4, 4, pinned={"conv1": 8, "fc*": (8, None)}).of(["conv1", "layer1", "fc"])
        {'conv1': (8, 8), 'layer1': (4, 4), 'fc': (8, None)}
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    pinned: Mapping[str, int | Option] = field(default_factory=dict)
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_option((self.weight_bits, self.activation_bits), "")
        for pattern, option in self.pinned.items():
            if not isinstance(option, int) and not (isinstance(option, tuple) and len(option) == 2):
                raise OptionError(
                    f"widths for '{pattern}' are a number from 2 to 8 or (weight bits, activation bits or None), not {option!r}"
                )
            check_option(as_option(option), f" for '{pattern}'")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise OptionError(f"{name} is a list of globs, not the text '{getattr(self, name)}'")

    def of(self, names: Sequence[str]) -> dict[str, Option]:
        """Widths of each layer; a later pin wins over an earlier one.

        Args:
            names: of the layers.

        Returns:
            `(weight bits, activation bits or None)` by name.

        Raises:
            OptionError: if a pin matches no layer.
        """
        options: dict[str, Option] = {name: (self.weight_bits, self.activation_bits) for name in names}
        for pattern, option in self.pinned.items():
            options |= dict.fromkeys(matching(names, pattern, "pinned"), as_option(option))
        return options


def matching(names: Sequence[str], pattern: str, role: str) -> list[str]:
    """The layers that a name or glob means.

    Args:
        names: of all layers that are quantized.
        pattern: name or glob.
        role: what the layers are meant for, for the message.

    Raises:
        OptionError: if it means none.

    Example:
        >>> matching(["conv1", "conv2", "fc"], "conv*", "pinned")
        ['conv1', 'conv2']
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise OptionError(f"{role} layer '{pattern}' is not among the layers that are quantized: {', '.join(names)}")
    return found


def as_option(option: int | Option) -> Option:
    """One number for both as a pair.

    Args:
        option: bits, or `(weight bits, activation bits or None)`.
    """
    return option if isinstance(option, tuple) else (option, option)


def as_rows(options: Mapping[str, Option | Sequence[Option]]) -> dict[str, tuple[Option, ...]]:
    """The options of every layer, also where each has one.

    Args:
        options: one or several, by layer name.

    Example:
        >>> as_rows({"conv": (4, None), "fc": ((4, 8), (8, 8))})
        {'conv': ((4, None),), 'fc': ((4, 8), (8, 8))}
    """
    found: dict[str, tuple[Option, ...]] = {}
    for name, row in options.items():
        found[name] = tuple(row) if isinstance(row[0], tuple) else (row,)  # type: ignore[arg-type,assignment]
    return found


def quantizes_inputs(options: Mapping[str, Sequence[Option]]) -> bool:
    """Whether any layer's input may be quantized.

    Args:
        options: of every layer, by name.

    Example:
        >>> quantizes_inputs({"conv": [(4, None)]}), quantizes_inputs({"conv": [(4, 8)]})
        (False, True)
    """
    return any(bits is not None for row in options.values() for _, bits in row)


def for_tables(options: Mapping[str, Sequence[Option]], tables: Collection[str]) -> dict[str, tuple[Option, ...]]:
    """The same options, without bits for an input that is only looked up by.

    Args:
        options: of every layer, by name.
        tables: names of the layers that look rows up.

    Example:
        >>> for_tables({"embedding": [(4, 4), (4, 8), (8, 8)], "fc": [(4, 8)]}, {"embedding"})
        {'embedding': ((4, None), (8, None)), 'fc': ((4, 8),)}
    """
    return {name: tuple(dict.fromkeys((bits, None) for bits, _ in row)) if name in tables else tuple(row) for name, row in options.items()}


def check_option(option: Option, where: str) -> None:
    """Refuse widths that no grid has.

    Args:
        option: `(weight bits, activation bits or None)`.
        where: which layer it is for, for the message; begins with a space, or is empty.

    Raises:
        OptionError: if a width is no integer from 2 to 8.
    """
    for what, bits in (("weight_bits", option[0]), ("activation_bits", option[1])):
        if bits is None and what == "activation_bits":
            continue
        try:
            Grid(bits)  # type: ignore[arg-type]
        except OptionError as error:
            raise OptionError(f"{what}{where}: {error}") from None

"""Which options every layer may choose among, when a budget decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from subbyte.errors import OptionError
from subbyte.quantizers.grid import MAX_BITS, MIN_BITS
from subbyte.widths import Option, as_option, check_option, matching

ALL_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))


@dataclass(frozen=True)
class Choices:
    """Options of every layer. The default is the paper's *relaxed* setting: 2 to 8 bits, a layer's input as wide as its weights.

    Args:
        weight_bits: widths that weights may have, 2 to 8 each.
        activation_bits: widths that inputs may have, freely combined with those of the weights; empty: a layer's input has as many bits as
            its weights; `(8,)` is what most processors run; `(None,)` leaves inputs in float32.
        pinned: the one option of some layers, by name or glob: a number for both, or `(weight bits, activation bits or None)`.
        allowed: the only options of some layers, by name or glob, in place of all combinations of the above.
        ties: groups of names or globs; the layers of a group get the same option, for example fused q, k and v.
        include: globs; only these layers are quantized.
        exclude: globs; these layers stay in float32.

    Raises:
        OptionError: if a width is no integer from 2 to 8, or there is nothing to choose from.

    Example:
        >>> Choices((4, 8), pinned={"fc": 8}).of(["conv", "fc"])
        {'conv': ((4, 4), (8, 8)), 'fc': ((8, 8),)}
        >>> Choices((2, 4), activation_bits=(8,)).of(["conv"])
        {'conv': ((2, 8), (4, 8))}
    """

    weight_bits: Sequence[int] = ALL_BITS
    activation_bits: Sequence[int | None] = ()
    pinned: Mapping[str, int | Option] = field(default_factory=dict)
    allowed: Mapping[str, Sequence[int | Option]] = field(default_factory=dict)
    ties: Sequence[Sequence[str]] = ()
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise OptionError(f"{name} is a list of globs, not the text '{getattr(self, name)}'")
        if any(isinstance(group, str) for group in self.ties):
            raise OptionError(f"ties are groups of names, such as [('q', 'k', 'v')], not {self.ties!r}")
        _check(self._everywhere(), "")
        for pattern, options in self._by_pattern():
            _check(options, f" for '{pattern}'")

    def of(self, names: Sequence[str]) -> dict[str, tuple[Option, ...]]:
        """Options of each layer, without repetition; layers that are tied together keep those that all of them have.

        Args:
            names: of the layers.

        Raises:
            OptionError: if a pin, restriction or tie matches no layer, or tied layers have no option in common.
        """
        options = dict.fromkeys(names, self._everywhere())
        for pattern, own in self._by_pattern():
            options |= dict.fromkeys(matching(names, pattern, "pinned or restricted"), own)
        for group in self.groups(names):
            common = tuple(option for option in options[group[0]] if all(option in options[name] for name in group))
            if not common:
                raise OptionError(f"the tied layers {', '.join(group)} have no option in common")
            options |= dict.fromkeys(group, common)
        return options

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Layers that get the same option, each layer in exactly one group, in the order of `names`.

        Args:
            names: of the layers.

        Raises:
            OptionError: if a tie matches no layer.

        Example:
            >>> Choices(ties=[("q", "k"), ("k", "v")]).groups(["q", "k", "v", "out"])
            (('q', 'k', 'v'), ('out',))
        """
        leader = {name: name for name in names}
        for tie in self.ties:
            tied = {name for pattern in tie for name in matching(names, pattern, "tied")}
            merged = {leader[name] for name in tied}
            first = next(name for name in names if name in merged)
            leader = {name: first if lead in merged else lead for name, lead in leader.items()}
        return tuple(tuple(name for name in names if leader[name] == first) for first in names if leader[first] == first)

    def within(self, runs: Sequence[Option], target: str) -> Choices:
        """These choices as far as a target runs them. Inputs that are to be as wide as their weights are as wide as the target runs them,
        where it does not run the former.

        Args:
            runs: options of the target.
            target: its name, for the message.

        Raises:
            OptionError: if it runs none of them, or not the pin of a layer.

        Example:
            >>> Choices((4, 8), pinned={"fc": (6, 8)}).within(((4, 8), (6, 8), (8, 8)), "a processor").of(["conv", "fc"])
            {'conv': ((4, 8), (8, 8)), 'fc': ((6, 8),)}
        """
        everywhere = self._everywhere()
        if not self.activation_bits and not set(everywhere) <= set(runs):
            everywhere = tuple(option for option in runs if option[0] in self.weight_bits)
            everywhere = tuple(option for option in everywhere if option[1] is not None) or everywhere
        allowed = {"*": everywhere} | {pattern: tuple(as_option(option) for option in row) for pattern, row in self.allowed.items()}
        allowed = {pattern: tuple(option for option in row if option in runs) for pattern, row in allowed.items()}
        bad = [pattern for pattern, row in allowed.items() if not row]
        bad += [pattern for pattern, option in self.pinned.items() if as_option(option) not in runs]
        if bad:
            what = f"'{bad[0]}' is pinned or restricted to" if bad[0] in {*self.pinned, *self.allowed} else "the choices are"
            listed = ", ".join(map(str, runs))
            raise OptionError(f"{what} options that {target} does not run; as (weight bits, activation bits) it runs {listed}")
        return replace(self, allowed=allowed)

    def _everywhere(self) -> tuple[Option, ...]:
        if not self.activation_bits:
            return tuple(dict.fromkeys((bits, bits) for bits in self.weight_bits))
        return tuple(dict.fromkeys(product(self.weight_bits, self.activation_bits)))

    def _by_pattern(self) -> list[tuple[str, tuple[Option, ...]]]:
        own = [(pattern, tuple(dict.fromkeys(as_option(option) for option in options))) for pattern, options in self.allowed.items()]
        return own + [(pattern, (as_option(option),)) for pattern, option in self.pinned.items()]


def _check(options: Sequence[Option], where: str) -> None:
    if not options:
        raise OptionError(f"there is no option to choose from{where}")
    for option in options:
        if len(option) != 2:
            raise OptionError(f"an option{where} is a number from 2 to 8 or (weight bits, activation bits or None), not {option!r}")
        check_option(option, where)
    if len({option[1] is None for option in options}) > 1:
        raise OptionError(f"a layer's input is quantized in all of its options or in none, not {list(options)}{where}")

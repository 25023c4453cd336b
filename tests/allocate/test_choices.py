"""Choices: who may have which option."""

from __future__ import annotations

import pytest

from subbyte import Choices, OptionError

NAMES = ["q", "k", "v", "out"]


def test_pins_win_over_restrictions_and_these_over_the_rest() -> None:
    choices = Choices((2, 4), allowed={"*": [3, (4, 8)], "out": [8]}, pinned={"q": 5})
    assert choices.of(NAMES) == {"q": ((5, 5),), "k": ((3, 3), (4, 8)), "v": ((3, 3), (4, 8)), "out": ((8, 8),)}


def test_tied_layers_keep_what_all_of_them_have() -> None:
    choices = Choices((2, 3, 4), ties=[("q", "k"), ("k", "v")], allowed={"k": [3, 4, 8]})
    assert choices.of(NAMES)["q"] == choices.of(NAMES)["v"] == ((3, 3), (4, 4))
    assert choices.groups(NAMES) == (("q", "k", "v"), ("out",))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Choices((9,)), "2 to 8"),
        (lambda: Choices(()), "no option to choose from"),
        (lambda: Choices((4,), activation_bits=(None, 8)), "all of its options or in none"),
        (lambda: Choices(ties=["qkv"]), "ties are groups"),
        (lambda: Choices(exclude="fc"), "list of globs"),
        (lambda: Choices(pinned={"nothing": 8}).of(NAMES), "nothing"),
        (lambda: Choices(ties=[("q", "k")], pinned={"q": 2, "k": 8}).of(NAMES), "no option in common"),
    ],
)
def test_what_cannot_be_served_is_said(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=message):
        build()


def test_a_target_leaves_what_it_runs() -> None:
    runs = tuple((bits, 8) for bits in range(2, 9))
    assert Choices((2, 4)).within(runs, "it").of(["out"]) == {"out": ((2, 8), (4, 8))}
    assert Choices((2, 4), activation_bits=(4, 8)).within(runs, "it").of(["out"]) == {"out": ((2, 8), (4, 8))}
    assert Choices((2, 8)).within([(2, 2), (8, 8), (8, 4)], "it").of(["out"]) == {"out": ((2, 2), (8, 8))}
    within = Choices((2,), allowed={"k": [8, (4, 8), 4]}, pinned={"v": (6, 8)}, ties=[("q", "out")]).within(runs, "it")
    assert within.of(NAMES) == {"q": ((2, 8),), "k": ((8, 8), (4, 8)), "v": ((6, 8),), "out": ((2, 8),)}
    for choices in (Choices(pinned={"v": 4}), Choices(allowed={"v": [4]}), Choices(activation_bits=(None,))):
        with pytest.raises(OptionError, match="options that it does not run"):
            choices.within(runs, "it")

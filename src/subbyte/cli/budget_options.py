"""The options that make a budget, and how their text becomes one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from subbyte import Budget, Choices, KLDivergence, Target
from subbyte.allocate.cost import Seconds
from subbyte.budget import Quantity
from subbyte.cli.options import bits_or_none, pins_from
from subbyte.errors import OptionError
from subbyte.run.bank import ENTRIES

PACKED_NAME = "model.subbyte.safetensors"

SizeOption = Annotated[
    float | None, typer.Option("--size", metavar="SHARE", help="Budget: bytes of the packed file, as a share of the float model's.")
]
BytesOption = Annotated[int | None, typer.Option("--bytes", metavar="N", help="Budget: bytes of the packed file.")]
AverageBitsOption = Annotated[float | None, typer.Option("--average-bits", metavar="B", help="Budget: mean bits of all quantized weights.")]
MaxKLOption = Annotated[
    float | None,
    typer.Option(
        "--max-kl", metavar="NATS", help="Budget, of a classifier: KL divergence as measured on held-out samples and mixtures of them."
    ),
]
MinAgreementOption = Annotated[
    float | None, typer.Option("--min-agreement", metavar="PERCENT", help="Budget, of a classifier: predictions as the float model's.")
]
MaxErrorOption = Annotated[
    float | None, typer.Option("--max-error", metavar="SHARE", help="Budget: relative squared error of the output, likewise measured.")
]
MaxLatencyOption = Annotated[
    float | None,
    typer.Option("--max-latency", metavar="MS", help="Budget: milliseconds of one sample, summed over the layers as measured in --target."),
]
MinimizeOption = Annotated[
    Quantity | None,
    typer.Option("--minimize", help="Budget: what to make smallest. Default degradation if a cost is limited, else size."),
]
WeightChoicesOption = Annotated[
    str | None, typer.Option("--weight-choices", metavar="2,4,8", help="Budget: bits that weights may have. Default the recipe's.")
]
ActivationChoicesOption = Annotated[
    str | None,
    typer.Option("--activation-choices", metavar="same|8|none", help="Budget: bits that inputs may have. Default the recipe's."),
]
ClassifierOption = Annotated[
    bool,
    typer.Option("--classifier", help="Budget: outputs are logits, so that widths are chosen by KL divergence instead of squared error."),
]
BestEffortOption = Annotated[
    bool, typer.Option("--best-effort", help="Budget: give the best model found where a degradation limit cannot be met.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that 'quantize --out RUN/' made.")]
MaxPredictedOption = Annotated[
    float | None,
    typer.Option("--max-predicted", metavar="LOSS", help="Limit on the predicted degradation, in the unit of the table."),
]
FrontierOption = Annotated[bool, typer.Option("--frontier", help="List the best allocation for every size instead.")]


def choices_from(
    otherwise: Choices,
    given: tuple[str | None, str | None],
    keep: Sequence[str] | None,
    pins: Sequence[str] | None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Choices:
    """Choices of what the options say.

    Args:
        otherwise: the recipe's choices, where an option is not given.
        given: `--weight-choices`, numbers between commas, and `--activation-choices`, ``same``, or numbers or ``none`` between commas.
        keep: names or globs of layers at 8 bits.
        pins: ``NAME=W`` or ``NAME=W,A``.
        include: globs of the only layers to quantize; None or none means all.
        exclude: globs of layers to leave out.

    Raises:
        OptionError: if a text cannot be read, or a width is outside 2 to 8.

    Example:
        >>> choices_from(Choices(), ("4,8", "8"), None, ["fc=8"]).of(["conv", "fc"])
        {'conv': ((4, 8), (8, 8)), 'fc': ((8, 8),)}
    """
    weight_text, input_text = given
    weights = list(otherwise.weight_bits) if weight_text is None else [bits_or_none("--weight-choices", x) for x in weight_text.split(",")]
    if any(bits is None for bits in weights):
        raise OptionError("--weight-choices: weights have 2 to 8 bits; --exclude leaves a layer in float32")
    inputs = tuple(otherwise.activation_bits)
    if input_text is not None:
        same = input_text.strip().lower() == "same"
        inputs = () if same else tuple(bits_or_none("--activation-choices", part) for part in input_text.split(","))
    pinned = pins_from(keep, pins, float_inputs=inputs == (None,))
    return Choices([bits for bits in weights if bits is not None], inputs, pinned, include=include or ("*",), exclude=exclude or ())


def budget_from(
    limits: dict[str, float | None],
    minimize: Quantity | None,
    choices: Choices,
    where: Target | Seconds | None = None,
    *,
    best_effort: bool,
    classifier: bool = False,
) -> Budget | None:
    """The budget that the options describe; None if they describe none.

    Args:
        limits: by the field of `Budget`, as given.
        minimize: as given.
        choices: options of every layer.
        where: the model is to run, or the seconds that its layers take there, if that is known.
        best_effort: whether a limit that cannot be met is no error.
        classifier: whether sensitivities are of KL divergence.

    Raises:
        OptionError: if a limit is outside its range, or there is something to minimize, or a classifier, and no limit.

    Example:
        >>> budget_from({"size": 0.125, "kl": None}, None, Choices(), best_effort=False).size
        0.125
    """
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given and minimize is None:
        if classifier:
            raise OptionError("--classifier says by what a budget chooses the widths, and there is no budget")
        return None
    if where is None and ("latency" in given or minimize is Quantity.LATENCY):
        raise OptionError("a latency is measured in a runtime: 'quantize' with --target onnxruntime or openvino measures it")
    place = {"target": where} if isinstance(where, Target) else {"seconds": where}
    loss = KLDivergence() if classifier else None
    return Budget(minimize=minimize, choices=choices, loss=loss, best_effort=best_effort, **place, **given)  # type: ignore[arg-type]


def seconds_of(milliseconds: float | None) -> float | None:
    """Seconds, if there are any.

    Args:
        milliseconds: as given.

    Example:
        >>> seconds_of(2.0), seconds_of(None)
        (0.002, None)
    """
    return None if milliseconds is None else milliseconds / 1000.0


def is_run_folder(out: str) -> bool:
    """Whether `--out` names a run folder: it ends in a slash, or is one already.

    Args:
        out: as given.

    Example:
        >>> is_run_folder("run/"), is_run_folder("net.subbyte.safetensors")
        (True, False)
    """
    return out.endswith("/") or os.path.isdir(Path(out) / ENTRIES)

"""Budget: what to make smallest, and what to keep within."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from subbyte.calibrate.loss import Disagreement, KLDivergence, OutputLoss, RelativeSquaredError
from subbyte.choices import Choices
from subbyte.errors import OptionError
from subbyte.export.latency import Profile, Timing
from subbyte.export.targets import Target
from subbyte.widths import Option


class Quantity(StrEnum):
    """What a budget can make smallest.

    Example:
        >>> Quantity("size")
        <Quantity.SIZE: 'size'>
    """

    DEGRADATION = "degradation"
    SIZE = "size"
    BIT_OPERATIONS = "bit_operations"
    LATENCY = "latency"


@dataclass(frozen=True)
class Budget:
    """What to make smallest, and what to keep within; any number of limits at once.

    Costs are counted before anything is assembled, bytes exactly as the packed file has them. Degradations hold as *measured* on held-out
    samples, and mixtures of them, of the assembled model: it is measured, the programme is corrected and solved again, a few times.

    Args:
        minimize: what to make smallest; None: the degradation where a cost is limited, the size where none is.
        size: of the packed file, as a share of the float model's bytes, 0 to 1.
        bytes: of the packed file.
        average_bits: mean width of all weights that are quantized.
        bit_operations: multiply-accumulates of one sample times both factors' bits.
        latency: seconds, summed over the layers.
        kl: KL divergence from the float model's output, a classifier's logits along the last dimension, in nats.
        relative_error: squared error of the output, as a share of the float output's square.
        agreement: percent of predictions, the largest entry along the last dimension, that are the float model's.
        accuracy_drop: how far `score` may fall below the float model's.
        score: the user's own measure, on labelled samples of theirs: takes a model, gives a number, higher is better.
        choices: options of every layer; None: the recipe's.
        target: where the model is to run: of the choices, those count that it runs.
        seconds: time of each layer at each of its options, a profile or by name and `(weight bits, activation bits)`; or how to measure
            it. None: where a latency counts, it is measured in the target's runtime, on the threads of torch.
        loss: what sensitivities measure; None: KL divergence where a limit says that the model is a classifier (`kl`, `agreement`,
            `accuracy_drop`), the recipe's loss otherwise.
        held_out: share of the samples that judge, where a degradation is limited: it can only be met as finely as they can tell.
        mixtures: of each held-out sample with others, that judge `kl` and `relative_error` beside it; 0: held-out samples alone. A
            classifier is sure of samples that it was trained on, so that these alone promise a KL divergence many times too small.
        rounds: how often a model is assembled and measured, at most.
        best_effort: whether a degradation limit that cannot be met gives the best model found, and says so, instead of an error.

    Raises:
        OptionError: if there is nothing to meet or a limit is outside its range.

    Example:
        >>> Budget(size=0.125).minimized, Budget(kl=0.01).minimized
        (<Quantity.DEGRADATION: 'degradation'>, <Quantity.SIZE: 'size'>)
        >>> Budget(size=12.5)
        Traceback (most recent call last):
        subbyte.errors.OptionError: size is a share of the float model's bytes, above 0 and at most 1, not 12.5
    """

    minimize: Quantity | str | None = None
    size: float | None = None
    bytes: int | None = None
    average_bits: float | None = None
    bit_operations: float | None = None
    latency: float | None = None
    kl: float | None = None
    relative_error: float | None = None
    agreement: float | None = None
    accuracy_drop: float | None = None
    score: Callable[[nn.Module], float] | None = None
    choices: Choices | None = None
    target: Target | None = None
    seconds: Mapping[str, Mapping[Option, float]] | Profile | Timing | None = None
    loss: OutputLoss | None = None
    held_out: float = 0.25
    mixtures: int = 15
    rounds: int = 16
    best_effort: bool = False

    def __post_init__(self) -> None:
        try:
            if self.minimize is not None:
                object.__setattr__(self, "minimize", Quantity(self.minimize))
        except ValueError:
            raise OptionError(f"minimize is one of {', '.join(Quantity)}, not '{self.minimize}'") from None
        if not self.cost_limits(1) and not self.degradations:
            raise OptionError(
                "a budget needs a limit: size, bytes, average_bits, bit_operations, latency, kl, relative_error, agreement ..."
            )
        self._check_limits()
        if (self.accuracy_drop is None) != (self.score is None):
            raise OptionError("accuracy_drop and score belong together: the score says how accurate a model is")
        if self.needs_seconds and not self.seconds and self.timing is None:
            raise OptionError("a latency needs a `target` to measure layers in, or `seconds`, the time of each layer at each option")
        if not 0 < self.held_out <= 0.5 or self.rounds < 1:
            raise OptionError(f"held_out is above 0 and at most 0.5, rounds at least 1, not {self.held_out} and {self.rounds}")
        if self.mixtures < 0:
            raise OptionError(f"mixtures are counted from 0, not {self.mixtures}")

    def _check_limits(self) -> None:
        if self.size is not None and not 0 < self.size <= 1:
            raise OptionError(f"size is a share of the float model's bytes, above 0 and at most 1, not {self.size}")
        if self.agreement is not None and not 0 <= self.agreement <= 100:
            raise OptionError(f"agreement is a percentage, 0 to 100, not {self.agreement}")
        for name in ("bytes", "average_bits", "bit_operations", "latency", "kl", "relative_error", "accuracy_drop"):
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit >= 0):
                raise OptionError(f"{name} is a number that is not negative, not {limit}")

    @property
    def minimized(self) -> Quantity:
        """What is made smallest."""
        if self.minimize is not None:
            return Quantity(self.minimize)
        return Quantity.DEGRADATION if self.cost_limits(1) else Quantity.SIZE

    @property
    def needs_seconds(self) -> bool:
        """Whether the time of a layer counts."""
        return self.latency is not None or self.minimized is Quantity.LATENCY

    @property
    def timing(self) -> Timing | None:
        """How layers are to be measured, if they are."""
        if isinstance(self.seconds, Timing):
            return self.seconds
        return Timing(self.target) if self.target is not None and self.needs_seconds and self.seconds is None else None

    def choices_or(self, otherwise: Choices) -> Choices:
        """Options of every layer, of which the target, if there is one, runs all.

        Args:
            otherwise: where the budget has none.

        Raises:
            OptionError: if the target runs none of them, or not a layer's pin.

        Example:
            >>> from subbyte.export.targets import OnnxRuntimeCPU
            >>> Budget(size=0.1, target=OnnxRuntimeCPU(), choices=Choices((2, 4))).choices_or(Choices()).of(["fc"])
            {'fc': ((2, 8), (4, 8))}
        """
        choices = self.choices or otherwise
        return choices if self.target is None else choices.within(self.target.options(), self.target.name)

    def cost_limits(self, float_bytes: int) -> dict[str, float]:
        """Limits on costs by name; both limits on the file's size are one, ``"bytes"``.

        Args:
            float_bytes: of the float model.
        """
        given = {name: getattr(self, name) for name in ("average_bits", "bit_operations", "latency")}
        sizes = [self.bytes, None if self.size is None else math.floor(self.size * float_bytes)]
        least: builtins.float | None = min((size for size in sizes if size is not None), default=None)
        return {name: float(limit) for name, limit in ({"bytes": least} | given).items() if limit is not None}

    @property
    def degradations(self) -> dict[str, float]:
        """Limits on degradations by name, as numbers that should be small: ``"disagreement"`` is a share."""
        given = {"kl": self.kl, "relative_error": self.relative_error, "accuracy_drop": self.accuracy_drop}
        if self.agreement is not None:
            given["disagreement"] = 1.0 - self.agreement / 100.0
        return {name: limit for name, limit in given.items() if limit is not None}

    def sensitivity_loss(self, otherwise: OutputLoss) -> OutputLoss:
        """What sensitivities measure.

        Args:
            otherwise: the recipe's loss.
        """
        if self.loss is not None:
            return self.loss
        classifier = any(limit is not None for limit in (self.kl, self.agreement, self.accuracy_drop))
        return KLDivergence() if classifier else otherwise


DEGRADATION_LOSSES: Mapping[str, OutputLoss] = {
    "kl": KLDivergence(),
    "relative_error": RelativeSquaredError(),
    "disagreement": Disagreement(),
}

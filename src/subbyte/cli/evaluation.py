"""Score a float model, and beside it the quantized one of a packed file.

top-1       percent of samples whose largest logit is at their label
agreement   percent of samples whose largest logit is at the same place in both models
KL          mean over samples of KL(float || quantized) of the class probabilities, in nats
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte import KLDivergence
from subbyte.errors import DataError, ModelError, OptionError
from subbyte.model.batches import call, describe, tensors
from subbyte.tasks import top1

__all__ = ["Evaluation", "compared", "logits_of"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None where there were no labels, no packed file or no float model.

    Args:
        samples: how many.
        float_bytes: the float model's parameters and buffers.
        float_top1: percent.
        packed_bytes: size of the packed file.
        packed_top1: percent.
        agreement: percent.
        kl: nats.
    """

    samples: int
    float_bytes: int | None
    float_top1: float | None
    packed_bytes: int | None
    packed_top1: float | None
    agreement: float | None
    kl: float | None


def logits_of(model: nn.Module, samples: Tensor, batch_size: int, output: str | None) -> Tensor:
    """The logits of every sample.

    Args:
        model: in evaluation mode.
        samples: what it takes, any dtype, (samples, ...).
        batch_size: samples in one forward.
        output: key of the logits where the model returns a mapping of several tensors; None takes the only floating-point one.

    Returns:
        float32 (samples, ..., classes).

    Raises:
        ModelError: if the model fails, or returns other than one tensor of logits for each sample.
        OptionError: if there is no such output.

    Example:
        >>> logits_of(nn.Identity(), torch.eye(3), 2, None).shape
        torch.Size([3, 3])
    """
    found = []
    with torch.no_grad():
        for batch in samples.split(batch_size):
            try:
                given = call(model, batch)
            except Exception as error:  # noqa: BLE001 - says that it was the user's model that failed
                raise ModelError(f"the model failed on a batch {describe(batch)}: {error}") from error
            logits = _chosen(given, output)
            if logits.dim() < 2 or len(logits) != len(batch):
                raise ModelError(f"the model returned {describe(given)} for {len(batch)} samples, expected logits (samples, ..., classes)")
            found.append(logits.float().cpu())
    return torch.cat(found)


def compared(reference: Tensor | None, quantized: Tensor | None, labels: Tensor | None, sizes: tuple[int | None, int | None]) -> Evaluation:
    """Put the figures together.

    Args:
        reference: the float model's logits, float32 (samples, ..., classes), or None.
        quantized: the quantized model's, the same shape, or None; not both are None.
        labels: int64 (samples,), or None; logits are then (samples, classes).
        sizes: bytes of the float model and of the packed file.

    Raises:
        DataError: if the labels do not fit the logits.
        ModelError: if the two models' logits differ in shape.

    Example:
        >>> compared(torch.eye(2), torch.eye(2), torch.tensor([0, 0]), (8, 2))
        Evaluation(samples=2, float_bytes=8, float_top1=50.0, packed_bytes=2, packed_top1=50.0, agreement=100.0, kl=0.0)
    """
    logits = [given for given in (reference, quantized) if given is not None]
    largest = -1 if labels is None else int(labels.max())
    for given in logits if labels is not None else ():
        if given.dim() != 2 or largest >= given.shape[1]:
            raise DataError(f"labels up to {largest} do not fit logits {describe(given)}; top-1 needs one label below `classes` a sample")
    if len(logits) == 2 and logits[0].shape != logits[1].shape:
        raise ModelError(f"the float model returns {describe(reference)}, the quantized one {describe(quantized)}")
    agreement = kl = None
    if reference is not None and quantized is not None:
        agreement = _top1(quantized.flatten(0, -2), reference.flatten(0, -2).argmax(-1))
        above, below = KLDivergence().total(reference, quantized)
        kl = float(above / below)
    return Evaluation(
        samples=len(logits[0]),
        float_bytes=sizes[0],
        float_top1=None if labels is None or reference is None else _top1(reference, labels),
        packed_bytes=sizes[1],
        packed_top1=None if labels is None or quantized is None else _top1(quantized, labels),
        agreement=agreement,
        kl=kl,
    )


def _top1(logits: Tensor, labels: Tensor) -> float:
    return top1(nn.Identity().eval(), logits, labels)


def _chosen(given: object, output: str | None) -> Tensor:
    if output is not None:
        chosen = given.get(output) if isinstance(given, Mapping) else getattr(given, output, None)
        if not isinstance(chosen, Tensor):
            raise OptionError(f"--output '{output}' is no tensor in what the model returns, {describe(given)}")
        return chosen
    floats = [tensor for tensor in tensors(given) if tensor.is_floating_point()]
    if len(floats) != 1:
        raise ModelError(f"the model returns {describe(given)}; name the entry that holds the logits with --output")
    return floats[0]

"""Score a float model, and beside it the quantized one of a packed file.

top-1       percent of samples whose largest logit is at their label
agreement   percent of samples whose largest logit is at the same place in both models
KL          mean over samples of KL(float || quantized) of the class probabilities, in nats
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone knows it by

from subbyte import KLDivergence
from subbyte.cli.inputs import Inputs
from subbyte.errors import DataError, ModelError, OptionError
from subbyte.model.batches import Batch, call, describe, floating_tensors, sample_count
from subbyte.model.padding import real_positions, without_padding
from subbyte.tasks import top1

__all__ = ["Evaluation", "compared", "compared_tokens", "logits_of"]


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
        float_perplexity: of a model that predicts the next token.
        packed_perplexity: likewise.
    """

    samples: int
    float_bytes: int | None
    float_top1: float | None
    packed_bytes: int | None
    packed_top1: float | None
    agreement: float | None
    kl: float | None
    float_perplexity: float | None = None
    packed_perplexity: float | None = None


def logits_of(model: nn.Module, inputs: Inputs, output: str | None) -> Tensor:
    """The logits of every sample, or of every position of every sample.

    Args:
        model: in evaluation mode.
        inputs: what it is called with.
        output: key of the logits where the model returns a mapping of several tensors; None takes the only floating-point one.

    Returns:
        float32 (samples, ..., classes) in the order of the data; of positions, without padding, float32 (positions, classes).

    Raises:
        ModelError: if the model fails, or returns other than one tensor of logits for each sample.
        OptionError: if there is no such output.

    Example:
        >>> logits_of(nn.Identity(), Inputs([torch.eye(3)], torch.arange(3)), None).shape
        torch.Size([3, 3])
    """
    found, padded = [], False
    for batch in inputs.batches:
        given = _called(model, batch)
        logits = _chosen(given, output)
        if logits.dim() < 2 or len(logits) != sample_count(batch):
            raise ModelError(f"the model returned {describe(given)} for {describe(batch)}, expected logits (samples, ..., classes)")
        real = without_padding(logits, real_positions(batch))
        padded = padded or real is not logits
        found.append(real.float().cpu())
    if padded or len({part.shape[1:] for part in found}) > 1:
        return torch.cat([part.flatten(0, -2) for part in found])
    return inputs.in_order(torch.cat(found))


def compared_tokens(model: nn.Module, quantized: nn.Module | None, inputs: Inputs, sizes: tuple[int | None, int | None]) -> Evaluation:
    """Figures of models that predict the next token, batch by batch: logits of all tokens at once would not fit into memory.

    Args:
        model: float model, in evaluation mode; gives logits, float32 (samples, tokens, tokens of the vocabulary).
        quantized: the same of the quantized model, or None.
        inputs: windows of text.
        sizes: bytes of the float model and of the packed file.

    Raises:
        ModelError: if a model fails.
    """
    totals = torch.zeros(5, dtype=torch.float64)  # tokens, both models' negative log likelihoods, same predictions, divergence
    for batch in inputs.batches:
        target = batch["input_ids"][:, 1:].flatten()
        reference = _chosen(_called(model, batch), None)[:, :-1].flatten(0, 1)
        other = reference if quantized is None else _chosen(_called(quantized, batch), None)[:, :-1].flatten(0, 1)
        same = (reference.argmax(-1) == other.argmax(-1)).sum()
        divergence, _ = KLDivergence().total(reference, other)
        losses = [F.cross_entropy(logits, target, reduction="sum") for logits in (reference, other)]
        totals += torch.stack([torch.tensor(len(target)), *losses, same, divergence]).double()
    tokens, float_loss, loss, same, divergence = totals.tolist()
    there = quantized is not None
    return Evaluation(
        samples=len(inputs.order),
        float_bytes=sizes[0],
        float_top1=None,
        packed_bytes=sizes[1],
        packed_top1=None,
        agreement=100.0 * same / tokens if there else None,
        kl=divergence / tokens if there else None,
        float_perplexity=math.exp(float_loss / tokens),
        packed_perplexity=math.exp(loss / tokens) if there else None,
    )


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
        Evaluation(samples=2, float_bytes=8, float_top1=50.0, packed_bytes=2, packed_top1=50.0, agreement=100.0, kl=0.0,
            float_perplexity=None, packed_perplexity=None)
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


@torch.no_grad()
def _called(model: nn.Module, batch: Batch) -> object:
    try:
        return call(model, batch)
    except Exception as error:  # noqa: BLE001 - says that it was the user's model that failed
        raise ModelError(f"the model failed on a batch {describe(batch)}: {error}") from error


def _chosen(given: object, output: str | None) -> Tensor:
    if output is not None:
        chosen = given.get(output) if isinstance(given, Mapping) else getattr(given, output, None)
        if not isinstance(chosen, Tensor):
            raise OptionError(f"--output '{output}' is no tensor in what the model returns, {describe(given)}")
        return chosen
    floats = floating_tensors(given)
    if len(floats) != 1:
        raise ModelError(f"the model returns {describe(given)}; name the entry that holds the logits with --output")
    return floats[0]

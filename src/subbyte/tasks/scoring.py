"""How good a network is, and how close it stays to another one.

    top-1       100 / N  sum_i [argmax f(x_i) = y_i]
    agreement   100 / N  sum_i [argmax f(x_i) = argmax g(x_i)]
    divergence    1 / N  sum_i sum_c p_ic (log p_ic - log q_ic),      p_i = softmax f(x_i),  q_i = softmax g(x_i)

All three take the inputs whole and cut them into batches; `preprocess`, if given, turns one batch into what the network takes, so that a
set of images can stay in memory as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from subbyte.errors import DataError, ModelError, OptionError

__all__ = ["agreement", "kl_divergence", "top1"]

Preprocess = Callable[[Tensor], Tensor]


def top1(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 250, preprocess: Preprocess | None = None) -> float:
    """Percent of the inputs whose largest output is at their label.

    Args:
        model: gives logits, float (batch, classes); in evaluation mode; it runs where its parameters are.
        inputs: (samples, ...), what `preprocess` takes, or what the model takes.
        labels: int64 (samples,), class indices.
        batch_size: samples a forward pass.
        preprocess: turns a batch of `inputs`, moved to the model's device, into what the model takes.

    Returns:
        Percent, 0 to 100.

    Raises:
        DataError: if there is no input, or if inputs and labels differ in number.
        ModelError: if the model is in training mode.
        OptionError: if `batch_size` is not positive.

    Example:
        >>> top1(torch.nn.Identity().eval(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
        75.0
    """
    if len(inputs) != len(labels):
        raise DataError(f"{len(inputs)} inputs, but {len(labels)} labels: they must be as many, in the same order")
    predicted = torch.cat([logits.argmax(-1).cpu() for logits in _outputs(model, inputs, batch_size, preprocess)])
    return _percent_equal(predicted, labels.cpu())


def agreement(
    model_a: nn.Module, model_b: nn.Module, inputs: Tensor, *, batch_size: int = 250, preprocess: Preprocess | None = None
) -> float:
    """Percent of the inputs on which two networks have their largest output at the same place.

    Args:
        model_a: gives logits, float (batch, classes); in evaluation mode.
        model_b: the same; it may be on another device.
        inputs: (samples, ...), what `preprocess` takes, or what the models take.
        batch_size: samples a forward pass.
        preprocess: turns a batch of `inputs` into what the models take.

    Returns:
        Percent, 0 to 100.

    Raises:
        DataError: if there is no input.
        ModelError: if a model is in training mode.
        OptionError: if `batch_size` is not positive.

    Example:
        >>> agreement(torch.nn.Identity().eval(), torch.nn.Softmax(-1).eval(), torch.eye(4))
        100.0
    """
    predicted = (
        torch.cat([logits.argmax(-1).cpu() for logits in _outputs(model, inputs, batch_size, preprocess)]) for model in (model_a, model_b)
    )
    return _percent_equal(next(predicted), next(predicted))


def kl_divergence(
    reference: nn.Module, model: nn.Module, inputs: Tensor, *, batch_size: int = 250, preprocess: Preprocess | None = None
) -> float:
    """Mean Kullback-Leibler divergence KL(p || q) of a network's class probabilities q from a reference's p, in nats.

    Args:
        reference: gives logits, float (batch, ..., classes), of p = softmax(logits); in evaluation mode.
        model: the same, of q; it may be on another device.
        inputs: (samples, ...), what `preprocess` takes, or what the models take.
        batch_size: samples a forward pass.
        preprocess: turns a batch of `inputs` into what the models take.

    Returns:
        Nats, at least 0 but for rounding; the mean over the samples, and over the positions where the output has any.

    Raises:
        DataError: if there is no input, or if the two outputs differ in shape.
        ModelError: if a model is in training mode.
        OptionError: if `batch_size` is not positive.

    Source: Kullback, Leibler, "On Information and Sufficiency", 1951.

    Example:
        >>> round(kl_divergence(torch.nn.Identity().eval(), torch.nn.ReLU().eval(), torch.tensor([[0.0, -1.0]])), 4)
        0.1109
    """
    total, positions = 0.0, 0
    pairs = zip(_outputs(reference, inputs, batch_size, preprocess), _outputs(model, inputs, batch_size, preprocess), strict=True)
    for reference_logits, logits in pairs:
        if reference_logits.shape != logits.shape:
            raise DataError(f"outputs of shapes {tuple(reference_logits.shape)} and {tuple(logits.shape)} cannot be compared")
        log_p = reference_logits.cpu().double().log_softmax(-1)
        log_q = logits.cpu().double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        total += divergence.sum().item()
        positions += divergence.numel()
    return total / positions


def _outputs(model: nn.Module, inputs: Tensor, batch_size: int, preprocess: Preprocess | None) -> Iterator[Tensor]:
    if model.training:
        raise ModelError("the model is in training mode, where batch norm and dropout change its outputs; call model.eval() first")
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, not {batch_size}")
    if len(inputs) == 0:
        raise DataError("there are no inputs to score on")
    state = next(chain(model.parameters(), model.buffers()), None)
    for batch in inputs.split(batch_size):
        # inference mode is entered and left within a step: a generator must not hold it open while its caller runs
        with torch.inference_mode():
            moved = batch if state is None else batch.to(state.device)
            outputs: Tensor = model(moved if preprocess is None else preprocess(moved))
        yield outputs


def _percent_equal(a: Tensor, b: Tensor) -> float:
    return 100.0 * (a == b).double().mean().item()

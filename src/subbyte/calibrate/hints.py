"""Layers' outputs as hints: the error of what the model reads of every layer, beside the error of what it returns in the end.

A model's outputs alone would be fitted by heart on a few hundred samples; the layers in between give every sample as many targets as there
are activations.

Source:
    FitNets (Romero et al. 2014, arXiv 1412.6550).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from subbyte.calibrate.models import CalibratedLayer
from subbyte.model.batches import Batch
from subbyte.model.clipping import Clip
from subbyte.model.padding import real_positions, without_padding
from subbyte.quantizers.pieces import pieces

LEAST_SPREAD = 1e-3  # of the reference's size: what every sample shares, as a learned query, would otherwise outweigh all other layers
Outputs = Mapping[str, list[Tensor]]


@contextlib.contextmanager
def layer_outputs(items: Sequence[CalibratedLayer], modules: Sequence[nn.Module]) -> Iterator[Outputs]:
    """The layers' outputs while the context lasts, as the layers return them.

    Args:
        items: the layers.
        modules: of the model that runs, one for each of them.

    Returns:
        By layer name, float32 of any shape, one for each call.

    Example:
        >>> with layer_outputs([], []) as outputs:
        ...     dict(outputs)
        {}
    """
    found: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str):  # type: ignore[no-untyped-def]
        return lambda module, args, output: found[name].append(output)

    handles = [module.register_forward_hook(keep(item.layer.name)) for item, module in zip(items, modules, strict=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layers_error(items: Sequence[CalibratedLayer], wanted: Outputs, given: Outputs, batch: Batch) -> Tensor | None:
    """Mean over all layers' calls of `relative_error` of what is read of their outputs; padded positions count nowhere.

    Args:
        items: the layers.
        wanted: what the float model's layers returned.
        given: what the quantized model's did.
        batch: what both were called with.

    Returns:
        float32 (), without unit; None where no layer was called.
    """
    real = real_positions(batch)
    errors = []
    for item in items:
        for a, b in zip(wanted.get(item.layer.name, ()), given.get(item.layer.name, ()), strict=False):
            errors.append(relative_error(without_padding(a, real), without_padding(b, real), item.clip))
    return torch.stack(errors).mean() if errors else None


def relative_error(reference: Tensor, output: Tensor, clip: Clip | None = None) -> Tensor:
    """Squared error, as a share of the reference's spread over the samples; of a single sample, of its size.

        e = ||c(y) - c(y^)||^2 / max(||c(y) - mean c(y)||^2, LEAST_SPREAD ||c(y)||^2)        c: what is read; the mean over samples

    Args:
        reference: `y`, float32 (samples, ...).
        output: `y^`, the same shape.
        clip: `c`, what is read of both; None: everything.

    Returns:
        float32 (), without unit; has a gradient for `output`, once.

    Example:
        >>> relative_error(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
        tensor(0.5000)
    """
    return cast(Tensor, _RelativeError.apply(reference, output, clip or Clip()))  # type: ignore[no-untyped-call]


class _RelativeError(torch.autograd.Function):
    """The equation of `relative_error` and its gradient, in one pass over pieces that the cache holds.

    With `m` 1 where `y^` is read and 0 where it is clipped, and `S` the denominator, which has no gradient:

        de / dy^ = 2 m (c(y^) - c(y)) / S
    """

    @staticmethod
    def forward(ctx: Any, reference: Tensor, output: Tensor, clip: Clip) -> Tensor:
        slope = torch.empty_like(output) if ctx.needs_input_grad[1] else None
        slopes = itertools.repeat(None) if slope is None else pieces(slope)
        errors, squares, sums = [], [], reference.new_zeros(reference.shape[1:])
        for wanted, given, kept in zip(pieces(reference), pieces(output), slopes, strict=False):
            read = clip(wanted)
            difference = clip(given) - read
            sums += read[0] if len(read) == 1 else read.sum(dim=0)  # of one sample torch would make a copy
            squares.append(_square(read))
            errors.append(_square(difference))
            if kept is not None:
                clip.gradient_(difference, given, kept)
        size = spread = torch.stack(squares).sum()
        if len(reference) > 1:
            spread = torch.maximum(size - _square(sums) / len(reference), LEAST_SPREAD * size)
        spread = spread.clamp(min=torch.finfo(spread.dtype).tiny)
        ctx.save_for_backward(slope, spread)
        return torch.stack(errors).sum() / spread

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        slope, spread = ctx.saved_tensors
        return None, slope * (2.0 * gradient / spread), None


def _square(x: Tensor) -> Tensor:
    flat = x.flatten()
    return torch.dot(flat, flat)

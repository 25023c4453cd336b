"""Layers' outputs as hints: the error of what the model reads of every layer, beside the error of what it returns in the end.

A model's outputs alone would be fitted by heart on a few hundred samples; the layers in between give every sample as many targets as there
are activations.

Source:
    FitNets (Romero et al. 2014, arXiv 1412.6550).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subbyte.calibrate.models import CalibratedLayer
from subbyte.model.batches import Batch
from subbyte.model.padding import real_positions, without_padding
from subbyte.model.pieces import pieces

Outputs = Mapping[str, list[Tensor]]


@contextlib.contextmanager
def layer_outputs(items: Sequence[CalibratedLayer], modules: Sequence[nn.Module]) -> Iterator[Outputs]:
    """What is read of the layers' outputs while the context lasts.

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

    def keep(item: CalibratedLayer):  # type: ignore[no-untyped-def]
        return lambda module, args, output: found[item.layer.name].append(item.clip(output))

    handles = [module.register_forward_hook(keep(item)) for item, module in zip(items, modules, strict=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layers_error(wanted: Outputs, given: Outputs, batch: Batch) -> Tensor | None:
    """Mean over all layers' calls of `relative_error`; padded positions count nowhere.

    Args:
        wanted: what the float model's layers returned.
        given: what the quantized model's did.
        batch: what both were called with.

    Returns:
        float32 (), without unit; None where no layer was called.
    """
    real = real_positions(batch)
    pairs = [pair for name in wanted for pair in zip(wanted[name], given[name], strict=False)]
    errors = [relative_error(without_padding(a, real), without_padding(b, real)) for a, b in pairs]
    return torch.stack(errors).mean() if errors else None


def relative_error(reference: Tensor, output: Tensor) -> Tensor:
    """Squared error, as a share of the reference's spread over the samples; of a single sample, of its size.

    Args:
        reference: float32 (samples, ...).
        output: the same shape.

    Returns:
        float32 ().

    Example:
        >>> relative_error(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
        tensor(0.5000)
    """
    centre = reference.mean(dim=0, keepdim=True) if len(reference) > 1 else torch.zeros_like(reference)
    distances = [F.mse_loss(piece, centre.expand_as(piece), reduction="sum") for piece in pieces(reference)]
    spread = torch.stack(distances).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return F.mse_loss(output, reference, reduction="sum") / spread

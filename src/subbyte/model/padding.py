"""Padding: positions that a batch only has because another sample is longer. They are never calibrated on, measured or compared.

A batch says so the way the models of transformers are told: a mapping with an entry ``attention_mask``, (samples, positions), 0 where there
is padding. What a layer is fed and what a model returns is laid out in one of a few ways over the same samples and positions; a tensor
that is laid out otherwise (one vector for each sample, say) has no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from subbyte.model.batches import Batch, floating_tensors

MASK = "attention_mask"


def real_positions(batch: Batch) -> Tensor | None:
    """Which positions of a batch are no padding.

    Args:
        batch: see `batches.as_batches`.

    Returns:
        bool (samples, positions), or None where the batch has no padding or does not say.

    Example:
        >>> import torch
        >>> real_positions({"input_ids": torch.zeros(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[ True,  True, False]])
    """
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or bool(mask.bool().all()):
        return None
    return mask.bool()


def spread(real: Tensor, layout: Sequence[int]) -> Tensor | None:
    """The positions laid out as a tensor lays out its vectors.

    Args:
        real: bool (samples, positions).
        layout: the tensor's dimensions without its channels: (samples, positions, ...), (positions, samples, ...), (samples * positions,
            ...) or (samples, heads, positions, ...).

    Returns:
        bool, as many leading dimensions of `layout` as it takes; None where the tensor is laid out otherwise.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[True, False]]), (2,))
        tensor([ True, False])
    """
    samples, positions = real.shape
    layout = tuple(layout)
    if layout[:2] == (samples, positions):
        return real
    if layout[:2] == (positions, samples):
        return real.mT
    if layout[:1] == (samples * positions,) and positions > 1:
        return real.flatten()
    if len(layout) > 2 and (layout[0], layout[2]) == (samples, positions):
        return real[:, None, :].expand(layout[:3])
    return None


def real_rows(batch: Batch, layout: Sequence[int]) -> Tensor | None:
    """Which rows of a layer are no padding.

    Args:
        batch: that the model is called with.
        layout: dimensions that the layer's rows are numbered in, `Operator.layout`.

    Returns:
        bool (samples of the layer, positions of each); None where all are real.
    """
    real = real_positions(batch)
    mask = None if real is None else spread(real, layout)
    if mask is None:
        return None
    mask = mask.reshape(*mask.shape, *(1,) * (len(layout) - mask.dim())).expand(tuple(layout))
    return mask.reshape(layout[0], -1)


def without_padding(tensor: Tensor, real: Tensor | None) -> Tensor:
    """The vectors of a tensor that are no padding.

    Args:
        tensor: float32 (..., channels), what a layer is fed or returns.
        real: bool (samples, positions), see `real_positions`, or None.

    Returns:
        float32 (vectors, ..., channels), or `tensor` itself where nothing in it is padding.

    Example:
        >>> import torch
        >>> without_padding(torch.ones(1, 3, 2), torch.tensor([[True, False, True]])).shape
        torch.Size([2, 2])
    """
    mask = None if real is None else spread(real, tensor.shape[:-1])
    return tensor if mask is None else tensor[mask.to(tensor.device)]


def read_outputs(output: object, batch: Batch) -> list[Tensor]:
    """Every floating-point tensor of a model's output without padding, in a fixed order.

    One number for each position, such as the logits of where an answer starts, makes one tensor (1, positions) for each sample.

    Args:
        output: what the model returned, tensors of any shape.
        batch: that it was called with.

    Example:
        >>> import torch
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
        >>> [tuple(tensor.shape) for tensor in read_outputs((torch.zeros(1, 3, 5), torch.zeros(1, 3), torch.zeros(1, 2)), batch)]
        [(2, 5), (1, 2), (1, 2)]
    """
    real = real_positions(batch)
    if real is None:
        return floating_tensors(output)
    found: list[Tensor] = []
    for tensor in floating_tensors(output):
        if tensor.dim() == 2 and tensor.shape == real.shape:
            found += [tensor[index : index + 1, mask] for index, mask in enumerate(real.to(tensor.device))]
        else:
            found.append(without_padding(tensor, real))
    return found

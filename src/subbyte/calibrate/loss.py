"""How far a quantized model's outputs are from the float model's, without labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subbyte.errors import ModelError, OptionError
from subbyte.model.batches import Batch, call, describe, floating_tensors
from subbyte.model.padding import read_outputs


class OutputLoss(ABC):
    """A distance between outputs; a mean over everything that it is shown.

    Example:
        >>> isinstance(KLDivergence(temperature=2.0), OutputLoss)
        True
    """

    def probe(self, output: object, generator: torch.Generator) -> Tensor:
        """A random scalar of the model's output whose squared change, under small changes of the output, is the numerator on average.

        Args:
            output: what the float model returned, tensors of any shape that want gradients.
            generator: source of every random number, on the CPU.

        Returns:
            float32 ().

        Raises:
            OptionError: if the loss has none.
        """
        raise OptionError(f"{type(self).__name__} has no probe for the sensitivity method Fisher; use Measured() with it")

    @abstractmethod
    def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the mean; both add up over batches.

        Args:
            reference: the float model's output, float32 (samples, ...).
            output: the quantized model's, the same shape.

        Returns:
            Two float64 ().
        """


@dataclass(frozen=True)
class KLDivergence(OutputLoss):
    """`KL(float || quantized)` of the softmax of `logits / temperature` over the last dimension, in nats, mean over all others.

    On samples that a classifier was trained on it is over-confident, and at temperature 1 nearly all of the divergence comes from a few
    samples: what is measured on a few dozen held-out training samples is then mostly chance.

    Args:
        temperature: what logits are divided by, above 0.

    Raises:
        OptionError: if the temperature is not above 0.

    Example:
        >>> a, b = KLDivergence().total(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        >>> (a / b).item()
        0.0
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise OptionError(f"a temperature is above 0, not {self.temperature}")

    def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """See `OutputLoss`.

        Args:
            reference: logits, float32 (..., classes).
            output: logits, the same shape.
        """
        p, q = ((logits.double() / self.temperature).log_softmax(dim=-1) for logits in (reference, output))
        divergence = (p.exp() * (p - q)).sum(dim=-1)
        return divergence.sum(), torch.tensor(float(divergence.numel()), dtype=torch.float64, device=p.device)

    def probe(self, output: object, generator: torch.Generator) -> Tensor:
        """`sum r sqrt(p / q) log p(label) / sqrt 2` with random signs `r`, the labels drawn with `q ~ p ||e_label - p||`.

        Labels could be drawn with `p` itself; but where a classifier is sure, nearly all of the divergence comes from labels that would
        hardly ever be drawn. `q` draws a label as often as its gradient matters, and the weight makes good for it.

        Args:
            output: logits, float32 (..., classes), or structures of such.
            generator: draws the labels and the signs.

        Source:
            The Fisher information is the curvature of the divergence, `KL = dz^T (diag p - p p^T) dz / 2` to second order; importance
            sampling: Kahn, Marshall 1953.
        """
        scalar = torch.zeros(())
        for logits in floating_tensors(output):
            log_p = (logits / self.temperature).log_softmax(dim=-1)
            p = log_p.detach().exp()
            q = p * (1.0 - 2.0 * p + p.square().sum(dim=-1, keepdim=True)).clamp(min=1e-12).sqrt()
            q = q / q.sum(dim=-1, keepdim=True)
            sums = q.cumsum(dim=-1)
            drawn = torch.rand(sums.shape[:-1], generator=generator)[..., None].to(sums) * sums[..., -1:]
            label = (sums < drawn).sum(dim=-1, keepdim=True).clamp(max=log_p.shape[-1] - 1)
            signs = torch.randint(0, 2, label.shape, generator=generator).to(p) * 2 - 1
            weight = signs * (p.gather(-1, label) / q.gather(-1, label).clamp(min=torch.finfo(q.dtype).tiny)).sqrt()
            scalar = scalar.to(log_p.device) + (weight * log_p.gather(-1, label)).sum() / 2**0.5
        return scalar


@dataclass(frozen=True)
class RelativeSquaredError(OutputLoss):
    """`sum (float - quantized)^2 / sum float^2`, without unit.

    Example:
        >>> a, b = RelativeSquaredError().total(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        >>> (a / b).item()
        0.25
    """

    def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """See `OutputLoss`.

        Args:
            reference: float32, any shape.
            output: float32, the same shape.
        """
        return (reference.double() - output.double()).square().sum(), reference.double().square().sum()

    def probe(self, output: object, generator: torch.Generator) -> Tensor:
        """`sum r z` with random signs `r`.

        Args:
            output: float32, any shape, or structures of such.
            generator: draws the signs.

        Source:
            Hutchinson 1989: `E[(r . dz)^2] = ||dz||^2`.
        """
        scalar = torch.zeros(())
        for z in floating_tensors(output):
            signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
            scalar = scalar.to(z.device) + (signs * z).sum()
        return scalar


@dataclass(frozen=True)
class Disagreement(OutputLoss):
    """Share of the predictions whose largest entry along the last dimension is not the float model's.

    Example:
        >>> a, b = Disagreement().total(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> (a / b).item()
        0.5
    """

    def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """See `OutputLoss`.

        Args:
            reference: logits, float32 (..., classes).
            output: logits, the same shape.
        """
        differs = (reference.argmax(dim=-1) != output.argmax(dim=-1)) | output.isnan().any(dim=-1)
        return differs.sum(dtype=torch.float64), torch.tensor(float(differs.numel()), dtype=torch.float64, device=differs.device)


@dataclass(frozen=True)
class CosineDistance(OutputLoss):
    """`1 - cos(float, quantized)`, each sample's numbers as one vector, mean over samples; blind to the outputs' size.

    Example:
        >>> a, b = CosineDistance().total(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> (a / b).item()
        0.5
    """

    def total(self, reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """See `OutputLoss`.

        Args:
            reference: float32 (samples, ...).
            output: float32, the same shape.
        """
        a, b = (tensor.double().reshape(tensor.shape[0] if tensor.dim() else 1, -1) for tensor in (reference, output))
        distance = 1.0 - torch.cosine_similarity(a, b, dim=1)
        return distance.sum(), torch.tensor(float(len(distance)), dtype=torch.float64, device=distance.device)


def check_output(output: object) -> None:
    """Refuse a model whose outputs cannot be compared, before any work.

    Args:
        output: what the float model returned for a batch, tensors of any shape.

    Raises:
        ModelError: if there is no floating-point tensor in it, or one holds NaN or infinite numbers.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in floating_tensors(output)):
        raise ModelError(f"the float model returns NaN or infinite numbers, {describe(output)}; leave out the part that makes them")
    if not floating_tensors(output):
        raise ModelError(f"the model returns {describe(output)}, no floating-point tensor, so its outputs cannot be compared")


def measure(model: nn.Module, batches: Sequence[Batch], references: Sequence[object], loss: OutputLoss) -> float:
    """The loss of a model on some batches.

    Args:
        model: in evaluation mode.
        batches: what to call it with.
        references: what the float model returned for each batch, tensors of any shape.
        loss: the distance.

    Returns:
        The mean loss over all tensors of all batches; NaN where the model returns NaN.
    """
    above, below = torch.zeros(()), torch.zeros(())
    with torch.no_grad():
        for batch, reference in zip(batches, references, strict=True):
            top, bottom = compare(reference, call(model, batch), loss, batch)
            above, below = above + top.cpu(), below + bottom.cpu()
    return float(above / below.clamp(min=torch.finfo(torch.float32).tiny))


def compare(reference: object, output: object, loss: OutputLoss, batch: Batch) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the loss of one output, over all its floating-point tensors, without padding; with gradients.

    Args:
        reference: what the float model returned, tensors of any shape.
        output: what the quantized model returned for the same, likewise.
        loss: the distance.
        batch: that both were called with.

    Returns:
        Two float64 ().
    """
    pairs = zip(read_outputs(reference, batch), read_outputs(output, batch), strict=True)
    totals = [loss.total(expected, given) for expected, given in pairs]
    return torch.stack([top for top, _ in totals]).sum(), torch.stack([bottom for _, bottom in totals]).sum()

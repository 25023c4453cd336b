"""The products of attention: `Q K^T` and `softmax(...) V`, whose factors are activations on both sides.

Models of the transformers library ask a table of functions for their attention. The one that is put into it here computes attention in its
eager form, and lets a module beside each attention layer put the four factors onto grids:

    S = q(Q) q(K)^T scale + mask,      P = softmax(S),      output = q(P) q(V)

The module does nothing until it has grids, so that float and quantized models run the same code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subbyte.errors import OptionError
from subbyte.model.batches import Batch, call
from subbyte.quantizers.affine import fake_quantize, soft_quantize
from subbyte.quantizers.grid import Grid

NAME = "subbyte"  # under which the library knows the function
CHILD = "attention_products"  # under which an attention module knows its quantisers
FACTORS = ("query", "key", "weights", "value")


class AttentionProducts(nn.Module):
    """Grids of the factors of one attention layer: query, key, softmax output and value, float until `assign_`.

    Args:
        bits: of all four, 2 to 8.

    Example:
        >>> products = AttentionProducts(2)
        >>> products.assign_(torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int32))
        >>> products("weights", torch.tensor([0.3, 0.9]))
        tensor([0.5000, 1.0000])
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.grid = Grid(bits)
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def assign_(self, scale: Tensor, zero_point: Tensor) -> None:
        """Quantize from now on.

        Args:
            scale: steps, float32 (4,), in the order of `FACTORS`.
            zero_point: int32 (4,).
        """
        self.scale, self.zero_point = scale, zero_point

    def forward(self, factor: str, x: Tensor) -> Tensor:
        """A factor on its grid.

        Args:
            factor: one of `FACTORS`.
            x: float32 (samples, heads, positions, channels).
        """
        if self.scale is None or self.zero_point is None:
            return x
        scale, zero_point = self.scale[FACTORS.index(factor)], self.zero_point[FACTORS.index(factor)]
        if x.requires_grad:
            return soft_quantize(x, scale, zero_point.float(), self.grid)
        return fake_quantize(x, scale, zero_point, self.grid)

    def extra_repr(self) -> str:
        """The width, for `print(model)`."""
        return f"{self.grid.bits} bits"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **further: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in its eager form, as the transformers library calls it.

    Args:
        module: the attention layer; if it has quantisers, they are asked.
        query: float32 (samples, heads, positions, channels).
        key: float32 (samples, heads or a divisor of it, positions, channels).
        value: float32, the shape of `key`.
        attention_mask: float32 (samples, 1, positions, positions), is added to the scores; or None.
        further: `scaling` of the scores, otherwise one over the root of the channels; and what else the library passes: dropout, which is
            off in evaluation mode.

    Returns:
        Output, float32 (samples, positions, heads, channels), and softmax output, float32 (samples, heads, positions, positions).

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; shared keys: Ainslie et al. 2023 (arXiv 2305.13245).
    """
    on_grid = getattr(module, CHILD, None) or _unchanged
    query, key, value = on_grid("query", query), on_grid("key", key), on_grid("value", value)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scaling = further.get("scaling")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = on_grid("weights", scores.softmax(dim=-1))
    return (weights @ value).transpose(1, 2).contiguous(), weights


def add_products_(model: nn.Module, bits: int, batch: Batch) -> tuple[str, ...]:
    """Give every attention layer of a model its quantisers, still without grids.

    Args:
        model: with models of the transformers library in it; is changed in place.
        bits: of all factors.
        batch: what to find the attention layers with, by running the model.

    Returns:
        Names of the attention layers.

    Raises:
        OptionError: if no attention layer asks the library's table of functions.
    """
    called: list[nn.Module] = []

    def noted(module: nn.Module, *args: Any, **further: Any) -> tuple[Tensor, Tensor]:
        called.append(module)
        return attend(module, *args, **further)

    _use_(model, noted)
    with torch.no_grad():
        call(model, batch)
    names = tuple(name for name, module in model.named_modules() if any(module is one for one in called))
    if not names:
        raise OptionError("attention products are quantized in models of transformers, and this model has no attention layer of theirs")
    put_products_(model, names, bits)
    return names


def put_products_(model: nn.Module, names: Sequence[str], bits: int) -> None:
    """Give named attention layers their quantisers, still without grids.

    Args:
        model: is changed in place.
        names: of its attention layers.
        bits: of all factors.

    Raises:
        AttributeError: if there is no such layer.
        OptionError: if the model holds no model of the transformers library.
    """
    _use_(model, attend)
    for name in names:
        model.get_submodule(name).add_module(CHILD, AttentionProducts(bits).eval())


def products_of(model: nn.Module) -> dict[str, AttentionProducts]:
    """The quantisers of a model's attention layers, by the layers' names.

    Args:
        model: any module.

    Example:
        >>> products_of(nn.Identity())
        {}
    """
    ending = f".{CHILD}"
    return {name.removesuffix(ending): module for name, module in model.named_modules() if isinstance(module, AttentionProducts)}


def _unchanged(factor: str, x: Tensor) -> Tensor:
    return x


def _use_(model: nn.Module, function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Let the models of the library that are in a model compute attention by a function."""
    library = sys.modules.get("transformers")  # a model of a library that is not loaded cannot be here
    inside = [] if library is None else [module for module in model.modules() if isinstance(module, library.PreTrainedModel)]
    if library is None or not inside:
        raise OptionError("attention products are quantized in models of transformers; this model holds none")
    masking = importlib.import_module("transformers.masking_utils")
    masking.AttentionMaskInterface.register(NAME, masking.eager_mask)
    library.AttentionInterface.register(NAME, function)
    for module in inside:
        module.set_attn_implementation(NAME)

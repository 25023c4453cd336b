"""Attention in the operators of the ONNX standard, with what every layer has in common done once.

torch.onnx would turn the keys by way of one more copy, and look for NaN in every softmax, in case that a row of the mask leaves no key.
Here such rows are found from the mask, which all layers share; they see every key, and are multiplied by zero behind the product with the
values.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

aten = torch.ops.aten


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives in evaluation mode, 0 where the mask leaves no key.

    Args:
        query: float (..., L, E).
        key: float (..., S, E).
        value: float (..., S, V).
        rest: as torch has it, `attn_mask`: bool (..., L, S), True where a key is seen, or float, added to the scores; `dropout_p`, which is
            ignored, as no file trains; `is_causal`: whether a position sees those up to its own.
        scale: of the scores; None: `1 / sqrt(E)`.
        enable_gqa: whether several heads of the query have one of the keys and values.

    Returns:
        float (..., L, V).

    Example:
        >>> x, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
        >>> expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        >>> torch.allclose(attention(x, x, x, mask), expected, atol=1e-6)
        True
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    given: tuple[Any, ...] = (*rest, *(None, 0.0, False)[len(rest) :])
    attn_mask, _, is_causal = given
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is None:
        return scores.softmax(-1) @ value
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
    some = seen.any(-1, keepdim=True)
    added = torch.where(seen, 0.0, -math.inf).to(scores.dtype) if seen is attn_mask else attn_mask
    mixed = (scores + torch.where(some, added, 0.0)).softmax(-1) @ value
    return mixed if is_causal else mixed * some.to(mixed.dtype)


def with_attention_written_out(graph: GraphModule) -> GraphModule:
    """A graph that calls `attention`, and in which no view relies on how torch's own operator lays out its output.

    Args:
        graph: a traced model; is not changed, its parameters are shared.
    """
    written = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in written.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            node.target = attention
        elif node.target is aten.view.default:
            node.target = aten.reshape.default
    written.recompile()
    return written

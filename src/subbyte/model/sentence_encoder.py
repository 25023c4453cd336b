"""A text model with pooling behind it, as one module: token vectors in, one vector for each text out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone knows it by


class SentenceEncoder(nn.Module):
    """An encoder, the mean of its token vectors (or the first one), and, if wanted, length one.

    Args:
        encoder: called with `input_ids`, `attention_mask` and what else it takes; its first output is float32 (samples, tokens, channels).
        first_token: whether the first token's vector is taken instead of the mean over all that are no padding.
        normalize: whether vectors get length one.

    Source:
        Reimers, Gurevych 2019, *Sentence-BERT* (arXiv 1908.10084), section 3.

    Example:
        >>> import torch
        >>> class Encoder(nn.Module):
        ...     def forward(self, input_ids, attention_mask):
        ...         return (input_ids[..., None].float() * torch.ones(2),)
        >>> SentenceEncoder(Encoder())(torch.tensor([[1, 3, 9]]), torch.tensor([[1, 1, 0]]))
        tensor([[2., 2.]])
    """

    def __init__(self, encoder: nn.Module, *, first_token: bool = False, normalize: bool = False) -> None:
        super().__init__()
        self.encoder, self.first_token, self.normalize = encoder, first_token, normalize

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **further: Tensor) -> Tensor:
        """One vector for each text, float32 (samples, channels).

        Args:
            input_ids: int64 (samples, tokens).
            attention_mask: int64 (samples, tokens), 0 where there is padding.
            further: what else the encoder takes, such as `token_type_ids`, int64 (samples, tokens).
        """
        tokens: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **further)[0]
        if self.first_token:
            pooled = tokens[:, 0]
        else:
            weight = attention_mask[..., None].to(tokens.dtype)
            pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

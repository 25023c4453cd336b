"""Tokens as rows: the same numbers from layers with two dimensions, whatever surrounds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subbyte
from subbyte.export.graph_kinds import aten, key_of
from subbyte.export.markers import marked
from subbyte.export.placement import place_
from subbyte.export.token_rows import as_rows_
from subbyte.export.trace import Example, trace

pytest.importorskip("onnx")
WIDTH = 16


class Block(nn.Module):
    """Positions that are the same for all samples, attention, a gate for each sample, a residual; then one token, or all of them."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.positions = nn.Parameter(torch.randn(1, 40, WIDTH))
        self.qkv, self.out, self.up = (nn.Linear(WIDTH, size) for size in (3 * WIDTH, WIDTH, 24))
        self.down, self.head = nn.Linear(24, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.gain = nn.LayerNorm(WIDTH), nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions[:, : x.shape[1]]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.gain * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x * x.mean(dim=1, keepdim=True).sigmoid()
        x = x + self.down(F.gelu(self.up(x)) * 0.5)
        return self.head(x[:, 0]) if self.pooled else self.head(x).softmax(dim=1)


def placed(model: nn.Module, batches: list[Any], widths: subbyte.Widths) -> tuple[torch.fx.GraphModule, subbyte.Result]:
    result = subbyte.quantize(model.eval(), batches, widths=widths, recipe=subbyte.rounding())
    graph = trace(marked(result.model).model, Example.of(batches))
    place_(graph, batches)
    return graph, result


def layers(graph: torch.fx.GraphModule) -> list[int]:
    """Dimensions of what each linear layer reads."""
    return [node.args[0].meta["val"].dim() for node in graph.graph.nodes if key_of(node) is not None]


@pytest.mark.parametrize("pooled", [True, False])
def test_every_layer_reads_rows_and_nothing_else_changes(pooled: bool) -> None:
    batches = [torch.randn(4, length, WIDTH) for length in (9, 12)]
    graph, _ = placed(Block(pooled=pooled), batches, subbyte.Widths(4, 8))
    expected = [graph(x) for x in (*batches, torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)))]
    assert layers(graph) == [3] * 4 + [2 if pooled else 3]
    as_rows_(graph)
    assert layers(graph) == [2] * 5
    for x, wanted in zip((*batches, torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))), expected, strict=True):
        assert torch.allclose(graph(x), wanted, rtol=0, atol=1e-5) and graph(x).shape == wanted.shape
    for node in graph.graph.nodes:
        if node.target in (aten.layer_norm.default, aten.gelu.default):
            assert node.meta["val"].dim() == 2


def test_a_layer_whose_input_is_no_codes_stays_as_it_is() -> None:
    batches = [torch.randn(4, 9, WIDTH)]
    graph, _ = placed(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3)), batches, subbyte.Widths(4, None))
    as_rows_(graph)
    assert layers(graph) == [3, 3]


def test_sizes_that_no_input_has_leave_a_part_as_it_is() -> None:
    class Halves(nn.Module):
        """Half the tokens of each sample, as samples of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(2 * x.shape[0], -1, WIDTH)).softmax(dim=1)

    batches = [torch.randn(4, 8, WIDTH)]
    graph, result = placed(Halves(), batches, subbyte.Widths(4, 8))
    as_rows_(graph)
    assert layers(graph) == [3]
    assert torch.allclose(graph(batches[0]), result.model(batches[0]), atol=1e-5)

"""Channels in the blocks in which ONNX Runtime's int8 kernels work.

Its kernels for symmetric weights take a convolution of several positions if its input channels are a multiple of 4, and a depthwise one
if its channels are a multiple of 16. Any other copies the patch under every output position first. So such channels are filled up with
zeros:

    channels of the input        codes -> Pad -> DequantizeLinear -> Conv; or, where one convolution makes them for this layer alone, that
                                 one gets more output channels, with weights of zero
    channels of a depthwise      those of its weight; behind it a Slice; or, where dense convolutions alone read them, these get weights of
                                 zero for them

Nothing that the file computes changes.

Source:
    MlasConvSymPackWSize in ONNX Runtime, onnxruntime/core/mlas/lib/convsym.cpp (commit 02ed678); ONNX Runtime 1.32 runs such layers faster
    (benchmarks/channel_blocks.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir
from torch import Tensor
from torch.nn import functional as F

from subbyte.export.constants import LayerConstants
from subbyte.export.widening import INT8_BITS
from subbyte.model.operators import Convolution

DENSE_BLOCK, DEPTHWISE_BLOCK = 4, 16
LEAST_OUTPUTS = 16  # of a dense convolution that has such a kernel
MOST_POSITIONS = 25  # of its kernel: with 49 it was no faster (benchmarks/channel_blocks.py)
IMAGE_WEIGHT = 4  # dimensions


@dataclass(eq=False)
class ChannelBlocks:
    """What changes in a graph of markers.

    Args:
        constants: of the layers by key, with zeros for what was added.
        padded: convolution -> channels of zeros behind those of its input.
        cut: quantiser -> channels of what it quantises that its readers get; those behind were added.
    """

    constants: dict[str, LayerConstants]
    padded: dict[ir.Node, int] = field(default_factory=dict)
    cut: dict[ir.Node, int] = field(default_factory=dict)

    @staticmethod
    def none(constants: Mapping[str, LayerConstants]) -> ChannelBlocks:
        """Everything as it is.

        Args:
            constants: of the layers by key.
        """
        return ChannelBlocks(dict(constants))

    @staticmethod
    def of_(graph: ir.Graph, constants: Mapping[str, LayerConstants]) -> ChannelBlocks:
        """Fill up the channels of every layer that has a faster kernel then.

        Args:
            graph: of markers; the groups of depthwise convolutions are changed.
            constants: of the layers by key.
        """
        blocks = ChannelBlocks.none(constants)
        sites = {site.node: site for node in graph if (site := _site(node, constants)) is not None}
        calls = Counter(item.layer for item in constants.values())
        once = {node: site for node, site in sites.items() if calls[constants[site.key].layer] == 1}
        for site in sites.values():
            if site.depthwise:
                blocks._fill_depthwise_(site, once)
        for site in sites.values():
            missing = _missing(blocks.constants[site.key])
            if not site.depthwise and missing:
                blocks._fill_input_(site, missing, once)
                blocks._widen_(site, inputs=missing)
        return blocks

    def _fill_depthwise_(self, site: _Site, once: Mapping[ir.Node, _Site]) -> None:
        channels, missing = len(self.constants[site.key].codes), _missing(self.constants[site.key])
        if not missing:
            return
        self._fill_input_(site, missing, once)
        self._widen_(site, outputs=missing)
        site.node.attributes["group"] = ir.AttrInt64("group", channels + missing)
        readers = [once.get(use.node) for use in site.sink.outputs[0].uses()]
        if site.sink.outputs[0].is_graph_output() or not readers or any(reader is None or reader.depthwise for reader in readers):
            self.cut[site.sink] = channels
            return
        for reader in readers:
            assert reader is not None
            self._widen_(reader, inputs=missing)

    def _fill_input_(self, site: _Site, missing: int, once: Mapping[ir.Node, _Site]) -> None:
        """Let the input have more channels."""
        source = site.source.inputs[0]
        maker = once.get(producer) if source is not None and (producer := source.producer()) is not None else None
        alone = len(site.source.outputs[0].uses()) == 1 and not site.source.outputs[0].is_graph_output()
        if maker is not None and alone and not maker.depthwise:
            self._widen_(maker, outputs=missing)
        else:
            self.padded[site.node] = missing

    def _widen_(self, site: _Site, outputs: int = 0, inputs: int = 0) -> None:
        """Weights of zero for more channels."""
        old = self.constants[site.key]

        def longer(tensor: Tensor, value: float = 0) -> Tensor:
            return F.pad(tensor, (0, outputs), value=value)

        rows, columns, *positions = old.codes.shape
        zero_point = longer(old.zero_point)
        zeros = zero_point.to(old.codes.dtype).view(-1, *[1] * (old.codes.dim() - 1))
        codes = zeros.repeat(1, columns + inputs, *positions)
        codes[:rows, :columns] = old.codes
        self.constants[site.key] = replace(
            old,
            codes=codes,
            scale=longer(old.scale, 1.0),
            zero_point=zero_point,
            bias=longer(old.bias),
            bias_codes=None if old.bias_codes is None else longer(old.bias_codes),
        )


@dataclass(frozen=True, eq=False)
class _Site:
    """A convolution with quantised input and output."""

    node: ir.Node
    key: str
    source: ir.Node
    sink: ir.Node
    depthwise: bool


def _site(node: ir.Node, constants: Mapping[str, LayerConstants]) -> _Site | None:
    if node.op_type != "Conv" or len(node.inputs) < 3:
        return None
    source, weight, bias = (None if value is None else value.producer() for value in node.inputs)
    uses = [use.node for use in node.outputs[0].uses()]
    if source is None or weight is None or bias is None or len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    if (source.op_type, weight.op_type, bias.op_type, uses[0].op_type) != ("Quantize", "Weight", "Bias", "Quantize"):
        return None
    key = weight.attributes["key"].as_string()
    item = constants[key]
    dense = isinstance(item.operator, Convolution) and item.operator.groups == 1
    if item.codes.dim() != IMAGE_WEIGHT or not (dense or _is_depthwise(item)):
        return None
    return _Site(node, key, source, uses[0], not dense)


def _is_depthwise(constants: LayerConstants) -> bool:
    operator = constants.operator
    return isinstance(operator, Convolution) and operator.groups == len(constants.codes) > 1 and constants.codes.shape[1] == 1


def _missing(constants: LayerConstants) -> int:
    """Channels that a layer's input lacks for the faster kernel; 0 where it has it already, or can have none."""
    outputs, inputs, *kernel = constants.codes.shape
    if not constants.grid.symmetric and constants.grid.bits == INT8_BITS:
        return 0
    if _is_depthwise(constants):
        return -outputs % DEPTHWISE_BLOCK
    has_kernel = 1 < math.prod(kernel) <= MOST_POSITIONS and outputs >= LEAST_OUTPUTS and outputs % DENSE_BLOCK == 0
    return -inputs % DENSE_BLOCK if has_kernel else 0

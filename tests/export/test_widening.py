"""What the operators of a file make of stored codes, steps and biases, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from subbyte.export.constants import BIAS_TOP, LayerConstants, bias_blocks, bias_powers
from subbyte.export.onnx_builder import Builder
from subbyte.export.widening import LEAST_STREAM, Stored, widen_, widen_numbers_
from subbyte.model.operators import operator_of
from subbyte.quantizers.grid import Grid


def values_of(builder: Builder, values: list[ir.Value], kind: ir.DataType) -> list[npt.NDArray[np.generic]]:
    """What ONNX Runtime computes."""
    graph = builder.graph
    for value in values:
        out = builder.add("Identity", value)
        out.type = ir.TensorType(kind)
        graph.outputs.append(out)
    graph.extend(builder.nodes)
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    found: list[npt.NDArray[np.generic]] = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {})
    return found


def empty() -> Builder:
    """Of a graph with nothing in it."""
    return Builder(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g"))


@settings(max_examples=60, deadline=None)
@given(layers=st.lists(st.tuples(st.integers(2, 8), st.booleans(), st.integers(1, 40)), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_widened_codes_are_the_codes(layers: list[tuple[int, bool, int]], seed: int) -> None:
    chance = np.random.default_rng(seed)
    stored = {}
    for index, (bits, symmetric, count) in enumerate(layers):
        grid = Grid(bits, symmetric=symmetric or bits == 8)
        codes = chance.integers(grid.lowest, grid.highest + 1, (count, 3)).astype(np.int16)
        group = [None, 1, 3][index % 3]
        zeros = (count, 1) if group is None else (count, 3 // group, 1)
        zero = None if grid.symmetric else chance.integers(0, grid.highest + 1, zeros).astype(np.int32)
        stored[str(index)] = Stored(codes, grid, zero, group)
    builder = empty()
    values = widen_(builder, stored)
    for (key, item), codes in zip(stored.items(), values_of(builder, [values[key] for key in stored], ir.DataType.INT8), strict=True):
        zeros = 0 if item.zero_point is None else item.zero_point.repeat(item.group or 3, axis=-1).reshape(len(item.codes), -1)
        assert codes.dtype == np.int8 and np.array_equal(codes, item.codes - zeros) and np.array_equal(codes, item.levels()), key


def layer(channels: int, chance: np.random.Generator) -> LayerConstants:
    """Constants of a convolution as `constants` rounds them."""
    scale = torch.from_numpy(np.exp(chance.uniform(-9, -2, channels)).astype(np.float16).astype(np.float32))
    whole = bias_blocks(np.rint(chance.normal(size=channels) * 10 ** chance.uniform(0, 7)))
    powers = bias_powers(whole)
    codes = torch.from_numpy((np.rint(whole / powers) * powers).ravel()[:channels].astype(np.int32))
    none = torch.zeros(channels, dtype=torch.int32)
    operator = operator_of(nn.Conv2d(1, channels, 1))
    assert operator is not None
    weight = torch.zeros(channels, 1, 1, 1, dtype=torch.int16)
    return LayerConstants(
        "a", operator, Grid(4, symmetric=True), weight, scale, none, none.float(), codes, float(chance.uniform(0.001, 1)), True
    )


@settings(max_examples=60, deadline=None)
@given(channels=st.lists(st.integers(1, 70), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_steps_and_biases_come_back_to_the_last_bit(channels: list[int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    layers = {str(index): layer(count, chance) for index, count in enumerate(channels)}
    builder = empty()
    steps, biases = widen_numbers_(builder, layers)
    assert set(steps) == set(biases) == (set(layers) if sum(channels) >= LEAST_STREAM else set())
    if steps:
        found = values_of(builder, [*(steps[key] for key in layers), *(biases[key] for key in layers)], ir.DataType.FLOAT)
        expected = [*(item.scale for item in layers.values()), *(item.rounded_bias() for item in layers.values())]
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, expected, strict=True))


def test_steps_that_float16_does_not_hold_are_left_out() -> None:
    chance = np.random.default_rng(0)
    layers = {str(index): layer(LEAST_STREAM, chance) for index in range(2)}
    layers["1"].scale[0] = 1.0 + 2.0**-20
    assert set(widen_numbers_(empty(), layers)[0]) == {"0"}


@given(st.lists(st.integers(-(1 << 30), 1 << 30), min_size=1, max_size=40))
def test_biases_fit_into_int16_with_the_least_power(codes: list[int]) -> None:
    blocks = bias_blocks(np.array(codes))
    powers = bias_powers(blocks)
    assert (np.abs(np.rint(blocks / powers)) <= BIAS_TOP).all()
    assert ((powers == 1) | (np.rint(np.abs(blocks).max(axis=1, keepdims=True) / (powers / 2)) > BIAS_TOP)).all()

"""Loading a packed file: into the user's own class, or by the program in the file, without any class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from subbyte.errors import FileError
from subbyte.export.packed import PREFIX, PackedModel, layer_states, load_into, read_packed
from subbyte.export.program import Program, program_of
from subbyte.model.batches import Batch
from subbyte.model.operators import Convolution, Linear, Operator
from subbyte.model.quantized_layer import QuantizedState

PROGRAM = PREFIX + "program"


def load(path: str | os.PathLike[str], into: nn.Module | None = None) -> nn.Module:
    """The quantized model of a packed file, as an instance of the user's own class, or without one as the file's program.

    Args:
        path: of a file that `Result.save` wrote.
        into: a float model of the same structure, as it was before quantization; its parameters and persistent buffers do not matter
            (non-persistent buffers are its own), and it is not changed. None, if the file was saved with its program.

    Returns:
        A copy of `into` with the file's quantized layers, or a module that computes the program (which takes what the model took, and
        returns mappings for dataclasses); in evaluation mode, with outputs bit-identical to `Result.model`'s.

    Raises:
        FileError: if the file is missing, truncated, altered, of another format, no packed file, or of another model; or if it holds no
            program and there is no `into`.

    Example:
        >>> load("missing.safetensors", torch.nn.Linear(1, 1))
        Traceback (most recent call last):
        subbyte.errors.FileError: cannot read 'missing.safetensors': there is no such file
    """
    if into is not None:
        return load_into(path, into)
    packed = read_packed(path)
    if PROGRAM not in packed.tensors:
        raise FileError(f"'{Path(path)}' holds no program; give the float model as `into`, or save it with program=True")
    try:
        return _program(packed)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError, RecursionError) as error:
        raise FileError(f"the program in '{Path(path)}' is damaged or of a newer subbyte: {error}") from error


def with_program(packed: PackedModel, model: nn.Module, batches: Sequence[Batch]) -> PackedModel:
    """What a file holds together with the model's computation.

    Args:
        packed: the model, packed.
        model: quantized.
        batches: what it is called with.

    Raises:
        ModelError: if torch.export cannot follow the model, or it uses an operator that cannot be stored.
    """
    text, extra = program_of(model, batches, {name: tensor for name, tensor in packed.tensors.items() if not name.startswith(PREFIX)})
    program = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return replace(packed, tensors={**packed.tensors, **extra, PROGRAM: program})


def _program(packed: PackedModel) -> Program:
    metadata = packed.metadata
    states = layer_states(packed)
    weights = {
        name: _weight_and_bias(state, transposed=bool(metadata["transposed"][index]), channels=int(metadata["channels"][index]))
        for index, (name, state) in enumerate(states)
    }
    return Program(packed.tensors[PROGRAM].numpy().tobytes(), packed.tensors, weights)


def _weight_and_bias(state: QuantizedState, *, transposed: bool, channels: int) -> tuple[Tensor, Tensor]:
    """What a layer multiplies by and adds; the weight of GPT-2's Conv1D counts outputs first, as the program has it."""
    dimensions = state.codes.dim() - 2
    operator: Operator = Linear(transposed=transposed)
    if dimensions:
        groups = channels // state.codes.shape[1] if transposed else 1
        ones = (1,) * dimensions
        kernel, padding = tuple(state.codes.shape[2:]), ((0, 0),) * dimensions  # of no consequence for the weight
        operator = Convolution(kernel, ones, padding, ones, groups, transposed=transposed)
    weight = state.weight(operator)
    bias = torch.zeros(len(state.scale)) if state.bias is None else state.bias
    return weight.mT.contiguous() if transposed and not dimensions else weight, bias
